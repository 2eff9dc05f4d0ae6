"""The scales and intervals that specs take, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..table import StepTable
from ..utils.checks import as_decimal, as_integer, as_number

Scale = float | Sequence[float] | NDArray[np.float64] | Callable[[float], ArrayLike]
Scales = Mapping[str, Scale]
Interval = tuple[float, float]
Number: TypeAlias = float
Positive: TypeAlias = float
Share: TypeAlias = float
Cosine: TypeAlias = float
Count: TypeAlias = int

_LIMITS = {
    "Number": (-math.inf, math.inf, "a finite number"),
    "Positive": (0, math.inf, "a finite number of at least 0"),
    "Share": (0, 1, "a number from 0 to 1"),
    "Cosine": (-1, 1, "a cosine, -1 to 1"),
    "Count": (0, math.inf, "an integer of at least 0"),
}


def scale_by_row(name: str, scale: Scale, table: StepTable, batch: int) -> NDArray[np.float64]:
    """float64 [R, B] of a scale in any of the forms of `CFG.scale`."""
    if callable(scale):
        steps: Any = table.steps
        rows = [_finite(name, scale(i / table.num_steps)) for i in steps]
        if bad := {row.shape for row in rows} - {(), (1,), (batch,)}:
            got = f"the function returned shapes {sorted(bad)}"
            raise ValueError(f"{name}: {got}, expected a number or {batch} numbers")
        return np.stack([np.broadcast_to(row, batch) for row in rows])
    values = _finite(name, scale)
    if values.ndim == 1 and len(values) not in (1, batch):
        by_row = f"; one per row has the shape ({table.num_rows}, 1)"
        raise ValueError(f"{name}: got {len(values)} values, expected 1 or one per sample ({batch}){by_row}")
    if values.ndim == 2 and (len(values) != table.num_rows or values.shape[1] not in (1, batch)):
        expected = f"({table.num_rows}, 1) or ({table.num_rows}, {batch}); by place, vectors take (1, B, D)"
        raise ValueError(f"{name}: got shape {values.shape}, expected {expected}")
    return np.broadcast_to(values, (table.num_rows, batch)).copy()


def inside_interval(interval: Interval, table: StepTable) -> NDArray[np.bool_]:
    """bool [R]: the rows of steps in the interval."""
    first, last = (int(edge * table.num_steps) for edge in interval)
    return np.asarray((table.steps >= first) & (table.steps < last))


def check_fields(spec: Any) -> None:
    """Raise ValueError unless a dataclass's fields are what their annotations say: finite scales (functions are checked
    when they are called), an Interval, one of `_LIMITS`, or None where that is allowed. Numbers of other types become
    Python's."""
    for field in fields(spec):
        name, value = field.name, getattr(spec, field.name)
        kind = str(field.type).removesuffix("" if value is None else " | None")
        if kind in ("Scale", "Scales"):
            scales = {name: value} if kind == "Scale" else {f"{name}[{key!r}]": value[key] for key in value}
            for label, scale in scales.items():
                if not callable(scale):
                    finite_scale(label, scale)
        elif kind == "Interval":
            edges = [as_decimal(edge) for edge in value] if isinstance(value, Sequence | np.ndarray) else []
            start, stop = edges if len(edges) == 2 else (None, None)
            if start is None or stop is None or not 0 <= start < stop <= 1:
                raise ValueError(f"{name}: got {value!r}, expected 0 <= start < stop <= 1")
            object.__setattr__(spec, name, (start, stop))
        elif kind in _LIMITS:
            least, most, expected = _LIMITS[kind]
            number = as_integer(value) if kind == "Count" else as_number(value)
            if number is None or not math.isfinite(number) or not least <= number <= most:
                raise ValueError(f"{name}: got {value!r}, expected {expected}")
            object.__setattr__(spec, name, number)


def dimensions(scale: Any) -> int:
    """How many dimensions a scale has that is no function."""
    return int(scale.ndim) if hasattr(scale, "ndim") else np.ndim(scale)


def finite_scale(name: str, scale: Any) -> NDArray[np.float64]:
    """A scale that is no function, as an array; ValueError unless it is of finite numbers."""
    try:
        if hasattr(scale, "is_floating_point") and scale.is_floating_point():
            scale = scale.detach().cpu().double()  # numpy lacks bfloat16
        given = np.asarray(scale.detach().cpu() if hasattr(scale, "detach") else scale)
        # A bool is a switch that took the place of a scale.
        values = given.astype(np.float64) if given.dtype != np.bool_ else np.array(np.nan)
    except (TypeError, ValueError):
        values = np.array(np.nan)
    if not np.isfinite(values).all():
        got = f"shape {values.shape} with others" if values.ndim > 2 else repr(scale)
        raise ValueError(f"{name}: got {got}, expected finite numbers")
    return values


def _finite(name: str, scale: Any) -> NDArray[np.float64]:
    values = finite_scale(name, scale)
    if values.ndim > 2:
        expected = "at most two dimensions: scales by place, as arrays, are a `Sampler`'s"
        raise ValueError(f"{name}: got shape {values.shape}, expected {expected}")
    return values
