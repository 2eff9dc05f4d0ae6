"""The static memory of a run, for one shape and one set of options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..guidance import GuidancePlan
from ..ops import sums_memory
from ..step import StepBuffers
from .branch_weights import DELAY, Agreement, BranchWeights, base_index
from .call import Call
from .finite import FiniteRecord
from .packing import Packed
from .place_weights import empty_place_weights, write_place_weights
from .run_state import RunState
from .state_function import KnownMemory


@dataclass(eq=False)
class BranchSet:
    """The branches that some rows evaluate, with their blend weights."""

    padded: Tensor  # [R + 2, B, P], the planned weights; the last two rows are written but never read: see `Agreement`
    schedule: Tensor  # those of the run's rows
    weights: Tensor  # [R, B, V], what the step reads: the schedule itself, or weights computed from it and the outputs
    computed: BranchWeights | None = None  # what computes them; None where they are the schedule


class Buffers:
    """Static buffers: the state, what the model is given, and everything the step reads and writes.

    Made for a first call; `load` prepares them for it and for every later call with an equal key. The step's `noise` is
    that of a graph's first row, `noises` those of all its rows; `classifier_keywords` are cond_fn's, and `values` those
    that the model and cond_fn are given as they are.
    """

    @torch.inference_mode(False)
    def __init__(self, call: Call) -> None:
        options, plan, shape = call.options, call.plan, call.shape
        config, table, batch = options.config, options.table, shape[0]
        slots = max(len(active) for active in plan.active)
        with_x0 = options.keep_x0 or options.threshold is not None
        self._c_in, self._t = table["c_in"].tolist(), table["t"].tolist()
        self._stream: Any = None

        def state(*size: int) -> Tensor:
            return torch.zeros(size, dtype=config.state_dtype, device=options.device)

        self.options = options
        self.agreement: Agreement | None = None
        self.noises = state(options.rows_per_graph, *shape) if options.noise_source == "tensor" else None
        time_dtype = torch.int64 if table.integer_time else torch.float32
        self.step = StepBuffers(
            x=state(*shape),
            table=table.on(options.device, config.state_dtype),
            counter=torch.zeros(2, dtype=torch.int32, device=options.device),
            bound=state(batch) if options.clip or options.threshold else None,
            noise=None if self.noises is None else self.noises[0],
            seeds=torch.zeros(batch, dtype=torch.int64, device=options.device),
            history=state(table.num_history + 1, *shape) if table.num_history else None,
            gradient=state(*shape) if options.cond_fn.value is not None else None,
            momentum=state(*shape) if options.momentum is not None else None,
            x0=state(*shape) if with_x0 else None,
            model_input=torch.zeros((slots * batch, *shape[1:]), dtype=config.dtype, device=options.device).contiguous(
                memory_format=config.memory_format
            ),
            time=torch.zeros(slots * batch, dtype=time_dtype, device=options.device),
        )
        self.kinds = tuple(dict.fromkeys(call.kinds))
        self.branch_sets = {a: self._branch_set(a, call) for a in dict.fromkeys(kind.active for kind in self.kinds)}
        self.packed = {(k.active, k.layout): Packed(call.rows.of_layout(k.layout), k.active) for k in self.kinds}
        self.values = call.rows.values()
        self.classifier: Packed | None = None
        self.classifier_keywords: dict[str, Any] = {}
        if options.cond_fn.value is not None:
            self.classifier = Packed(call.rows.conditionings[0][0], (options.conditional,))
            self.classifier_keywords = self.classifier.keywords(0, 1)
        known = call.change is not None and call.change.known is not None
        self.known = KnownMemory(call.change, self.step) if known else None  # type: ignore[arg-type]
        self.sums = sums_memory(table.num_rows, self.step.x, config.backend) if options.log_prob else None
        self.finite = FiniteRecord(options) if config.check_finite else None
        self._load_conditioning(call)
        self._structures = self._read_structures()

    def load(self, call: Call) -> None:
        """Set everything to the start of a call's run: conditioning, weights, clip bounds, seeds, state."""
        self._load_conditioning(call)
        if call.bounds is not None:
            self.step.bound.copy_(call.bounds)  # type: ignore[union-attr]
        if call.source.seeds is not None:
            self.step.seeds.copy_(call.source.seeds)  # type: ignore[union-attr]
        span = call.span
        self.step.x.copy_(span.starting_state(call.source.start, self.step.x.dtype))
        if self.finite is not None:
            self.finite.reset(self.step.x)
        if self.known is not None:
            self.known.load(call.change)  # type: ignore[arg-type]
        self.begin(span.rows.start)
        if span.state is not None:
            self._carry_on(span.state)

    def begin(self, row: int = 0) -> None:
        """Make a row the next, from the state now in `step.x`."""
        buffers = self.step
        buffers.counter.zero_()
        buffers.counter[0].fill_(row)
        if buffers.history is not None:
            # Rows multiply tensors they do not use by 0, and 0 times the infinity of an earlier run is not 0.
            buffers.history.zero_()
        if buffers.momentum is not None:
            buffers.momentum.zero_()
        if self.options.change is not None and buffers.x0 is not None:
            buffers.x0.zero_()  # a state_fn before the first row is given it
        buffers.time.fill_(self._t[row])  # type: ignore[union-attr]
        self.set_state(row, buffers.x)
        if self.agreement is not None:
            self.agreement.reset()

    def _carry_on(self, state: RunState) -> None:
        """Take over what a run carries beside its state."""
        if state.history is not None:
            self.step.history[:-1].copy_(state.history)  # type: ignore[index]
        if state.momentum is not None and self.step.momentum is not None:
            self.step.momentum.copy_(state.momentum)

    def set_state(self, row: int, x: Tensor) -> None:
        """Make x the state from which a row, the next, goes on."""
        if x is not self.step.x:
            self.step.x.copy_(x)
        slots = self.step.model_input.unflatten(0, (-1, len(x)))  # type: ignore[union-attr]
        slots.copy_((self.step.x * self._c_in[row]).expand_as(slots))

    def rehearse(self, row: int, reach: float = 1.0) -> None:
        """Make a row the next, from a state that is always the same: values from -reach to reach."""
        x = self.step.x
        torch.linspace(-reach, reach, x.numel(), out=x.view(-1))
        if self.options.clip:
            self.step.bound.fill_(2)  # type: ignore[union-attr]  # a bound of 0 would hide the model's output
        self.begin(row)

    def enter_stream(self) -> None:
        """Let the current stream use the buffers after the stream that used them last."""
        if self.options.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.options.device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
            for tensor in self.tensors():
                tensor.record_stream(stream)
        self._stream = stream

    def nbytes(self) -> int:
        """Bytes of the static buffers."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def _load_conditioning(self, call: Call) -> None:
        if self.classifier is not None:
            self.classifier.load(call.rows.conditionings[0][0])
        for (_, layout), packed in self.packed.items():
            packed.load(call.rows.of_layout(layout))
        for active, branch_set in self.branch_sets.items():
            if call.plan.places is not None and self.by_place(active):
                write_place_weights(branch_set.schedule, call.plan.places, call.place_weights(active))
            else:
                branch_set.schedule.copy_(torch.from_numpy(self._planned(call.plan, active)))

    def tensors(self) -> list[Tensor]:
        """All static tensors."""
        buffers = replace(self.step, noise=self.noises)
        tensors = [value for value in vars(buffers).values() if value is not None]
        for packed in (*self.packed.values(), *([] if self.classifier is None else [self.classifier])):
            tensors += packed.tensors()
        tensors += [] if self.sums is None else [self.sums]
        tensors += [] if self.finite is None else [self.finite.tensor]
        tensors += [] if self.known is None else self.known.tensors()
        for branch_set in self.branch_sets.values():
            weights = [] if branch_set.computed is None else [branch_set.weights]
            tensors += [branch_set.padded, *weights]
        return tensors

    def changed_values(self) -> bool:
        """Whether a value that the model is given as it is, such as a list, has changed since the buffers were made."""
        return self._structures != self._read_structures()

    def _read_structures(self) -> list[Any]:
        return [packed.structure() for packed in (*self.packed.values(), *filter(None, [self.classifier]))]

    def _planned(self, plan: GuidancePlan, active: tuple[int, ...]) -> NDArray[np.float64]:
        """[R, B, P]: the planned weights of some branches."""
        if not self.options.uses_outputs(active):
            return plan.weights[:, :, list(active)]
        planned: NDArray[np.float64] = plan.planned  # type: ignore[assignment]
        return planned[:, :, [*active, *range(len(self.options.branches), planned.shape[2])]]

    def by_place(self, active: tuple[int, ...]) -> bool:
        """Whether the branches are blended by weights that differ within a sample."""
        return self.options.weights_by != "sample" and len(active) > 1

    def _branch_set(self, active: tuple[int, ...], call: Call) -> BranchSet:
        plan, options = call.plan, self.options
        computes = options.uses_outputs(active)
        if self.by_place(active):
            schedule = empty_place_weights(self.step.x, options.weights_by, call.place_weights(active))
            rows = plan.weights.shape[0]
            return BranchSet(schedule, schedule, schedule.expand(rows, *schedule.shape[1:]))
        rows, batch, columns = self._planned(plan, active).shape
        dtype, device = options.config.state_dtype, options.device
        padded = torch.zeros((rows + DELAY, batch, columns), dtype=torch.float64 if computes else dtype, device=device)
        vectors = len(active) + (options.momentum is not None)
        schedule = padded[:-DELAY]
        weights = torch.zeros((rows, batch, vectors), dtype=dtype, device=device) if computes else schedule
        branch_set = BranchSet(padded, schedule, weights)
        agreement = None
        if len(active) > 1 and plan.agreement is not None:
            pair = (active.index(options.conditional), active.index(options.unconditional))
            fallback = torch.from_numpy(plan.fallback_weights).to(padded)
            agreement = self.agreement = Agreement(padded, base_index(options, active), pair, fallback, plan.agreement)
        if computes or agreement is not None:
            branch_set.computed = BranchWeights(options, self.step, active, padded, weights, agreement)
        return branch_set
