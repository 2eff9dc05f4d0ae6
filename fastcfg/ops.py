"""The public operations: validate, then dispatch to the kernels or to the reference. The only importer of
`fastcfg.kernels`.

Eager calls launch directly; under `torch.compile` they go through `torch.library`, whose boundary costs more host time
than a small kernel runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .noise import INITIAL_STREAM, philox_normal
from .reference import ReferenceStep
from .step import NOISES, StepBuffers, StepSpec
from .table import COLUMNS, MAX_HISTORY

__all__ = ["BACKENDS", "GuidedStep", "guided_step", "initial_noise", "resolve_backend"]

BACKENDS = ("auto", "triton", "reference")


def resolve_backend(backend: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that runs: "triton" or "reference".

    Args:
        backend: "auto" takes Triton on a GPU for a float32 state and the reference elsewhere; a backend asked for by
            name must work or raise.
        device: where the state lives.
        dtype: the state's dtype.

    Raises:
        ValueError: unknown backend, or Triton asked for where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    problem = triton_problem(torch.device(device), dtype)
    if backend == "triton" and problem:
        raise ValueError(f"backend: 'triton' cannot run here: {problem}")
    if backend == "auto":
        # The interpreter is for tests; nobody means it by "auto".
        return "reference" if problem or torch.device(device).type == "cpu" else "triton"
    return backend


def triton_problem(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Why the kernels cannot run on this device with a state of this dtype; empty if they can."""
    if not _has_triton():
        return "the package triton is not installed"
    if dtype != torch.float32:
        return f"the state is {dtype}, the kernels compute in torch.float32"
    if device.type == "cpu" and not _interpreting():
        return "the device is a CPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly)"
    if device.type not in ("cpu", "cuda"):
        return f"no kernels for device type {device.type!r}"
    return ""


@cache
def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


class GuidedStep:
    """The fused step bound to its buffers: calling it with the model's output advances a run by one row, in place.

    Everything but the output is checked once, here; nothing is read back to the host.

    Args:
        spec: which terms exist.
        buffers: the run's tensors, written in place.
        backend: "auto", "triton" or "reference".

    Raises:
        ValueError: buffers whose shape, dtype, device or layout does not fit the spec, or a backend that cannot run.

    Example:
        >>> from fastcfg import CFG, Schedule, solvers
        >>> table = solvers.ddim(Schedule.named("linear").respace(10))
        >>> x = torch.randn(2, 3, 8, 8)
        >>> weights = torch.tensor([3.0, 0.0]).expand(len(table), 2, 2).contiguous()
        >>> buffers = StepBuffers(x, table.on("cpu"), torch.zeros(2, dtype=torch.int32), weights=weights)
        >>> step = GuidedStep(StepSpec(branches=2, base=1), buffers)
        >>> step(torch.randn(4, 3, 8, 8))       # [cond; uncond]
        >>> int(buffers.counter[0])
        1
    """

    def __init__(self, spec: StepSpec, buffers: StepBuffers, backend: str = "auto") -> None:
        _check_spec(spec)
        _check_buffers(spec, buffers)
        self.spec, self.buffers = spec, buffers
        self.backend = resolve_backend(backend, buffers.x.device, buffers.x.dtype)
        self._run: Callable[[Tensor], None]
        if self.backend == "reference":
            self._run = ReferenceStep(spec, buffers)
        elif _interpreting():
            # The dispatcher sees the launch, so that the stand-in for graphs can record it.
            self._run = self._dispatched
        else:
            self._run = self._launch
        self._checked: tuple[object, ...] = ()

    def __call__(self, output: Tensor) -> None:
        """Advance by one row.

        Args:
            output: [K*B, C, ...] or [K*B, 2C, ...] (then the second half are variance channels), float32, float16,
                bfloat16 (or float64 on the reference path). Contiguous and channels-last are read as they are, anything
                else is copied first.

        Raises:
            ValueError: another shape, dtype or device.
        """
        signature = (output.shape, output.dtype, output.device)
        if signature != self._checked:
            _check_output(output, self.spec, self.buffers)
            self._checked = signature
        if not output.is_contiguous() and not is_channels_last(output):
            output = output.contiguous()
        if torch.compiler.is_compiling() and self.backend == "triton":
            self._dispatched(output)
        else:
            self._run(output)

    def _launch(self, output: Tensor) -> None:
        from .kernels.guided_step import launch_guided_step

        launch_guided_step(output, self.spec, self.buffers)

    def _dispatched(self, output: Tensor) -> None:
        spec, buffers = self.spec, self.buffers
        _guided_step_op(
            output,
            buffers.x,
            buffers.table,
            buffers.counter,
            buffers.weights,
            buffers.bound,
            buffers.noise,
            buffers.seeds,
            buffers.history,
            buffers.x0,
            buffers.model_input,
            buffers.time,
            spec.branches,
            -1 if spec.base is None else spec.base,
            spec.conditional,
            -1 if spec.unconditional is None else spec.unconditional,
            spec.learned_variance,
            spec.raw_output,
            spec.history,
            spec.clip,
            spec.noise,
            spec.keep_x0,
        )


def guided_step(output: Tensor, spec: StepSpec, buffers: StepBuffers, backend: str = "auto") -> None:
    """One fused step in place: `GuidedStep(spec, buffers, backend)(output)`, for callers that keep no step."""
    GuidedStep(spec, buffers, backend)(output)


def initial_noise(out: Tensor, seeds: Tensor, backend: str = "auto") -> Tensor:
    """Fill `out` with each sample's starting noise.

    Args:
        out: float32 [B, ...], contiguous.
        seeds: int64 [B] on the same device.
        backend: "auto", "triton" or "reference".

    Returns:
        `out`, standard normal; sample i depends on seeds[i] alone.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out: got {out.dtype} with strides {out.stride()}, expected contiguous torch.float32")
    _expect("seeds", seeds, (len(out),), torch.int64, out.device)
    if resolve_backend(backend, out.device) == "triton":
        from .kernels.normal import launch_normal

        launch_normal(out, seeds, 0, INITIAL_STREAM)
        return out
    return philox_normal(seeds, out.shape[1:], row=0, stream=INITIAL_STREAM, out=out)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether channels are innermost and everything else is in order: [B, ..., C] in memory, any number of
    dimensions."""
    return tensor.ndim >= 3 and tensor.movedim(1, -1).is_contiguous()


def _check_spec(spec: StepSpec) -> None:
    k = spec.branches
    if k < 1:
        raise ValueError(f"spec.branches: got {k}, expected at least 1")
    for name in ("base", "conditional", "unconditional"):
        index = getattr(spec, name)
        if index is not None and not 0 <= index < k:
            raise ValueError(f"spec.{name}: got {index}, expected a branch index below {k}")
    if not 0 <= spec.history <= MAX_HISTORY:
        raise ValueError(f"spec.history: got {spec.history}, expected 0 ... {MAX_HISTORY}")
    if spec.noise not in NOISES:
        raise ValueError(f"spec.noise: got {spec.noise!r}, expected one of {', '.join(NOISES)}")
    if spec.learned_variance and spec.noise == "none":
        raise ValueError("spec.noise: got 'none' with learned_variance, expected 'tensor' or 'philox'")


def _check_buffers(spec: StepSpec, buffers: StepBuffers) -> None:
    x = buffers.x
    if x.ndim < 3 or not x.numel():
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, C, ...] with at least one element")
    if x.dtype not in (torch.float32, torch.float64) or not x.is_contiguous():
        raise ValueError(
            f"x: got {x.dtype} with strides {x.stride()}, "
            "expected contiguous torch.float32 (or torch.float64 on the reference path)"
        )
    shape, batch = tuple(x.shape), len(x)
    rows = len(buffers.table) - 1
    _expect("table", buffers.table, (rows + 1, len(COLUMNS)), x.dtype, x.device)
    _expect("counter", buffers.counter, (2,), torch.int32, x.device)
    needed = {
        "weights": (spec.branches > 1, (rows, batch, spec.branches), x.dtype),
        "bound": (spec.clip, (batch,), x.dtype),
        "noise": (spec.noise == "tensor", shape, x.dtype),
        "seeds": (spec.noise == "philox", (batch,), torch.int64),
        "history": (spec.history > 0, (spec.history + 1, *shape), x.dtype),
        "x0": (spec.keep_x0, shape, x.dtype),
    }
    for name, (is_needed, want, dtype) in needed.items():
        if is_needed:
            _expect(name, getattr(buffers, name), want, dtype, x.device)
    if buffers.model_input is not None:
        _check_model_input(buffers)


def _check_model_input(buffers: StepBuffers) -> None:
    model_input, time, x = buffers.model_input, buffers.time, buffers.x
    rows = len(model_input)  # type: ignore[arg-type]
    if not rows or rows % len(x) or model_input.shape[1:] != x.shape[1:] or model_input.device != x.device:  # type: ignore[union-attr]
        raise ValueError(
            f"model_input: got {tuple(model_input.shape)} on {model_input.device}, "  # type: ignore[union-attr]
            f"expected [S*{len(x)}, {', '.join(map(str, x.shape[1:]))}] on {x.device}"
        )
    if not model_input.is_contiguous() and not is_channels_last(model_input):  # type: ignore[union-attr, arg-type]
        raise ValueError(f"model_input: got strides {model_input.stride()}, expected contiguous or channels-last")  # type: ignore[union-attr]
    if time is None or time.shape != (rows,) or time.device != x.device or not time.is_contiguous():
        raise ValueError(
            f"time: got {None if time is None else (tuple(time.shape), time.device)}, expected [{rows}] on {x.device}"
        )


def _check_output(output: Tensor, spec: StepSpec, buffers: StepBuffers) -> None:
    x = buffers.x
    batch, channels = x.shape[:2]
    wide = (spec.branches * batch, 2 * channels, *x.shape[2:])
    narrow = (spec.branches * batch, channels, *x.shape[2:])
    allowed = (wide,) if spec.learned_variance else (narrow, wide)
    if tuple(output.shape) not in allowed:
        reason = " (the solver uses learned variances)" if spec.learned_variance else ""
        raise ValueError(
            f"model output: got shape {tuple(output.shape)}, expected {' or '.join(map(str, allowed))}{reason}"
        )
    if not output.dtype.is_floating_point or output.dtype.itemsize > x.dtype.itemsize:
        raise ValueError(
            f"model output: got {output.dtype}, expected a floating dtype no wider than the state's {x.dtype}"
        )
    if output.device != x.device:
        raise ValueError(f"model output: got device {output.device}, expected {x.device}")


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor is None:
        raise ValueError(f"{name}: got None, expected {dtype} {shape}")
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        layout = "" if tensor.is_contiguous() else " non-contiguous"
        raise ValueError(
            f"{name}: got{layout} {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
            f"expected {dtype} {shape} on {device}"
        )


@torch.library.custom_op("fastcfg::guided_step", mutates_args=("x", "counter", "history", "x0", "model_input", "time"))
def _guided_step_op(
    output: Tensor,
    x: Tensor,
    table: Tensor,
    counter: Tensor,
    weights: Tensor | None,
    bound: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    history: Tensor | None,
    x0: Tensor | None,
    model_input: Tensor | None,
    time: Tensor | None,
    branches: int,
    base: int,
    conditional: int,
    unconditional: int,
    learned_variance: bool,
    raw_output: bool,
    saved: int,
    clip: bool,
    noise_kind: str,
    keep_x0: bool,
) -> None:
    """`launch_guided_step` for the dispatcher; -1 stands for no branch."""
    from .kernels.guided_step import launch_guided_step

    spec = StepSpec(
        branches,
        None if base < 0 else base,
        conditional,
        None if unconditional < 0 else unconditional,
        learned_variance,
        raw_output,
        saved,
        clip,
        noise_kind,
        keep_x0,
    )
    launch_guided_step(
        output, spec, StepBuffers(x, table, counter, weights, bound, noise, seeds, history, x0, model_input, time)
    )
