"""The fused step bound to the buffers of a run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference import ReferenceStep
from ..step import StepBuffers, StepSpec
from ..utils._torch_private import current_dispatch_mode
from .backend import interpreting, resolve_backend
from .checks import check_buffers, check_output, check_spec, is_channels_last
from .inductor import InductorStep


class GuidedStep:
    """The fused step bound to its buffers: calling it with the model's output advances a run by one row, in place.

    Everything but the output is checked once, here; nothing is read back to the host.

    Args:
        spec: which terms exist.
        buffers: the run's tensors, written in place.
        backend: "auto", "triton", "inductor" or "reference".

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
        check_spec(spec)
        check_buffers(spec, buffers)
        self.spec, self.buffers = spec, buffers
        self.backend = resolve_backend(backend, buffers.x.device, buffers.table.dtype)
        if self.backend == "inductor" and buffers.source is not None:
            raise ValueError("backend: got 'inductor' with a source, expected 'triton' or 'reference'")
        self._run: Callable[[Tensor], None]
        if self.backend == "reference":
            self._run = ReferenceStep(spec, buffers)
        elif self.backend == "inductor":
            self._run = InductorStep(spec, buffers)
        elif interpreting():
            # The dispatcher sees the launch, so that the stand-in for graphs can record it.
            self._run = self._dispatched
        else:
            self._run = self._launched
        self._checked: tuple[object, ...] = ()

    def move(self, source: Tensor, x: Tensor, x0: Tensor | None = None, noise: Tensor | None = None) -> None:
        """Let the next row read and write other tensors: a step that has a `source` only. They must be like those that
        it was made with; only a dispatch is what they may cost, so nobody checks."""
        buffers = self.buffers
        buffers.source, buffers.x, buffers.x0, buffers.noise = source, x, x0, noise

    def __call__(self, output: Tensor) -> None:
        """Advance by one row.

        Args:
            output: [K*B, C, ...] or [K*B, 2C, ...] (then the second half are variance channels), float32, float16,
                bfloat16 (or float64 on the reference path). Contiguous and channels-last are read as they are, anything
                else is copied first.

        Raises:
            ValueError: another shape, dtype or device.
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
        """Whether somebody must see the launch: torch.compile that of a kernel, a dispatch mode (the stand-in for
        graphs) that of compiled code."""
        if self.backend == "inductor":
            return not compiling and current_dispatch_mode() is not None
        return compiling and self.backend == "triton"

    def _launched(self, output: Tensor) -> None:
        _launch(output, self.spec, self.buffers, self.backend)

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
            buffers.gradient,
            buffers.momentum,
            buffers.x0,
            buffers.model_input,
            buffers.time,
            buffers.source,
            spec.branches,
            -1 if spec.base is None else spec.base,
            spec.conditional,
            -1 if spec.unconditional is None else spec.unconditional,
            spec.scaled,
            spec.momentum,
            spec.learned_variance,
            spec.predict_x0,
            spec.raw_output,
            spec.gradient,
            spec.history,
            spec.saves_states,
            spec.clip,
            spec.rescale,
            spec.noise,
            spec.keep_x0,
            self.backend,
        )


def readable(output: Tensor) -> Tensor:
    """The output without its gradient, in a layout that the kernels read."""
    if output.requires_grad:
        output = output.detach()
    return output if output.is_contiguous() or is_channels_last(output) else output.contiguous()


def guided_step(output: Tensor, spec: StepSpec, buffers: StepBuffers, backend: str = "auto") -> None:
    """One fused step in place: `GuidedStep(spec, buffers, backend)(output)`, for callers that keep no step."""
    GuidedStep(spec, buffers, backend)(output)


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
    gradient: Tensor | None,
    momentum: Tensor | None,
    x0: Tensor | None,
    model_input: Tensor | None,
    time: Tensor | None,
    source: Tensor | None,
    branches: int,
    base: int,
    conditional: int,
    unconditional: int,
    scaled: bool,
    with_momentum: bool,
    learned_variance: bool,
    predict_x0: bool,
    raw_output: bool,
    classified: bool,
    saved: int,
    saves_states: bool,
    clip: bool,
    rescale: bool,
    noise_kind: str,
    keep_x0: bool,
    backend: str,
) -> None:
    """`_launch` for the dispatcher; -1 stands for no branch."""
    spec = StepSpec(
        branches,
        None if base < 0 else base,
        conditional,
        None if unconditional < 0 else unconditional,
        scaled,
        with_momentum,
        learned_variance,
        predict_x0,
        raw_output,
        classified,
        saved,
        saves_states,
        clip,
        rescale,
        noise_kind,
        keep_x0,
    )
    run = (x, table, counter, weights, bound, noise, seeds, history, gradient, momentum, x0, model_input, time, source)
    _launch(output, spec, StepBuffers(*run), backend)


def _launch(output: Tensor, spec: StepSpec, buffers: StepBuffers, backend: str) -> None:
    if backend == "inductor":
        InductorStep(spec, buffers)(output)
        return
    from ..kernels.guided_step import launch_guided_step

    with torch.cuda.device_of(output):
        launch_guided_step(output, spec, buffers)
