"""The programs of a run's rows: "model call, then fused step", eagerly or as a graph, whichever is faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops import GuidedStep, NoiseSums, QuantileBound
from ..step import StepSpec
from ..table import COLUMNS, StepTable
from .buffers import Buffers
from .call import ProgramOptions
from .config import NO_CAPTURE
from .graphs import CaptureError, CudaGraph, Opaque, Pool, StandIn, compare, examine, is_compiled
from .model_output import output_tensor
from .row_plan import RowKind
from .state_function import StateProgram
from .trial import Trial
from .user_functions import ClassifierGradient, DenoisedOutput

Program = Callable[[], None]
Branches = tuple[int, ...]

# An alternative must win by 2 %: graphs cost memory, and serial forwards round differently.
_WORTH = 0.98
# Where a graph saves more than this, the time goes into launches, and twice as many are not tried.
_LAUNCH_BOUND = 0.9


@dataclass(frozen=True)
class Decision:
    """How the rows of a set of branches are run, and why."""

    branches: tuple[str, ...]
    graph: str = "none"  # or "cuda", "stand-in"
    batching: str = "batched"  # one forward for all branches; or "serial", one for each
    reason: str = ""  # why there is no graph, or none of several rows
    milliseconds: dict[str, float] = field(default_factory=dict)  # of a row, by "eager" or "graph" and batching
    constants: int = 0  # tensors that the model copies from the host in every call, and the graph does not
    # Over the state in a row beside the model: one for the step, one where the guidance uses the outputs or reads a map
    # of scales, and one each for a state_fn, check_finite and log_prob; those of dynamic thresholding and of the
    # caller's functions are not counted.
    passes: int = 1
    # What keeps the branches' conditionings from one plain forward: lengths that differ, and what was done about it.
    conditioning: str = ""
    model: int = 0  # which of the models, where they take turns


@dataclass(frozen=True)
class _Choice:
    """One way to run a row. `seconds` are infinite where nothing was measured; `record` is None for an eager one."""

    batching: str
    program: Program
    seconds: float = math.inf
    record: Callable[[list[Program]], Program] | None = None
    constants: int = 0


class Programs:
    """The programs on some buffers, for each kind of row (branches, model, layout of the conditioning): by kind, the
    `decisions` on how these rows are run, and as `problem`, why the model could not be captured; empty if nothing
    failed."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, buffers: Buffers, models: Sequence[Callable[..., Any]], pool: Pool) -> None:
        self._buffers, self._options, self._pool = buffers, buffers.options, pool
        self._models = [Opaque(model) if is_compiled(model) else model for model in models]
        others = {name: alike.value for name, alike in self._options.branch_models}
        self._branch_models = {name: Opaque(other) if is_compiled(other) else other for name, other in others.items()}
        self._gradient: ClassifierGradient | None = None
        if (cond_fn := self._options.cond_fn.value) is not None:
            self._gradient = ClassifierGradient(cond_fn, buffers.step, buffers.classifier_keywords)
        self._single: dict[RowKind, Program] = {}
        self._repeated: dict[RowKind, Program] = {}
        self.decisions: dict[RowKind, Decision] = {}
        self.problem = ""
        # Largest first: the smaller graphs then fit into its memory.
        for kind in sorted(buffers.kinds, key=lambda kind: len(kind.active), reverse=True):
            self._decide(kind)

    def single(self, kind: RowKind) -> Program:
        """One row of a kind."""
        return self._single[kind]

    def schedule(
        self, kinds: Sequence[RowKind], conditionings: Sequence[int], rows: range
    ) -> list[tuple[int, int, Program]]:
        """Some rows as (first row, number of rows, program), from the kind and the conditioning of every row of the
        table."""
        runs: list[tuple[int, int, Program]] = []
        alike = list(zip(kinds, conditionings, strict=False))[: rows.stop]
        row, count = rows.start, self._options.rows_per_graph
        while row < rows.stop:
            kind = kinds[row]
            repeats = kind in self._repeated and alike[row : row + count] == [alike[row]] * count
            runs.append((row, count, self._repeated[kind]) if repeats else (row, 1, self._single[kind]))
            row += runs[-1][1]
        return runs

    def _decide(self, kind: RowKind) -> None:
        """Choose how rows of a kind are run."""
        options, active = self._options, kind.active
        packed = self._buffers.packed[active, kind.layout]
        capture, several = options.config.capture, len(active) > 1
        # Conditionings of which no two fit into one forward leave no choice.
        batching = "serial" if len(packed.ends) == len(active) else options.config.batching
        choices, failure = self._choices(kind, "serial" if batching == "serial" and several else "batched")
        undecided = capture == "timed" and batching == "auto" and several
        if undecided and len(choices) == 2 and choices[1].seconds > _LAUNCH_BOUND * choices[0].seconds:
            choices += self._choices(kind, "serial")[0]
        best = choices[0]
        for choice in choices[1:]:
            if capture == "always" or choice.seconds < _WORTH * best.seconds:
                best = choice
        self._single[kind] = best.program
        if best.record is not None:
            reason = self._repeat(kind, best.record, best.batching)
        else:
            reason = failure or "eager is as fast"
            if failure and capture not in NO_CAPTURE:
                self.problem = self.problem or failure
        by_element = options.weights_by == "element" and several
        ways = {f"{'graph' if way.record else 'eager'} {way.batching}": way.seconds * 1e3 for way in choices}
        self.decisions[kind] = Decision(
            branches=tuple(options.branches[k] for k in active),
            graph="none" if best.record is None else "cuda" if options.device.type == "cuda" else "stand-in",
            batching=best.batching,
            reason=reason,
            milliseconds=ways if capture == "timed" and len(choices) > 1 else {},
            constants=best.constants,
            passes=1 + (self._buffers.branch_sets[active].computed is not None) + by_element + self._more_passes(),
            conditioning=packed.note,
            model=kind.model,
        )

    def _more_passes(self) -> int:
        """Over the state, for a change of it, the check for NaN and infinity, and log-probabilities."""
        options = self._options
        return (options.change is not None) + (options.config.check_finite is not None) + options.log_prob

    def _repeat(self, kind: RowKind, record: Callable[[list[Program]], Program], batching: str) -> str:
        """Record several rows of a kind if that is wanted; why it failed, or ""."""
        if (count := self._options.rows_per_graph) > 1:
            programs = [self._eager(kind, batching, slot) for slot in range(count)]
            try:
                with self._trial() as trial:
                    self._buffers.rehearse(0)
                    trial.run(programs[0])
                    self._repeated[kind] = record(programs)
            except CaptureError as error:  # they may take more memory than there is
                return f"one row in a graph: {error}"
        return ""

    def _choices(self, kind: RowKind, batching: str) -> tuple[list[_Choice], str]:
        """An eager row, and a graph if that is wanted and works; and why there is no graph."""
        eager, capture = self._eager(kind, batching), self._options.config.capture
        if capture in NO_CAPTURE:
            return [_Choice(batching, eager)], NO_CAPTURE[capture]
        buffers, rows = self._buffers, self._options.table.num_rows
        first, last = partial(buffers.rehearse, 0), partial(buffers.rehearse, rows - 1)
        results: tuple[Tensor, Tensor] = (buffers.step.x, buffers.step.model_input)  # type: ignore[assignment]
        try:
            with self._trial() as trial:
                trial.settle(eager, (first, partial(buffers.rehearse, rows - 1, reach=0.5)), results)
                examined = examine(eager, (first, last), self._options.device)
                record = partial(self._record, examined)
                graph = record([eager])
                compared = compare(eager, graph, last, results)
                trial.check()
            if not compared.same:
                raise CaptureError("a replay gives other numbers than the model")
        except CaptureError as error:
            return [_Choice(batching, eager)], f"cannot be captured: {error}"
        captured = _Choice(batching, graph, compared.recording, record, len(examined.constants))
        return [_Choice(batching, eager, compared.program), captured], ""

    def _trial(self) -> Trial:
        functions = self._options.functions() | {"output": self._options.config.output}
        functions |= self._buffers.values
        return Trial(functions, self._options.device, self._buffers.tensors())

    def _record(self, examined: Any, programs: list[Program]) -> Program:
        self._buffers.rehearse(0)
        on_gpu = self._options.device.type == "cuda"
        return CudaGraph(programs, examined, self._pool) if on_gpu else StandIn(programs)

    def _eager(self, kind: RowKind, batching: str, slot: int = 0) -> Program:
        """A row as a program, which reads the noise buffer `slot`."""
        options, backend, active = self._options, self._options.config.backend, kind.active
        branch_set = self._buffers.branch_sets[active]
        spec = step_spec(options, active)
        buffers = replace(self._buffers.step, weights=branch_set.weights)
        if self._buffers.noises is not None:
            buffers.noise = self._buffers.noises[slot]
        denoised, weights = None, branch_set.computed
        if options.denoised_fn.value is not None:
            denoised = DenoisedOutput(options.denoised_fn.value, spec, buffers, backend)
            spec = replace(
                spec, branches=1, base=None, conditional=0, scaled=False, momentum=False, weights_by="sample"
            )
            table = takes_x0(options.table).on(options.device, options.config.state_dtype)
            buffers = replace(buffers, weights=None, table=table)
        bound = QuantileBound(options.threshold, spec, buffers, backend) if options.threshold else None
        change = None
        if options.change is not None:
            known = None if self._buffers.known is None else self._buffers.known.of_slot(buffers.noise)
            change = StateProgram(options.change, self._buffers.step, known, backend)
            buffers = replace(buffers, model_input=None, time=None)  # the change writes them
        sums = None
        if self._buffers.sums is not None:
            sums = NoiseSums(step_spec(options, active), buffers, self._buffers.sums, backend)
        finite = None
        if self._buffers.finite is not None:
            finite = self._buffers.finite.check(active, buffers, backend)
        before, after = (change, None) if change is not None and change.before else (None, change)
        step = GuidedStep(spec, buffers, backend)
        call, gradient = self._model_call(kind, batching), self._gradient

        # Memory that the model or the step allocates in inference mode could not be written to outside it later.
        @torch.inference_mode(False)
        @torch.no_grad()
        def program() -> None:
            if before is not None:
                before()
            given = output = call()
            if weights is not None:
                weights(output)
            if denoised is not None:
                output = denoised(output)
            if bound is not None:
                bound(output)
            if gradient is not None:
                gradient()
            if sums is not None:
                sums(given)
            step(output)
            if after is not None:
                after()
            if finite is not None:
                finite(given)

        return program

    def _model_call(self, kind: RowKind, batching: str) -> Callable[[], Tensor]:
        """The model on its buffers: () -> [n*B, C or 2C, ...]."""
        buffers, model, active = self._buffers, self._models[kind.model], kind.active
        batch, packed = len(buffers.step.x), buffers.packed[active, kind.layout]
        read = self._options.config.output or output_tensor
        models = [self._branch_models.get(self._options.branches[k], model) for k in active]
        # Neighbours with one model and conditionings that fit share a forward, unless serial forwards are wanted.
        apart = {0, *packed.ends}
        starts = [k for k in range(len(active)) if batching == "serial" or k in apart or models[k] is not models[k - 1]]
        calls = []
        # Every slot holds the same input, so any subset of the branches takes the first ones.
        for start, end in zip(starts, [*starts[1:], len(active)], strict=True):
            part, model = slice(start * batch, end * batch), models[start]
            keywords = packed.keywords(start, end)
            calls.append(partial(model, buffers.step.model_input[part], buffers.step.time[part], **keywords))  # type: ignore[index]

        def call() -> Tensor:
            first, *others = [read(call()) for call in calls]
            return torch.cat([first, *others]) if others else first

        return call


def step_spec(options: ProgramOptions, active: Branches) -> StepSpec:
    """The step of a set of branches."""
    return StepSpec.of(
        options.table,
        options,
        active,
        scaled=options.uses_outputs(active),
        momentum=options.uses_outputs(active) and options.momentum is not None,
        weights_by=options.weights_by if len(active) > 1 else "sample",
        gradient=options.cond_fn.value is not None,
        clip=options.clip or options.threshold is not None,
        rescale=options.threshold is not None,
        noise_source=options.noise_source,
        keep_x0=options.keep_x0,
    )


def takes_x0(table: StepTable) -> StepTable:
    """The same solver for a model output that is x0 already."""
    rows = table.rows.copy()
    rows[:, COLUMNS.index("p_x")], rows[:, COLUMNS.index("p_m")] = 0, 1
    return replace(table, rows=rows)
