"""Checks of steps and tensors: ValueError naming argument, got and expected."""

from __future__ import annotations

import torch
from torch import Tensor

from ..step import NOISE_SOURCES, WEIGHTS_BY, StepBuffers, StepSpec
from ..table import DEVICE_COLUMNS, MAX_HISTORY
from ..utils.checks import check_count, check_one_of

LOADED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LOADED = f"one of {', '.join(map(str, LOADED_DTYPES))}"


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a [B, C, ...] lies in memory as [B, ..., C], with any number of dimensions."""
    return tensor.ndim >= 3 and tensor.movedim(1, -1).is_contiguous()


def readable(output: Tensor) -> Tensor:
    """The output without its gradient, in a layout that the kernels read."""
    if output.requires_grad:
        output = output.detach()
    return output if output.is_contiguous() or is_channels_last(output) else output.contiguous()


def check_image(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Raise unless a tensor is a non-empty [B, C, ...] in a dtype that kernels load, in shape and device as `like`."""
    if tensor.ndim < 2 or not tensor.numel():
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected [B, C, ...] with at least one element")
    if tensor.dtype not in LOADED_DTYPES:
        raise ValueError(f"{name}: got {tensor.dtype}, expected {_LOADED}")
    if like is not None and (tensor.shape != like.shape or tensor.device != like.device):
        expected = f"{tuple(like.shape)} on {like.device}"
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)} on {tensor.device}, expected {expected}")


def check_spec(spec: StepSpec) -> None:
    """Raise unless a spec's attributes fit together."""
    k = spec.branches
    check_count("spec.branches", k)
    for name in ("base", "conditional", "unconditional"):
        index = getattr(spec, name)
        if index is not None and not 0 <= index < k:
            raise ValueError(f"spec.{name}: got {index}, expected a branch index below {k}")
    if (spec.scaled and spec.base is None) or (spec.momentum and k < 2):
        raise ValueError("spec: got scaled without a base or momentum without branches, expected both or neither")
    if not 0 <= spec.history <= MAX_HISTORY:
        raise ValueError(f"spec.history: got {spec.history}, expected 0 ... {MAX_HISTORY}")
    if spec.saves_states and not spec.history:
        raise ValueError("spec.saves_states: got True without history, expected saved tensors")
    if spec.rescale and not spec.clip:
        raise ValueError("spec.rescale: got True without clip, expected both")
    if spec.takes_x0 and not spec.predict_x0:
        raise ValueError("spec.predict_x0: got False, expected True: clip, gradient, keep_x0, or no raw_output take x0")
    check_one_of("spec.noise_source", spec.noise_source, NOISE_SOURCES)
    check_one_of("spec.weights_by", spec.weights_by, WEIGHTS_BY)
    if spec.weights_by != "sample" and (k < 2 or spec.scaled or spec.momentum):
        expected = "'sample' for one branch, a weighted base or momentum"
        raise ValueError(f"spec.weights_by: got {spec.weights_by!r}, expected {expected}")
    if spec.learned_variance and spec.noise_source == "none":
        raise ValueError("spec.noise_source: got 'none' with learned_variance, expected 'tensor' or 'philox'")


def check_buffers(spec: StepSpec, buffers: StepBuffers) -> None:
    """Raise unless a spec's step can run on these buffers."""
    x = buffers.x
    if x.ndim < 2 or not x.numel():
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, C, ...] with at least one element")
    state = x.dtype if buffers.source is None else buffers.table.dtype
    if state not in (torch.float32, torch.float64) or not x.is_contiguous():
        expected = "contiguous torch.float32 (or torch.float64 on the reference path)"
        raise ValueError(f"x: got {x.dtype} with strides {x.stride()}, expected {expected}")
    shape, batch, rows = tuple(x.shape), len(x), len(buffers.table) - 1
    if buffers.source is not None:
        if x.dtype not in (*LOADED_DTYPES, state):
            raise ValueError(f"x: got {x.dtype}, expected {_LOADED}")
        expect("source", buffers.source, shape, x.dtype, x.device)
    expect("table", buffers.table, (rows + 1, len(DEVICE_COLUMNS)), state, x.device)
    expect("counter", buffers.counter, (2,), torch.int32, x.device)
    weights: tuple[int, ...] = (rows, batch, spec.branches + spec.momentum)
    if spec.weights_by != "sample":
        weights += {"channel": shape[1:2], "element": shape[1:]}[spec.weights_by]
        given = buffers.weights
        if given is not None and len(given) == rows and given.stride(0) == 0:
            # One row's, which all rows read.
            given, weights = given[:1], (1, *weights[1:])
        expect("weights", given, weights, state, x.device)
    needed = {
        "weights": (spec.branches > 1 and spec.weights_by == "sample", weights, state),
        "bound": (spec.clip, (batch,), state),
        "noise": (spec.noise_source == "tensor", shape, x.dtype),
        "seeds": (spec.noise_source == "philox", (batch,), torch.int64),
        "momentum": (spec.momentum, shape, state),
        "gradient": (spec.gradient, shape, state),
        "history": (spec.history > 0, (spec.history + 1, *shape), state),
        "x0": (spec.keep_x0, shape, x.dtype),
    }
    for name, (is_needed, want, dtype) in needed.items():
        if is_needed:
            expect(name, getattr(buffers, name), want, dtype, x.device)
    if buffers.model_input is not None:
        _check_model_input(buffers.model_input, buffers.time, x)


def _check_model_input(model_input: Tensor, time: Tensor | None, x: Tensor) -> None:
    rows = len(model_input)
    if not rows or rows % len(x) or model_input.shape[1:] != x.shape[1:] or model_input.device != x.device:
        expected = f"[S*{len(x)}, {', '.join(map(str, x.shape[1:]))}] on {x.device}"
        raise ValueError(f"model_input: got {tuple(model_input.shape)} on {model_input.device}, expected {expected}")
    if not model_input.dtype.is_floating_point:
        raise ValueError(f"model_input: got {model_input.dtype}, expected a floating dtype")
    if not model_input.is_contiguous() and not is_channels_last(model_input):
        raise ValueError(f"model_input: got strides {model_input.stride()}, expected contiguous or channels-last")
    if time is None or time.shape != (rows,) or time.device != x.device or not time.is_contiguous():
        got = None if time is None else (tuple(time.shape), time.device)
        raise ValueError(f"time: got {got}, expected [{rows}] on {x.device}")
    if time.dtype != torch.int64 and not time.dtype.is_floating_point:
        raise ValueError(f"time: got {time.dtype}, expected torch.int64 or a floating dtype")


def check_output(output: Tensor, spec: StepSpec, buffers: StepBuffers) -> None:
    """Raise unless a tensor is the model's output for these buffers."""
    x = buffers.x
    batch, channels = x.shape[:2]
    narrow, wide = ((spec.branches * batch, c, *x.shape[2:]) for c in (channels, 2 * channels))
    allowed = (wide,) if spec.learned_variance else (narrow, wide)
    if tuple(output.shape) not in allowed:
        expected = " or ".join(map(str, allowed)) + " (the solver uses learned variances)" * spec.learned_variance
        raise ValueError(f"model output: got shape {tuple(output.shape)}, expected {expected}")
    state = buffers.table.dtype
    if not output.dtype.is_floating_point or output.dtype.itemsize > state.itemsize:
        expected = f"a floating dtype no wider than the state's {state}"
        raise ValueError(f"model output: got {output.dtype}, expected {expected}")
    if output.device != x.device:
        raise ValueError(f"model output: got device {output.device}, expected {x.device}")


def expect(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless a tensor is contiguous, of this shape, dtype and device."""
    if tensor is None:
        raise ValueError(f"{name}: got None, expected {dtype} {shape}")
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        got = f"{' non-contiguous' * (not tensor.is_contiguous())} {tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name}: got{got} on {tensor.device}, expected {dtype} {shape} on {device}")
