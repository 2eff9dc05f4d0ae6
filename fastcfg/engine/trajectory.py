"""What a run leaves beside its samples: the log-probabilities of its draws, and its states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..reference.log_prob import log_prob_of_sums, stochastic_rows
from ..table import StepTable
from .loop import Run


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A run as fine-tuning by policy gradients needs it, from `Sampler.sample` with log_prob or trajectory.

    Attributes:
        samples: [B, C, ...].
        rows: the n rows that were run and add noise, by their index in the table.
        log_prob: float64 [n, B]: of each of these rows' draws, the sum over each sample: log p(x_next | x) as
            `fastcfg.log_prob` has it; None unless it was asked for.
        states: [m + 1, B, C, ...]: the state before each of the m rows that were run, and at the end; None unless they
            were asked for.
    """

    samples: Tensor
    rows: tuple[int, ...]
    log_prob: Tensor | None = None
    states: Tensor | None = None


class States:
    """Keeps the states of a run's rows, each by one copy on the device."""

    def __init__(self, run: Run, rows: range) -> None:
        self._x, self._first = run.buffers.step.x, rows.start
        self.kept = self._x.new_empty((len(rows) + 1, *self._x.shape))
        self.kept[0].copy_(self._x)

    def after_row(self, row: int) -> None:
        """Keep the state after a row."""
        self.kept[row + 1 - self._first].copy_(self._x)


def trajectory_of(run: Run, rows: range, states: States | None) -> Trajectory:
    """What a run of some rows leaves, at its end."""
    drawn = tuple(int(row) for row in stochastic_rows(run.table) if row in rows)
    log_prob = None
    if run.sums is not None:
        log_prob = log_prob_of_sums(run.table, drawn, run.sums, run.result[0].numel())
    return Trajectory(run.result, drawn, log_prob, None if states is None else states.kept)


def check_log_prob(table: StepTable, state_fn: Any) -> None:
    """Raise ValueError unless the draws of a run have log-probabilities."""
    if not len(stochastic_rows(table)):
        raise ValueError(f"log_prob: got True with the table {table.name}, whose rows add no noise, expected False")
    if state_fn is not None:
        raise ValueError("log_prob: got True with a state_fn, which moves the states that are drawn, expected False")
