"""RePaint's order of rows, in which a run jumps back (Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..table import StepTable
from ..utils.checks import check_count


def repaint_order(num_rows: int, jump_length: int = 10, jump_samples: int = 10) -> list[int]:
    """The rows that a run with jumps back executes, by their index in a run without: the authors' `get_schedule_jump`.

    Args:
        num_rows: of the table, one a step.
        jump_length: how many rows a jump goes back.
        jump_samples: how often each stretch of so many rows is run; 1 for no jumps.

    Raises:
        ValueError: numbers below 1.

    Example:
        >>> repaint_order(6, jump_length=2, jump_samples=2)
        [0, 1, 2, 1, 2, 3, 4, 3, 4, 5]
    """
    rows, length = check_count("num_rows", num_rows), check_count("jump_length", jump_length)
    left = dict.fromkeys(range(0, rows - length, length), check_count("jump_samples", jump_samples) - 1)
    order, time = [], rows - 1
    while time >= 0:
        if left.get(time, 0):
            left[time] -= 1
            time += length
        order.append(rows - 1 - time)
        time -= 1
    return order


def reordered(table: StepTable, order: Any) -> StepTable:
    """A table with another table's rows in an order, in which rows may occur several times. What happens to the state
    in a jump is up to the `state_fn` (`fastcfg.repaint`).

    Raises:
        ValueError: an order with rows that the table does not have, or a table with saved tensors, which would be those
            of other times after a jump.
    """
    rows = np.asarray(order)
    if rows.ndim != 1 or not rows.size or rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= len(table):
        raise ValueError(f"order: got {rows.tolist()}, expected rows of the table, 0 to {len(table) - 1}")
    if table.num_history:
        raise ValueError(f"table: got {table.name} with {table.num_history} saved tensors, expected one without")
    levels = None if table.levels is None else np.concatenate([table.levels[rows], table.levels[rows[-1:] + 1]])
    steps, name = np.arange(len(rows)), f"{table.name}, reordered"
    return replace(table, rows=table.rows[rows], steps=steps, levels=levels, rebuild=None, name=name)
