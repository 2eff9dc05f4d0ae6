"""The memory of a run and the programs that work on it, for one shape and one set of options."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .conditioning import Conditioning
from .graphs import CudaGraph, Program, StandIn
from .guidance import Guidance, GuidancePlan
from .hooks import ClassifierGradient, DenoisedOutput
from .ops import GuidedStep, QuantileBound
from .step import StepBuffers, StepSpec
from .table import COLUMNS, StepTable
from .threshold import DynamicThreshold

__all__ = ["Workspace"]


class Workspace:
    """Static buffers, and for every set of branches that some row evaluates the program "model call, then fused step",
    with dynamic thresholding the bound of x0 between the two.

    Args:
        model: as `Sampler`.
        table: the solver's table.
        guidance: the guidance spec.
        plan: its plan for this table and batch.
        shape: (B, C, ...).
        conditioning: an example of the conditioning; later ones of the same signature are loaded with `load`.
        given: the conditioning as the caller gave it, for cond_fn.
        denoised_fn: as `Sampler`.
        cond_fn: as `Sampler`.
        clip: whether x0 is clipped to bounds that `load` is given.
        threshold: dynamic thresholding, instead of clip.
        noise: "none", "tensor" or "philox".
        keep_x0: whether x0 is kept for callbacks.
        backend: "triton", "inductor" or "reference".
        capture: whether programs are captured ("always", "try" or "never").
        dtype: of the model input.
        state_dtype: of the state.
        device: of everything.
        memory_format: of the model input.
        pool: memory pool of CUDA graphs.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: Callable[..., Any],
        table: StepTable,
        guidance: Guidance,
        plan: GuidancePlan,
        shape: tuple[int, ...],
        conditioning: Conditioning,
        *,
        given: Conditioning,
        denoised_fn: Callable[[Tensor], Tensor] | None,
        cond_fn: Callable[..., Tensor] | None,
        clip: bool,
        threshold: DynamicThreshold | None,
        noise: str,
        keep_x0: bool,
        backend: str,
        capture: str,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        device: torch.device,
        memory_format: torch.memory_format,
        pool: Any = None,
    ) -> None:
        batch, rows = shape[0], table.num_rows
        slots = max(len(active) for active in plan.active)
        self._c_in, self._t = float(table["c_in"][0]), float(table["t"][0])

        def state(*size: int) -> Tensor:
            return torch.zeros(size, dtype=state_dtype, device=device)

        self.buffers = StepBuffers(
            x=state(*shape),
            table=table.on(device, state_dtype),
            counter=torch.zeros(2, dtype=torch.int32, device=device),
            bound=state(batch) if clip or threshold else None,
            noise=state(*shape) if noise == "tensor" else None,
            seeds=torch.zeros(batch, dtype=torch.int64, device=device),
            history=state(table.num_history + 1, *shape) if table.num_history else None,
            gradient=state(*shape) if cond_fn is not None else None,
            x0=state(*shape) if keep_x0 or threshold else None,
            model_input=torch.zeros((slots * batch, *shape[1:]), dtype=dtype, device=device).contiguous(
                memory_format=memory_format
            ),
            time=torch.zeros(slots * batch, dtype=torch.int64 if table.integer_time else torch.float32, device=device),
        )
        self._branches = {
            active: _BranchSet(active, conditioning, state(rows, batch, len(active)))
            for active in dict.fromkeys(plan.active)
        }
        self._conditional = guidance.conditional
        self._given = given.allocate(1) if cond_fn is not None else {}
        self.load(conditioning, plan, None, given)
        gradient = None
        if cond_fn is not None:
            gradient = ClassifierGradient(cond_fn, self.buffers, {**self._given, **given.shared})

        programs: dict[tuple[int, ...], Program] = {}
        self.graph, self.graph_reason = "none", "the device is a CPU" if capture == "never" else ""
        for active, branch_set in self._branches.items():
            spec = _spec(active, table, guidance, clip, threshold, noise, keep_x0, cond_fn is not None)
            buffers, denoised = replace(self.buffers, weights=branch_set.weights), None
            if denoised_fn is not None:
                denoised = DenoisedOutput(denoised_fn, spec, buffers, backend)
                spec = replace(spec, branches=1, base=None, conditional=0)
                buffers = replace(buffers, weights=None, table=_takes_x0(table).on(device, state_dtype))
            bound = QuantileBound(threshold, spec, buffers, backend) if threshold else None
            step = GuidedStep(spec, buffers, backend)
            program = self._program(model, denoised, bound, gradient, step, branch_set, conditioning)
            programs[active] = self._captured(program, capture, pool)
        self.active = plan.active
        self.programs = [programs[active] for active in plan.active]

    def load(self, conditioning: Conditioning, plan: GuidancePlan, bound: Tensor | None, given: Conditioning) -> None:
        """Copy a call's conditioning, guidance weights and clip bounds into the static buffers."""
        if self._given:
            given.copy_to(self._given, (self._conditional,))
        weights = torch.from_numpy(plan.weights)
        for active, branch_set in self._branches.items():
            branch_set.weights.copy_(weights[:, :, list(active)])
            conditioning.copy_to(branch_set.packed, active)
        if bound is not None:
            self.buffers.bound.copy_(bound)  # type: ignore[union-attr]

    def rewind(self) -> None:
        """Make the first row the next, from the state now in `buffers.x`."""
        buffers = self.buffers
        buffers.counter.zero_()
        if buffers.history is not None:
            # Rows multiply tensors they do not use by 0, and 0 times the infinity of an earlier run is not 0.
            buffers.history.zero_()
        slots = buffers.model_input.unflatten(0, (-1, len(buffers.x)))  # type: ignore[union-attr]
        slots.copy_((buffers.x * self._c_in).expand_as(slots))
        buffers.time.fill_(self._t)  # type: ignore[union-attr]

    def nbytes(self) -> int:
        """Bytes of the static buffers."""
        tensors = [value for value in vars(self.buffers).values() if value is not None]
        tensors += self._given.values()
        for branch_set in self._branches.values():
            tensors += [branch_set.weights, *branch_set.packed.values()]
        return sum(tensor.nbytes for tensor in tensors)

    def _program(
        self,
        model: Callable[..., Any],
        denoised: DenoisedOutput | None,
        bound: QuantileBound | None,
        gradient: ClassifierGradient | None,
        step: GuidedStep,
        branch_set: _BranchSet,
        conditioning: Conditioning,
    ) -> Program:
        rows = len(branch_set.active) * len(self.buffers.x)
        # Every slot holds the same input, so any subset of the branches takes the first ones.
        model_input, time = self.buffers.model_input[:rows], self.buffers.time[:rows]  # type: ignore[index]
        keywords = {**branch_set.packed, **conditioning.shared}

        # Memory that the model or the step allocates in inference mode could not be written to outside it later.
        @torch.inference_mode(False)
        @torch.no_grad()
        def program() -> None:
            output = model(model_input, time, **keywords)
            output = output[0] if isinstance(output, tuple) else output
            if denoised is not None:
                output = denoised(output)
            if bound is not None:
                bound(output)
            if gradient is not None:
                gradient()
            step(output)

        return program

    def _captured(self, program: Program, capture: str, pool: Any) -> Program:
        if capture == "never":
            return program
        self.rewind()
        if self.buffers.x.device.type != "cuda":
            self.graph = "stand-in"
            return StandIn(program)
        try:
            graph = CudaGraph(program, pool, before=self.rewind)
        except RuntimeError as error:
            if capture == "always":
                raise
            self.graph, self.graph_reason = "none", f"capture failed: {error}"
            warnings.warn(f"running eagerly: the model could not be captured in a CUDA graph ({error})", stacklevel=2)
            return program
        self.graph = "cuda"
        return graph


class _BranchSet:
    """The branches some row evaluates, with their blend weights [R, B, n] and packed conditioning."""

    def __init__(self, active: tuple[int, ...], conditioning: Conditioning, weights: Tensor) -> None:
        self.active = active
        self.weights = weights
        self.packed = conditioning.allocate(len(active))


def _spec(
    active: tuple[int, ...],
    table: StepTable,
    guidance: Guidance,
    clip: bool,
    threshold: DynamicThreshold | None,
    noise: str,
    keep_x0: bool,
    gradient: bool,
) -> StepSpec:
    def position(branch: int | None) -> int | None:
        return active.index(branch) if branch in active else None

    return StepSpec(
        branches=len(active),
        base=position(guidance.base) if len(active) > 1 else None,
        conditional=position(guidance.conditional) or 0,
        unconditional=position(guidance.unconditional) if table.uses_unconditional else None,
        learned_variance=table.learned_variance,
        raw_output=table.uses_raw_output,
        gradient=gradient,
        history=table.num_history,
        clip=clip or threshold is not None,
        rescale=threshold is not None,
        noise=noise,
        keep_x0=keep_x0,
    )


def _takes_x0(table: StepTable) -> StepTable:
    """The same solver for a model output that is x0 already."""
    rows = table.rows.copy()
    rows[:, COLUMNS.index("p_x")], rows[:, COLUMNS.index("p_m")] = 0, 1
    return replace(table, rows=rows)
