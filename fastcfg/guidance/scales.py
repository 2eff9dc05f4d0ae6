"""Scales and intervals in the spellings that the specs take, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..table import StepTable

Scale = float | Sequence[float] | NDArray[np.float64] | Callable[[float], ArrayLike]


def scale_by_row(name: str, scale: Scale, table: StepTable, batch: int) -> NDArray[np.float64]:
    """float64 [R, B] of a scale in any of the spellings of `CFG.scale`."""
    if callable(scale):
        steps: Any = table.steps
        rows = [_finite(name, scale(i / table.num_steps)) for i in steps]
        if bad := {row.shape for row in rows} - {(), (1,), (batch,)}:
            raise ValueError(
                f"{name}: the function returned shapes {sorted(bad)}, expected a number or {batch} numbers"
            )
        return np.stack([np.broadcast_to(row, batch) for row in rows])
    values = _finite(name, scale)
    if values.ndim == 1 and len(values) not in (1, batch):
        raise ValueError(f"{name}: got {len(values)} values, expected 1 or one per sample ({batch})")
    if values.ndim == 2 and (len(values) != table.num_rows or values.shape[1] not in (1, batch)):
        raise ValueError(
            f"{name}: got shape {values.shape}, expected ({table.num_rows}, 1) or ({table.num_rows}, {batch})"
        )
    return np.broadcast_to(values, (table.num_rows, batch)).copy()


def inside_interval(interval: tuple[float, float], table: StepTable) -> NDArray[np.bool_]:
    """bool [R]: rows whose step lies in the interval."""
    first, last = (int(edge * table.num_steps) for edge in interval)
    inside: NDArray[np.bool_] = (table.steps >= first) & (table.steps < last)
    return inside


def close(values: NDArray[np.float64], to: ArrayLike) -> NDArray[np.bool_]:
    """As math.isclose, by which diffusers' guiders tell that a scale guides nothing."""
    found: NDArray[np.bool_] = np.isclose(values, to, rtol=1e-9, atol=0)
    return found


def check_scale(name: str, scale: Scale) -> None:
    """Raise ValueError for numbers that are not finite; a function is checked when it is called."""
    if not callable(scale):
        _finite(name, scale)


def check_interval(interval: tuple[float, float], name: str = "interval") -> None:
    """Raise ValueError unless 0 <= start < stop <= 1."""
    if not isinstance(interval, Sequence) or len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"{name}: got {interval!r}, expected 0 <= start < stop <= 1")


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Raise ValueError unless a value is a finite number from least to most."""
    if not isinstance(value, int | float) or not math.isfinite(value) or not least <= value <= most:
        raise ValueError(f"{name}: got {value!r}, expected a finite number from {least:g} to {most:g}")


def _finite(name: str, scale: Any) -> NDArray[np.float64]:
    try:
        values = np.asarray(scale.detach().cpu() if hasattr(scale, "detach") else scale, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.array(np.nan)
    if values.ndim > 2 or not np.isfinite(values).all():
        raise ValueError(f"{name}: got {scale!r}, expected finite numbers in at most two dimensions")
    return values
