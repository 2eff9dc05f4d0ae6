"""The sampling loop and its observers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..utils.progress import progress_bar
from .call import Call
from .finite import FiniteWatch
from .program_cache import CachedPrograms
from .programs import Program
from .readback import Pace, Readback
from .row_plan import Turns
from .run_state import RunState, table_key


@dataclass(frozen=True, eq=False)
class _Position:
    row: int
    rows: int
    step: int
    t: float


@dataclass(frozen=True, eq=False)
class Step(_Position):
    """What a callback or `Sampler.iterate` sees after each model evaluation.

    Attributes:
        row: index of the table's row just executed, 0 first, of `rows`.
        step: the step of the run it belongs to.
        t: the time the model was called with.
        x, x0: the state after it and the predicted x0, [B, C, ...], copies.
    """

    x: Tensor
    x0: Tensor


@dataclass(frozen=True, eq=False)
class Preview(_Position):
    """What a preview function sees, one row after it was computed: as `Step`, with x0 alone, in the host's memory and
    the state's dtype, the caller's own."""

    x0: Tensor


@dataclass(eq=False)
class RunCounts:
    """What a run did so far, for `Sampler.report`: how many branches each row evaluated, and the rows before which
    conditionings were copied."""

    branches: list[int] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)


class Run:
    """A prepared run of a call, on buffers and programs that are given back to their cache at the end."""

    result: Tensor  # after the last row, the samples, which are the caller's own
    state: RunState  # after the last row, if that was asked for
    sums: Tensor | None = None  # after the last row, what its rows' log-probabilities are made of, if they are wanted

    def __init__(self, entry: CachedPrograms, call: Call) -> None:
        self.buffers, self.table, self.span = entry.buffers, call.options.table, call.span
        self.counts = RunCounts()
        self._entry, self._programs, self._plan, self._source = entry, entry.programs, call.plan, call.source
        self._change, self._watch = call.change, None
        if self.buffers.finite is not None:
            self._watch = FiniteWatch(self.buffers.finite, call.options, len(self.buffers.step.x))
        self._rows, self._kinds = call.rows, call.kinds
        self._turns: Turns | None = None
        if call.watch is not None or len(call.rows.conditionings) > 1:
            packed, classifier = entry.buffers.packed, entry.buffers.classifier
            self._turns = Turns(call.rows, packed, classifier, call.again, call.watch)
            self.counts.copies = self._turns.copies

    def rows(self, export: bool = False) -> Iterator[int]:
        """Execute, yielding the index of the last row of each program when it is enqueued; keep `state` at the end if
        it is to be exported."""
        fill, noises = self._source.fill, self.buffers.noises
        if noises is None and not self._source.always:
            fill = None
        slots = [None] * self.buffers.options.rows_per_graph if noises is None else noises.unbind()
        with self._entry:
            for first, count, program in self._schedule():
                if self._turns is not None:
                    self._turns.enter(first)
                if fill is not None:
                    with torch.no_grad():
                        for row, slot in enumerate(slots[:count], first):
                            fill(row, slot)
                if self._change is not None and self._change.draws:
                    with torch.no_grad():
                        self.buffers.known.fill(self._change, first)  # type: ignore[union-attr]
                program()
                if self._watch is not None:
                    self._watch.after_rows(first, count)
                last = first + count - 1
                yield last
            if self._watch is not None:
                self._watch.finish(last, self.buffers.step.x)
            # Before the memory is given back: another thread may take it at once.
            self.result = self.buffers.step.x.clone()
            if export:
                self.state = self._exported()
            self.sums = None if self.buffers.sums is None else self.buffers.sums.clone()

    def step(self, row: int) -> Step:
        """The state now, after a row."""
        step = self.buffers.step
        return Step(*self.position(row), x=step.x.clone(), x0=step.x0.clone())  # type: ignore[union-attr]

    def set_state(self, row: int, x: Tensor) -> None:
        """Go on with row `row`, the next, from the state x [B, C, ...]."""
        with torch.no_grad():
            self.buffers.set_state(row, x)

    def position(self, row: int) -> tuple[int, int, int, float]:
        """A row's index, the number of rows, its step and its time."""
        return row, self.table.num_rows, int(self.table.steps[row]), float(self.table["t"][row])

    @property
    def _draws_by_seed(self) -> bool:
        """Whether a state_fn draws from the seeds."""
        return self._change is not None and self._change.options.spec.draws_by_seed

    def _exported(self) -> RunState:
        span, step, source = self.span, self.buffers.step, self._source
        return RunState(
            row=span.rows.stop,
            began=span.began,
            table=table_key(span.given),
            x=self.result,
            noise=source.kind if self.table.uses_noise or self._draws_by_seed else "none",
            history=None if step.history is None else step.history[:-1].clone(),
            momentum=None if step.momentum is None else step.momentum.clone(),
            seeds=source.seeds,
            generators=source.generator_states(self.buffers.options.device),
        )

    def _schedule(self) -> Iterator[tuple[int, int, Program]]:
        """What to run, as (first row, number of rows, program)."""
        if self._plan.agreement is not None:
            return self._adaptive_schedule()
        rows = self.span.rows
        self.counts.branches += [len(active) for active in self._plan.active[rows.start : rows.stop]]
        return iter(self._programs.schedule(self._kinds, self._rows.of_row, rows))

    def _adaptive_schedule(self) -> Iterator[tuple[int, int, Program]]:
        """Row by row, with the branches that are still needed."""
        agreement = self.buffers.agreement
        done = Readback(agreement.done)  # type: ignore[union-attr]
        sent = all_agree = False
        for row in self.span.rows:
            active = self._plan.fallback_branches if all_agree else self._plan.active[row]
            self.counts.branches.append(len(active))
            yield row, 1, self._programs.single(self._rows.kind(row, active))
            # This row is enqueued: the decision on the one before may be waited for, and acts on the next.
            all_agree = all_agree or (sent and bool(done.take()))
            if sent := len(active) > 1 and not all_agree:
                done.push(agreement.done)  # type: ignore[union-attr]


class Previews:
    """Hands x0 of every n-th row, and of the last, to a function of a `Preview` when the next row is enqueued."""

    def __init__(self, run: Run, function: Callable[[Preview], object], every: int) -> None:
        self._run, self._function, self._every = run, function, every
        self._readback = Readback(run.buffers.step.x0)  # type: ignore[arg-type]
        self._sent: int | None = None

    def after_row(self, row: int) -> None:
        """Deliver what is on its way, and send this row's x0."""
        self.deliver()
        if row % self._every == 0 or row == self._run.span.rows[-1]:
            self._readback.push(self._run.buffers.step.x0)  # type: ignore[arg-type]
            self._sent = row

    def deliver(self) -> None:
        """Hand over what is on its way."""
        if self._sent is not None:
            row, self._sent = self._sent, None
            self._function(Preview(*self._run.position(row), x0=self._readback.take()))


class ProgressBar:
    """Counts rows on a bar: True makes one, False none; or on the caller's own tqdm bar, for a run that is part of
    something larger."""

    def __init__(self, bar: Any, rows: range, device: torch.device) -> None:
        self._own = bar is True
        self._bar, self._row = progress_bar(total=len(rows)) if self._own else bar, rows.start - 1
        if bar is not False:
            self._pace = Pace(device)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._own:
            self._bar.close()

    def after_row(self, row: int) -> None:
        """A row was enqueued: show it when the one before it is done."""
        self._pace.after_row()
        self._bar.update(row - self._row)
        self._row = row
