"""`ByRow`: values that take turns in the course of a run, such as prompts or models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..table import StepTable
from ..utils.checks import as_decimal, as_integer, as_number, check_finite

__all__ = ["ByRow"]

Bounds = float | Sequence[float]


class ByRow:
    """Values of which each row of a run takes one: as the conditioning of a branch, as one of its keyword arguments, or
    as a sampler's model.

    Args:
        *values: conditionings, keyword arguments, or models.
        progress: where each value but the first begins, in fractions of the run's steps, ascending: step i of N has the
            second value if i >= int(progress * N), as guidance intervals.
        time: the same by the model's time t, descending: a row has the second value if t is below it.
        row: the same by the index of the row (the model evaluation).
        index: which value each row takes: R integers, or a function of the progress, 0 at the first step and below 1 at
            the last.

    Raises:
        TypeError, ValueError: values or bounds that do not fit; another number of rows when a run is planned.

    Example:
        >>> from fastcfg import Schedule, solvers
        >>> table = solvers.ddim(Schedule.named("linear").respace(5))
        >>> ByRow("cat", "dog", progress=0.4).indices(table)
        (0, 0, 1, 1, 1)
        >>> ByRow("high noise", "low noise", time=500).indices(table)
        (0, 0, 0, 1, 1)
        >>> ByRow("cat", "dog", index=[0, 1, 0, 1, 0]).indices(table)
        (0, 1, 0, 1, 0)
    """

    def __init__(
        self,
        *values: Any,
        progress: Bounds | None = None,
        time: Bounds | None = None,
        row: Bounds | None = None,
        index: Sequence[int] | Callable[[float], int] | None = None,
    ) -> None:
        given = {"progress": progress, "time": time, "row": row, "index": index}
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) != 1:
            raise ValueError(f"ByRow: got {', '.join(named) or 'none'} of {', '.join(given)}, expected one of them")
        if not values:
            raise ValueError("ByRow: got no values, expected at least one")
        self.values = values
        ((self._by, bounds),) = named.items()
        self._index = index
        self._bounds = () if self._by == "index" else self._checked(bounds)

    def _checked(self, given: Any) -> tuple[float, ...]:
        bounds = [given] if as_number(given) is not None else list(given)
        checked = tuple(check_finite(self._by, bound) for bound in bounds)
        if self._by == "progress":
            checked = tuple(number for number in map(as_decimal, bounds) if number is not None)
        if self._by == "progress" and not all(0 <= bound <= 1 for bound in checked):
            raise ValueError(f"progress: got {given!r}, expected fractions of the run, 0 to 1")
        order = sorted(checked, reverse=self._by == "time")
        if len(checked) != len(self.values) - 1 or list(checked) != order:
            direction = "descending" if self._by == "time" else "ascending"
            expected = f"{len(self.values) - 1}, {direction}: where each value but the first begins"
            raise ValueError(f"{self._by}: got {given!r}, expected {expected}")
        return checked

    def __repr__(self) -> str:
        where = self._index if self._by == "index" else self._bounds
        return f"ByRow({len(self.values)} values, {self._by}={where!r})"

    def indices(self, table: StepTable) -> tuple[int, ...]:
        """Which value each row of a table takes."""
        rows, steps = range(table.num_rows), table.steps.tolist()
        if self._by == "index":
            return self._given_indices(table)
        if self._by == "progress":
            firsts = [int(bound * table.num_steps) for bound in self._bounds]
            return tuple(sum(step >= first for first in firsts) for step in steps)
        if self._by == "row":
            return tuple(sum(row >= bound for bound in self._bounds) for row in rows)
        return tuple(sum(t < bound for bound in self._bounds) for t in table["t"].tolist())

    def _given_indices(self, table: StepTable) -> tuple[int, ...]:
        if callable(self._index):
            given = [self._index(step / table.num_steps) for step in table.steps.tolist()]
        else:
            given = list(self._index)  # type: ignore[arg-type]
        found = [as_integer(item) for item in given]
        if len(found) != table.num_rows or any(item is None or not 0 <= item < len(self.values) for item in found):
            expected = f"one for each of the {table.num_rows} rows, from 0 to {len(self.values) - 1}"
            raise ValueError(f"index: got {given!r}, expected {expected}")
        return tuple(item for item in found if item is not None)


def models_of(model: Any) -> tuple[Any, ...]:
    """The models of a sampler that was given one, or several by row."""
    return model.values if isinstance(model, ByRow) else (model,)
