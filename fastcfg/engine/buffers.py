"""The memory of a run, for one shape and one set of options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..clip import DynamicThreshold
from ..guidance import GuidancePlan
from ..step import StepBuffers
from ..table import StepTable
from .branch_weights import DELAY, Agreement, Mixing, Statistics
from .conditioning import Conditioning, Same

__all__ = ["NO_CAPTURE", "BranchSet", "Options", "Workspace"]

# Values of `Options.capture` without a capture, and why there is none.
NO_CAPTURE = {"off": "graph=False", "never": "the device is a CPU"}


@dataclass(frozen=True)
class Options:
    """What memory and programs depend on beside the shapes of a call's arguments; equal options can share them.

    Attributes:
        model, denoised_fn, cond_fn, table, backend, dtype, state_dtype, device, memory_format, compile, batching: as
            `Sampler`.
        branch_models: by branch, the models of those that the model does not run.
        branches, base, conditional, unconditional: as `Guidance`.
        mix, rescale, momentum: as `GuidancePlan`.
        clip: whether x0 is clipped to bounds that `Workspace.load` is given.
        threshold: dynamic thresholding, instead of clip.
        noise: "none", "tensor" or "philox".
        keep_x0: whether x0 is kept for callbacks.
        capture: "always", "timed", or one of `NO_CAPTURE`.
        repeat: rows in one graph.
    """

    model: Same
    denoised_fn: Same
    cond_fn: Same
    branch_models: tuple[tuple[str, Same], ...]
    table: StepTable
    branches: tuple[str, ...]
    base: int | None
    conditional: int
    unconditional: int | None
    mix: Same
    rescale: float
    momentum: float | None
    clip: bool
    threshold: DynamicThreshold | None
    noise: str
    keep_x0: bool
    backend: str
    dtype: torch.dtype
    state_dtype: torch.dtype
    device: torch.device
    memory_format: torch.memory_format
    compile: str | None
    batching: str
    capture: str
    repeat: int

    def looks(self, active: tuple[int, ...]) -> bool:
        """Whether a row with these branches computes its weights from their outputs."""
        return len(active) > 1 and (self.mix.value is not None or self.rescale > 0)


class BranchSet:
    """The branches some row evaluates, with their packed conditioning and blend weights.

    Attributes:
        active: the branches.
        all_planned: [R + 2, B, P], the weights as planned; the last two rows are nobody's: see `Agreement`.
        planned: those of the run's rows.
        weights: [R, B, V], what the step reads: the same, or computed from them.
        statistics: what looks at the branches; None if nothing does.
    """

    def __init__(
        self, active: tuple[int, ...], conditioning: Conditioning, planned: Tensor, weights: Tensor | None
    ) -> None:
        self.active = active
        self.all_planned, self.planned = planned, planned[:-DELAY]
        self.weights = self.planned if weights is None else weights
        self.packed = conditioning.allocate(len(active))
        self.statistics: Statistics | None = None


class Workspace:
    """Static buffers: the state, what the model is given, and everything the step reads and writes.

    Args:
        options: of the run.
        plan: of the guidance, for the table and batch.
        shape: (B, C, ...).
        conditioning: an example of the conditioning; later ones of the same signature are loaded with `load`.
        given: the conditioning as the caller gave it, for cond_fn.

    Attributes:
        options: as given.
        buffers: of the step; `noise` is that of a graph's first row.
        noises: the noise buffers of a graph's rows.
        branch_sets: by their branches.
        agreement: with adaptive guidance, what ends it.
        shared: what the model is given as it is.
        classifier_keywords: what cond_fn is given.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        options: Options,
        plan: GuidancePlan,
        shape: tuple[int, ...],
        conditioning: Conditioning,
        given: Conditioning,
    ) -> None:
        table, batch = options.table, shape[0]
        slots = max(len(active) for active in plan.active)
        with_x0 = options.keep_x0 or options.threshold is not None
        self._c_in, self._t = table["c_in"].tolist(), table["t"].tolist()
        self._stream: Any = None

        def state(*size: int) -> Tensor:
            return torch.zeros(size, dtype=options.state_dtype, device=options.device)

        self.options = options
        self.agreement: Agreement | None = None
        self.noises = state(options.repeat, *shape) if options.noise == "tensor" else None
        self.buffers = StepBuffers(
            x=state(*shape),
            table=table.on(options.device, options.state_dtype),
            counter=torch.zeros(2, dtype=torch.int32, device=options.device),
            bound=state(batch) if options.clip or options.threshold else None,
            noise=None if self.noises is None else self.noises[0],
            seeds=torch.zeros(batch, dtype=torch.int64, device=options.device),
            history=state(table.num_history + 1, *shape) if table.num_history else None,
            gradient=state(*shape) if options.cond_fn.value is not None else None,
            momentum=state(*shape) if options.momentum is not None else None,
            x0=state(*shape) if with_x0 else None,
            model_input=torch.zeros((slots * batch, *shape[1:]), dtype=options.dtype, device=options.device).contiguous(
                memory_format=options.memory_format
            ),
            time=torch.zeros(
                slots * batch, dtype=torch.int64 if table.integer_time else torch.float32, device=options.device
            ),
        )
        sets = dict.fromkeys(plan.active) | dict.fromkeys(
            [plan.fallback_branches] if plan.agreement is not None else []
        )
        self.branch_sets = {active: self._branch_set(active, plan, conditioning) for active in sets}
        self.shared = conditioning.shared
        self._given = given.allocate(1) if options.cond_fn.value is not None else {}
        self.classifier_keywords = {**self._given, **given.shared}
        self.load(conditioning, plan, None, given)

    def load(self, conditioning: Conditioning, plan: GuidancePlan, bound: Tensor | None, given: Conditioning) -> None:
        """Copy a call's conditioning, guidance weights and clip bounds into the static buffers."""
        if self._given:
            given.copy_to(self._given, (self.options.conditional,))
        for active, branch_set in self.branch_sets.items():
            branch_set.planned.copy_(torch.from_numpy(self._planned(plan, active)))
            conditioning.copy_to(branch_set.packed, active)
        if bound is not None:
            self.buffers.bound.copy_(bound)  # type: ignore[union-attr]

    def begin(self, row: int = 0) -> None:
        """Make a row the next, from the state now in `buffers.x`."""
        buffers = self.buffers
        buffers.counter.zero_()
        buffers.counter[0].fill_(row)
        if buffers.history is not None:
            # Rows multiply tensors they do not use by 0, and 0 times the infinity of an earlier run is not 0.
            buffers.history.zero_()
        if buffers.momentum is not None:
            buffers.momentum.zero_()
        slots = buffers.model_input.unflatten(0, (-1, len(buffers.x)))  # type: ignore[union-attr]
        slots.copy_((buffers.x * self._c_in[row]).expand_as(slots))
        buffers.time.fill_(self._t[row])  # type: ignore[union-attr]
        if self.agreement is not None:
            self.agreement.reset()

    def rehearse(self, row: int) -> None:
        """Make a row the next, from a state that is always the same."""
        x = self.buffers.x
        torch.linspace(-1, 1, x.numel(), out=x.view(-1))
        self.begin(row)

    def enter_stream(self) -> None:
        """Let the current stream use the buffers, after the one that used them last."""
        if self.options.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.options.device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
            for tensor in self._tensors():
                tensor.record_stream(stream)
        self._stream = stream

    def nbytes(self) -> int:
        """Bytes of the static buffers."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        buffers = replace(self.buffers, noise=self.noises)
        tensors = [value for value in vars(buffers).values() if value is not None]
        tensors += self._given.values()
        for branch_set in self.branch_sets.values():
            weights = [] if branch_set.weights is branch_set.planned else [branch_set.weights]
            tensors += [branch_set.all_planned, *weights, *branch_set.packed.values()]
        return tensors

    def _planned(self, plan: GuidancePlan, active: tuple[int, ...]) -> NDArray[np.float64]:
        """[R, B, P]: the plan of some branches."""
        if not self.options.looks(active):
            return plan.weights[:, :, list(active)]
        planned: NDArray[np.float64] = plan.planned  # type: ignore[assignment]
        return planned[:, :, [*active, *range(len(self.options.branches), planned.shape[2])]]

    def _branch_set(self, active: tuple[int, ...], plan: GuidancePlan, conditioning: Conditioning) -> BranchSet:
        options, looks = self.options, self.options.looks(active)
        rows, batch, columns = self._planned(plan, active).shape
        dtype, device = options.state_dtype, options.device
        planned = torch.zeros((rows + DELAY, batch, columns), dtype=torch.float64 if looks else dtype, device=device)
        vectors = len(active) + (options.momentum is not None)
        weights = torch.zeros((rows, batch, vectors), dtype=dtype, device=device) if looks else None
        branch_set = BranchSet(active, conditioning, planned, weights)
        if looks or (len(active) > 1 and plan.agreement is not None):
            branch_set.statistics = self._statistics(branch_set, plan)
        return branch_set

    def _statistics(self, branch_set: BranchSet, plan: GuidancePlan) -> Statistics:
        options, buffers, active = self.options, self.buffers, branch_set.active
        base = len(active) - 1 if options.base is None else active.index(options.base)
        conditional = active.index(options.conditional)
        readers: list[Agreement | Mixing] = []
        if plan.agreement is not None:
            pair = (conditional, active.index(options.unconditional))
            unguided = torch.from_numpy(plan.fallback_weights).to(branch_set.all_planned)
            self.agreement = Agreement(buffers, branch_set.all_planned, base, pair, unguided, plan.agreement)
            readers.append(self.agreement)
        if options.looks(active):
            mix, rescale = options.mix.value, options.rescale
            readers.append(Mixing(buffers, branch_set.planned, branch_set.weights, base, conditional, mix, rescale))
        return Statistics(
            readers,
            branches=len(active),
            base=base,
            channels=buffers.x.shape[1],
            momentum=buffers.momentum,
            decay=options.momentum or 0.0,
            conditional=conditional,
            backend=options.backend,
        )
