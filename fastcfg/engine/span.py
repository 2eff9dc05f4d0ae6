"""Which rows of a table a call runs, and from what state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..table import StepTable
from ..utils.checks import as_decimal, as_integer, check_finite
from .run_state import RunState, table_key


@dataclass(frozen=True, eq=False)
class Span:
    """The rows of a call, and where they start.

    Attributes:
        given: the sampler's table.
        table: the one to run: the same, or for a run that begins later, its `StepTable.restarted`.
        rows: those to run.
        began: the row that the run began with; less than the first of `rows` if it goes on from `state`.
        x: the state to start from [B, C, ...]; None draws it.
        init: the image [B, C, ...] that noise is added to, or None.
        state: the `RunState` to go on from, or None.
    """

    given: StepTable
    table: StepTable
    rows: range
    began: int = 0
    x: Tensor | None = None
    init: Tensor | None = None
    state: RunState | None = None

    def starting_state(self, noise: Any, dtype: torch.dtype) -> Tensor:
        """The state before the first row; `noise` is a function that draws standard normals [B, C, ...]."""
        if self.x is not None:
            return self.x
        drawn: Tensor = noise()
        if self.init is None:
            return drawn * self.table.initial_scale
        signal, deviation = self.table.levels[self.rows.start].tolist()  # type: ignore[index]
        return self.init.to(drawn.device, dtype) * signal + drawn.to(dtype) * deviation


def plan_span(
    table: StepTable,
    shape: tuple[int, ...],
    *,
    start: Any = None,
    stop: Any = None,
    strength: Any = None,
    init: Any = None,
    x_T: Any = None,
    state: Any = None,
) -> Span:
    """The span of a call; arguments as `Sampler.sample`, checked: TypeError or ValueError."""
    for name, tensor in (("x_T", x_T), ("init", init)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")
    if state is not None:
        given = {"start": start, "strength": strength, "init": init, "x_T": x_T}
        if beside := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"state: got one beside {', '.join(beside)}, expected it alone: it has all of them")
        began = _checked_state(state, table, shape)
        if state.row == table.num_rows:
            expected = "one with rows to go on with: its x is the samples"
            raise ValueError(f"state: got one after the last row, {state.row - 1}, expected {expected}")
        return Span(table, table.restarted(began), _rows(table, state.row, stop), began, state.x, None, state)
    if init is not None and x_T is not None:
        raise ValueError("init: got an image beside x_T, expected one of the two")
    if init is not None and table.levels is None:
        expected = "x_T, the noised image: the noise levels of the table's rows are not known"
        raise ValueError(f"init: got an image with the table {table.name}, expected {expected}")
    if strength is not None:
        if start is not None or init is None:
            got = "start" if start is not None else "no init"
            raise ValueError(f"strength: got {strength!r} with {got}, expected it with init alone")
        start = _row_of_strength(table, strength)
    rows = _rows(table, 0 if start is None else start, stop)
    if rows.start and init is None and x_T is None:
        raise ValueError(f"start: got {rows.start} alone, expected it with init, an image, or x_T, the state there")
    return Span(table, table.restarted(rows.start), rows, rows.start, x_T, init)


def _rows(table: StepTable, start: Any, stop: Any) -> range:
    count = table.num_rows
    first, last = as_integer(start), count if stop is None else as_integer(stop)
    if first is None or not 0 <= first < count:
        raise ValueError(f"start: got {start!r}, expected a row from 0 to {count - 1}")
    if last is None or not first < last <= count:
        raise ValueError(f"stop: got {stop!r}, expected a row from {first + 1} to {count}, which is not run any more")
    return range(first, last)


def _row_of_strength(table: StepTable, strength: Any) -> int:
    """The first row of the last share `strength` of the steps, rounded down, as in diffusers' pipelines."""
    check_finite("strength", strength, least=0)
    share: Any = as_decimal(strength)
    steps = table.num_steps
    if share > 1 or math.floor(steps * share) < 1:
        raise ValueError(f"strength: got {strength!r}, expected 1 / {steps} to 1, a share of the {steps} steps")
    return int(np.searchsorted(table.steps, steps - math.floor(steps * share)))


def _checked_state(state: Any, table: StepTable, shape: tuple[int, ...]) -> int:
    """The row that its run began with."""
    if not isinstance(state, RunState):
        raise TypeError(f"state: got {type(state).__name__}, expected a RunState (see Sampler.export)")
    if state.table != table_key(table):
        raise ValueError(f"state: got one of another table, expected one of {table.name} with {table.num_rows} rows")
    if state.shape != shape:
        raise ValueError(f"shape: got {shape}, expected {state.shape}, the state's")
    return state.began
