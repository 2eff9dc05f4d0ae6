"""Launches of every kernel with the options that change its code, on tensors that hold no data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcfg.combination import Combination
from fastcfg.state_change import FRESH_STREAM, RENOISE_STREAM, KnownBuffers, StateSpec
from fastcfg.step import StepBuffers, StepSpec
from fastcfg.table import DEVICE_COLUMNS


@dataclass(frozen=True)
class Launch:
    """One call of a launcher.

    Attributes:
        call: makes the call.
        module: holds the kernel.
        kernel: its name there.
        bytes_per_element: bytes that must be moved for one element of the state: every tensor once, without scalars.
    """

    call: Callable[[], None]
    module: ModuleType
    kernel: str
    bytes_per_element: int


SHAPE = (64, 3, 64, 64)


def _launch(
    module: str, bytes_per_element: int, *arguments: Any, launcher: str | None = None, kernel: str | None = None
) -> Launch:
    """A call of a launcher in fastcfg.kernels; it and its kernel are named after the module by default."""
    found = import_module(f"fastcfg.kernels.{module}")
    call = partial(getattr(found, launcher or f"launch_{module}"), *arguments)
    return Launch(call, found, kernel or f"_{module}_kernel", bytes_per_element)


def _tensor(*shape: int, dtype: str = "float32", channels_last: bool = False) -> Tensor:
    tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor


def _given(shape: tuple[int, ...], *weights: int) -> dict[str, Any]:
    """The buffers that every row has, and x0; `weights` is the size of a sample's."""
    x, counter = _tensor(*shape), _tensor(2, dtype="int32")
    table, schedule = _tensor(51, len(DEVICE_COLUMNS)), _tensor(50, shape[0], *weights)
    return {"x": x, "x0": _tensor(*shape), "table": table, "counter": counter, "weights": schedule}


def step(shape: tuple[int, ...] = SHAPE, dtype: str = "bfloat16", channels_last: bool = False, **fields: Any) -> Launch:
    """The guided step.

    Args:
        shape: of the state, [B, C, ...].
        dtype: of the model's output and input.
        channels_last: the layout of both.
        **fields: of the `StepSpec`.
    """
    spec = StepSpec(**fields)
    batch, channels, *rest = shape
    rows = spec.branches * batch
    places = {"sample": (), "channel": shape[1:2], "element": shape[1:]}[spec.weights_by]
    buffers = StepBuffers(
        **_given(shape, spec.branches + spec.momentum, *places),
        bound=_tensor(batch),
        noise=_tensor(*shape),
        seeds=_tensor(batch, dtype="int64"),
        history=_tensor(spec.history + 1, *shape),
        gradient=_tensor(*shape),
        momentum=_tensor(*shape),
        model_input=_tensor(rows, *shape[1:], dtype=dtype, channels_last=channels_last),
        time=_tensor(rows, dtype="int64"),
    )
    output = _tensor(rows, 2 * channels, *rest, dtype=dtype, channels_last=channels_last)
    return _launch("guided_step", step_bytes(spec, buffers), output, spec, buffers)


def step_bytes(spec: StepSpec, buffers: StepBuffers) -> int:
    """Bytes per element of a guided step, in a row that saves a tensor if any row does."""
    model = buffers.model_input.dtype.itemsize  # type: ignore[union-attr]
    state = buffers.x.dtype.itemsize
    variance = spec.learned_variance and spec.noise_source != "none"
    tensors = spec.history + (spec.noise_source == "tensor") + spec.gradient + spec.momentum
    if spec.weights_by == "element":
        tensors += spec.branches - (spec.base is not None)
    read = state + (spec.branches + variance) * model + state * tensors
    slots = len(buffers.model_input) // len(buffers.x)  # type: ignore[arg-type]
    return read + state + slots * model + state * (spec.history > 0) + state * spec.keep_x0


def starting_noise() -> Launch:
    """The normals that a run starts from."""
    return _launch("normal", 4, _tensor(*SHAPE), _tensor(SHAPE[0], dtype="int64"), 0, 0)


def brownian() -> Launch:
    """A row's Brownian noise, of a number of normals that is known at run time."""
    seeds, nodes, factors = _tensor(SHAPE[0], dtype="int64"), _tensor(40, dtype="int64"), _tensor(40)
    return _launch("brownian", 4, _tensor(*SHAPE), seeds, nodes, factors, 34, 2)


def split_piece(dtype: str = "bfloat16") -> Launch:
    """`split_model_output`."""
    batch, channels, *rest = SHAPE
    image, output = _tensor(*SHAPE), _tensor(batch, 2 * channels, *rest, dtype=dtype)
    return _launch("split", 2 * output.itemsize + 8, output, image, image)


def blend_piece(dtype: str = "bfloat16") -> Launch:
    """`guidance_blend` of two branches."""
    batch = SHAPE[0]
    output = _tensor(2 * batch, *SHAPE[1:], dtype=dtype)
    return _launch("blend", 2 * output.itemsize + 4, output, _tensor(batch, 2), 1, False, None, _tensor(*SHAPE))


def x0_piece(dtype: str = "bfloat16") -> Launch:
    """`predict_x0`, clipped."""
    image, scalar, output = _tensor(*SHAPE), _tensor(SHAPE[0]), _tensor(*SHAPE, dtype=dtype)
    return _launch("x0", output.itemsize + 8, image, output, scalar, scalar, scalar, None, image)


def posterior_piece(dtype: str = "bfloat16") -> Launch:
    """`posterior_mean_variance` with variance channels."""
    image, scalar, variance = _tensor(*SHAPE), _tensor(SHAPE[0]), _tensor(*SHAPE, dtype=dtype)
    return _launch("posterior", variance.itemsize + 20, image, image, *[scalar] * 4, variance, image, image, image)


def threshold_piece() -> Launch:
    """Limit and divide, the second half of `dynamic_threshold`."""
    image = _tensor(*SHAPE)
    return _launch("threshold", 8, image, _tensor(SHAPE[0]), image)


def _selection(batch: int) -> Tensor:
    from fastcfg.kernels.quantile import SELECTION

    return _tensor(batch, SELECTION, dtype="int32")


def quantile_pass(index: int) -> Launch:
    """A pass of the selection that finds a quantile."""
    batch, limits = SHAPE[0], (5, 0.5, 1.0, 2.0)
    arguments = (index, _tensor(*SHAPE), _selection(batch), _tensor(batch), limits)
    return _launch("quantile", 4, *arguments, launcher="launch_pass")


def step_bound(shape: tuple[int, ...] = SHAPE, dtype: str = "bfloat16", channels_last: bool = False) -> Launch:
    """x0 of a row of two branches, with the first pass over it."""
    batch, channels, *rest = shape
    output = _tensor(2 * batch, 2 * channels, *rest, dtype=dtype, channels_last=channels_last)
    arguments = (output, StepSpec(2, 1), StepBuffers(**_given(shape, 2)), _selection(batch), 5)
    return _launch("step_bound", 8 + 2 * output.itemsize, *arguments, launcher="launch_first_pass")


def gram(dtype: str = "bfloat16", branches: int = 2, momentum: bool = False, channels_last: bool = False) -> Launch:
    """The pass over the model's output that guidance computes its weights from."""
    from fastcfg.kernels.gram import partial_shape

    batch, channels, *rest = SHAPE
    output = _tensor(branches * batch, 2 * channels, *rest, dtype=dtype, channels_last=channels_last)
    size, h = _tensor(*SHAPE)[0].numel(), _tensor(*SHAPE) if momentum else None
    memory = _tensor(*partial_shape(branches + momentum, batch, size))
    arguments = (output, size, size // channels, 1, 0, h, -0.5, memory)
    return _launch("gram", branches * output.itemsize + 8 * momentum, *arguments, launcher="launch_gram_partial")


def gram_sum() -> Launch:
    """The sum over that pass's blocks; bytes are per number."""
    arguments = (_tensor(64, 12, 2, 3), _tensor(64, 2, 3, dtype="float64"))
    return _launch("gram", 4, *arguments, launcher="launch_gram_sum", kernel="_gram_sum_kernel")


def combine(
    shape: tuple[int, ...] = SHAPE, dtype: str = "float32", inputs: int = 2, outputs: int = 2, learned: bool = False
) -> Launch:
    """Sums of all inputs and a clipped x0; with learned variance the model's output has 2C channels."""
    from fastcfg.kernels.combine import SIZE, combine_options

    noise = inputs - 1 if learned else None
    ones = np.full((outputs, inputs), 0.5)
    combination = Combination(ones, ones[0], ones[:, 0], clip=1.0, noise=noise)
    sums = [combination.sum_of(j) for j in range(outputs)]
    options = combine_options(inputs, sums, combination.sum_of_x0(), True, False, noise)
    given, results = ([_tensor(*shape, dtype=dtype) for _ in range(n)] for n in (inputs, outputs))
    variance = None
    if learned:
        wide = _tensor(shape[0], 2 * shape[1], *shape[2:], dtype=dtype)
        given[1], variance = wide.split(shape[1], dim=1)
    size = (inputs + learned + outputs) * given[0].itemsize
    return _launch("combine", size, given, None, variance, results, _tensor(SIZE), options)


def state_change(
    shape: tuple[int, ...] = SHAPE, dtype: str = "bfloat16", channels_last: bool = False, **fields: Any
) -> Launch:
    """A change of the state between two rows, for two branches.

    Args:
        shape, dtype, channels_last: as `step`.
        **fields: of the `StateSpec`.
    """
    spec, image, batch = StateSpec(**fields), _tensor(*shape), shape[0]
    model_input = _tensor(2 * batch, *shape[1:], dtype=dtype, channels_last=channels_last)
    given = _given(shape, 2)
    del given["weights"], given["x0"]
    seeds, time = _tensor(batch, dtype="int64"), _tensor(2 * batch, dtype="int64")
    buffers = StepBuffers(**given, seeds=seeds, model_input=model_input, time=time)
    known = KnownBuffers(image, image, _tensor(50, 5), image, image) if spec.known else None
    size = 8 + 8 * spec.known + 2 * model_input.dtype.itemsize
    return _launch("state_change", size, _tensor(*shape), spec, buffers, known)


def finite(dtype: str = "bfloat16") -> Launch:
    """The check of a row of two branches, with variance channels, for NaN and infinity."""
    batch, channels, *rest = SHAPE
    output = _tensor(2 * batch, 2 * channels, *rest, dtype=dtype)
    counter, sources = _tensor(2, dtype="int32"), _tensor(3, dtype="int32")
    record = _tensor(1, dtype="int64")
    return _launch("finite", 4 + 4 * output.itemsize, output, _tensor(*SHAPE), counter, sources, record, 1)


def noise_sums(dtype: str = "bfloat16", drawn: bool = True, learned: bool = True) -> Launch:
    """The sums that log-probabilities are made of, for two branches with variance channels."""
    batch, channels, *rest = SHAPE
    output = _tensor(2 * batch, 2 * channels, *rest, dtype=dtype)
    noise, seeds = (None, _tensor(batch, dtype="int64")) if drawn else (_tensor(*SHAPE), None)
    memory = _tensor(50, 2, batch, -(-_tensor(*SHAPE)[0].numel() // 2048))
    arguments = (output, noise, seeds, _tensor(2, dtype="int32"), memory, channels, 0, learned)
    return _launch("noise_sums", 4 * (not drawn) + output.itemsize * learned, *arguments)


# Two branches, learned variance, clip and in-kernel noise unless the name says otherwise.
_CFG: dict[str, Any] = {"branches": 2, "base": 1}
_MAIN: dict[str, Any] = {**_CFG, "learned_variance": True, "clip": True, "noise_source": "philox"}
_ALL = {**_MAIN, "unconditional": 1, "raw_output": True, "gradient": True, "history": 3, "keep_x0": True}

VARIANTS: dict[str, Callable[[], Launch]] = {
    "main": partial(step, **_MAIN),
    "block-1024": partial(step, (32, 3, 64, 64), **_MAIN),
    "block-512": partial(step, (1, 3, 64, 64), **_MAIN),
    "noise-tensor": partial(step, **_MAIN | {"noise_source": "tensor"}),
    "fixed-variance": partial(step, **_MAIN | {"learned_variance": False}),
    "ddim": partial(step, **_CFG, clip=True),
    "fp16": partial(step, dtype="float16", **_MAIN),
    "fp32": partial(step, dtype="float32", **_MAIN),
    "k3": partial(step, **_MAIN | {"branches": 3, "base": 2}),
    "history-3": partial(step, **_CFG, history=3),
    "no-x0": partial(step, **_CFG, history=1, saves_states=True, raw_output=True, predict_x0=False),
    "gradient": partial(step, **_MAIN, gradient=True),
    "x0": partial(step, **_MAIN, keep_x0=True),
    "rescale": partial(step, **_MAIN, rescale=True),
    "scaled": partial(step, **_MAIN, scaled=True),
    "momentum": partial(step, **_MAIN, scaled=True, momentum=True),
    "by-channel": partial(step, **_MAIN, weights_by="channel"),
    "by-element": partial(step, **_MAIN, weights_by="element"),
    "k3-by-element": partial(step, **_MAIN | {"branches": 3, "base": 2}, weights_by="element"),
    "channels-last-by-channel": partial(step, channels_last=True, **_MAIN, weights_by="channel"),
    "all-terms": partial(step, **_ALL),
    "one-sample": partial(step, (1, 3, 64, 64), **_ALL),
    "one-element": partial(step, (1, 1, 1), **_ALL),
    "channels-last": partial(step, channels_last=True, **_MAIN),
    "odd-size": partial(step, (64, 3, 63, 65), **_MAIN),
    "starting-noise": starting_noise,
    "brownian": brownian,
    "split-piece": split_piece,
    "blend-piece": blend_piece,
    "x0-piece": x0_piece,
    "posterior-piece": posterior_piece,
    "threshold-piece": threshold_piece,
    "step-bound": step_bound,
    "step-bound-one": partial(step_bound, (1, 3, 64, 64), "float32", channels_last=True),
    "gram": gram,
    "gram-k3-momentum": partial(gram, branches=3, momentum=True),
    "gram-channels-last": partial(gram, "float32", channels_last=True),
    "gram-sum": gram_sum,
    "quantile-first": partial(quantile_pass, 0),
    "quantile-pass": partial(quantile_pass, 1),
    "quantile-last": partial(quantile_pass, 3),
    "state-change": state_change,
    "known-pixels": partial(state_change, known=True, noise=FRESH_STREAM),
    "known-pixels-all": partial(
        state_change, known=True, hard=True, before=True, noise=FRESH_STREAM, renoise=RENOISE_STREAM
    ),
    "known-pixels-channels-last": partial(state_change, (1, 3, 64, 64), known=True, channels_last=True, noise=0),
    "finite": finite,
    "noise-sums": noise_sums,
    "noise-sums-tensor": partial(noise_sums, drawn=False, learned=False),
    "combine": combine,
    "combine-all": partial(combine, inputs=8, outputs=4, learned=True),
    "combine-all-bf16": partial(combine, dtype="bfloat16", inputs=8, outputs=4, learned=True),
    "combine-one-sample": partial(combine, (1, 3, 64, 64)),
}

# Some of them in the dtypes that those leave out: for the table, not for the tests.
_OTHERS = ("noise-tensor", "fixed-variance", "ddim", "history-3", "gradient", "split-piece", "blend-piece", "x0-piece")
BY_DTYPE: dict[str, Callable[[], Launch]] = {
    f"{name}-{short}": partial(VARIANTS[name], dtype=dtype)
    for name in (*_OTHERS, "posterior-piece", "step-bound", "gram")
    for short, dtype in (("fp16", "float16"), ("fp32", "float32"))
}
