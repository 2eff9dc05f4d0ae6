"""The fused step bound to the buffers of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from ..reference import ReferenceStep
from ..step import StepBuffers, StepSpec
from ..utils._torch_private import current_dispatch_mode
from .backend import interpreting, resolve_backend
from .checks import check_buffers, check_output, check_spec, readable
from .inductor import InductorStep
from .native import NativeStep, has_native_step


class RowOperation:
    """An operation on a run's buffers, called with the model's output of a row. Nothing is read back to the host.

    The subclass's constructor checks spec and buffers, once, and sets `backend` and `_run`, which a call outside
    `torch.compile` runs.
    """

    backend: str
    _run: Callable[[Tensor], None]

    def __init__(self, spec: StepSpec, buffers: StepBuffers) -> None:
        self.spec, self.buffers = spec, buffers
        self._checked: tuple[object, ...] = ()

    def __call__(self, output: Tensor) -> None:
        """Run on the buffers, in place.

        Args:
            output: [K*B, C, ...], or [K*B, 2C, ...] with variance channels as the second half, float32, float16 or
                bfloat16 (float64 on the reference path). Contiguous and channels-last outputs are read as they are,
                others are copied first. ValueError for another shape, dtype or device.
        """
        compiling = torch.compiler.is_compiling()
        signature = (output.shape, output.dtype, output.device)
        if compiling or signature != self._checked:
            check_output(output, self.spec, self.buffers)
            if not compiling:
                self._checked = signature
        output = readable(output)
        if self._is_watched(compiling):
            self._dispatched(output)
        else:
            self._run(output)

    def _is_watched(self, compiling: bool) -> bool:
        """Whether the launch has to pass through the dispatcher: torch.compile must see that of a kernel."""
        return compiling and self.backend == "triton"

    def _dispatched(self, output: Tensor) -> None:
        raise NotImplementedError


class GuidedStep(RowOperation):
    """The fused step bound to its buffers: calling it with the model's output advances the run by one row, in place.

    The backend is "auto", "triton", "inductor", "native" (on CPUs; the reference runs what it has no kernel for) or
    "reference". ValueError for buffers that do not fit the spec in shape, dtype, device or layout, and for a backend
    that cannot run.

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
        check_spec(spec)
        check_buffers(spec, buffers)
        super().__init__(spec, buffers)
        self.backend = resolve_backend(backend, buffers.x.device, buffers.table.dtype)
        if self.backend == "inductor" and buffers.source is not None:
            raise ValueError("backend: got 'inductor' with a source, expected 'triton' or 'reference'")
        if self.backend == "native" and not has_native_step(spec, buffers):
            self.backend = "reference"
        if self.backend == "reference":
            self._run = ReferenceStep(spec, buffers)
        elif self.backend == "inductor":
            self._run = InductorStep(spec, buffers)
        elif self.backend == "native":
            self._run = NativeStep(spec, buffers)
        elif interpreting():
            # The dispatcher sees the launch, so that the stand-in for graphs can record it.
            self._run = self._dispatched
        else:
            self._run = self._launched

    def move(self, source: Tensor, x: Tensor, x0: Tensor | None = None, noise: Tensor | None = None) -> None:
        """Have the next row read and write other tensors, which must be like the first ones; only for a step with a
        `source`. Unchecked: checks would cost more than the launch."""
        buffers = self.buffers
        buffers.source, buffers.x, buffers.x0, buffers.noise = source, x, x0, noise

    def _is_watched(self, compiling: bool) -> bool:
        # A dispatch mode (the stand-in for graphs) cannot look into Inductor's code and must see the call itself.
        if self.backend == "inductor":
            return not compiling and current_dispatch_mode() is not None
        if self.backend == "native":
            return compiling or current_dispatch_mode() is not None
        return super()._is_watched(compiling)

    def _launched(self, output: Tensor) -> None:
        _launch(output, self.spec, self.buffers, self.backend)

    def _dispatched(self, output: Tensor) -> None:
        tensors = [getattr(self.buffers, name) for name in _BUFFERS]
        options = [getattr(self.spec, name) for name in _OPTIONS]
        _guided_step_op(output, *tensors, *options, self.backend)


def guided_step(output: Tensor, spec: StepSpec, buffers: StepBuffers, backend: str = "auto") -> None:
    """One fused step in place: `GuidedStep(spec, buffers, backend)(output)`, for callers that keep no step."""
    GuidedStep(spec, buffers, backend)(output)


def _launch(output: Tensor, spec: StepSpec, buffers: StepBuffers, backend: str) -> None:
    if backend == "inductor":
        InductorStep(spec, buffers)(output)
        return
    if backend == "native":
        NativeStep(spec, buffers)(output)
        return
    from ..kernels.guided_step import launch_guided_step

    with torch.cuda.device_of(output):
        launch_guided_step(output, spec, buffers)


# The arguments of the registered operation: the output, the fields of StepBuffers and of StepSpec, and the backend.
_BUFFERS = tuple(field.name for field in fields(StepBuffers))
_OPTIONS = tuple(field.name for field in fields(StepSpec))
_WRITTEN = ("x", "counter", "history", "x0", "model_input", "time")


def _schema() -> str:
    arguments = ["Tensor output"]
    for number, field in enumerate(fields(StepBuffers)):
        alias = f"(a{number}!)" if field.name in _WRITTEN else ""
        arguments.append(f"Tensor{alias}{'?' if 'None' in str(field.type) else ''} {field.name}")
    # Prefixed: both have a momentum, a gradient and a history.
    arguments += [f"{str(field.type).replace(' | None', '?')} spec_{field.name}" for field in fields(StepSpec)]
    return f"({', '.join(arguments)}, str backend) -> ()"


def _run_registered(output: Tensor, *arguments: object) -> None:
    *given, backend = arguments
    tensors, options = given[: len(_BUFFERS)], given[len(_BUFFERS) :]
    _launch(output, StepSpec(*options), StepBuffers(*tensors), str(backend))  # type: ignore[arg-type]


_guided_step_op = torch.library.custom_op(
    "fastcfg::guided_step", _run_registered, mutates_args=_WRITTEN, schema=_schema()
)
