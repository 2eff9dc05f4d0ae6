"""Checks of arguments: each returns the value it checked, in its plain Python type, or raises ValueError with the
message "name: got ..., expected ...".

Numbers are recognised by protocol: numpy scalars and 0-d arrays and tensors count. A bool is no number.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Complex, Real
from typing import Any, TypeVar, cast

import numpy as np

T = TypeVar("T")


def as_integer(value: Any) -> int | None:
    """The value as an int, or None if it is not an integer. A float is none, whatever its value."""
    if not _is_scalar(value):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):
        return None


def as_number(value: Any) -> float | None:
    """The value as a float (which may be infinite or NaN), or None if it is not a real number."""
    is_complex = isinstance(value, Complex) and not isinstance(value, Real)
    if is_complex or not _is_scalar(value) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def as_decimal(value: Any) -> float | None:
    """`as_number`, of half and single precision the shortest decimal that is rounded to it: a share of 0.7 of 10 steps
    has 7 in any precision, not the 6 of 0.699999988."""
    number, kind = as_number(value), str(getattr(value, "dtype", "")).removeprefix("torch.")
    if number is None or kind not in ("float16", "float32"):
        return number
    return float(str(getattr(np, kind)(number)))


def plain(value: Any) -> Any:
    """A number as Python's int or float, whatever its type; anything else as it is."""
    if isinstance(value, bool | int | float | str | None):
        return value
    integer = as_integer(value)
    number = as_number(value) if integer is None else integer
    return value if number is None else number


Function = TypeVar("Function", bound=Callable[..., Any])


def takes_numbers(function: Function) -> Function:
    """The function, given all arguments that are numbers as `plain` ones."""

    @functools.wraps(function)
    def with_plain_numbers(*args: Any, **options: Any) -> Any:
        return function(*map(plain, args), **{name: plain(value) for name, value in options.items()})

    return cast(Function, with_plain_numbers)


def check_count(name: str, value: Any, most: int | None = None, least: int = 1) -> int:
    """An integer from `least` to `most` (None: no upper limit)."""
    count = as_integer(value)
    if count is None or count < least or (most is not None and count > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: got {value!r}, expected an integer {limits}")
    return count


def check_seed(seed: int) -> int:
    """The seed, or ValueError for one beyond 64 bits, signed or not: torch's generators refuse the same."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: got {seed}, expected -2**63 to 2**64 - 1")
    return seed


def check_finite(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> float:
    """A finite number, of at least `least` or above `above` where given."""
    number = as_number(value)
    low = number is None or (least is not None and number < least) or (above is not None and number <= above)
    if number is not None and not low and math.isfinite(number):
        return number
    expected = "a finite number"
    if least is not None or above is not None:
        expected = f"a finite value of at least {least:g}" if least is not None else f"a finite value above {above:g}"
    raise ValueError(f"{name}: got {value!r}, expected {expected}")


def check_one_of(name: str, value: T, choices: Collection[T]) -> T:
    """One of some choices."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(str, choices))}")
    return value


def check_shape(name: str, shape: Any, least: int = 2, form: str = "(B, C, ...)") -> tuple[int, ...]:
    """A sequence, or vector, of at least `least` positive integers; `form` describes it in the message."""
    is_sequence = isinstance(shape, Sequence) and not isinstance(shape, str)
    sizes = [as_integer(size) for size in shape] if is_sequence or getattr(shape, "ndim", 0) == 1 else []
    checked = tuple(size for size in sizes if size is not None and size > 0)
    if len(checked) < least or len(checked) != len(sizes):
        raise ValueError(f"{name}: got {shape!r}, expected {form} of positive integers")
    return checked


def listed(names: Iterable[object], most: int | None = None) -> str:
    """Names separated by commas: the first `most`, and how many more there are; "nothing" if there are none."""
    words = [str(name) for name in names]
    more = 0 if most is None else max(len(words) - most, 0)
    return (", ".join(words[:most]) or "nothing") + (f" and {more} more" if more else "")


def _is_scalar(value: Any) -> bool:
    """Whether a value has no dimensions and is no bool."""
    dimensions: int = getattr(value, "ndim", 0)
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
    return not dimensions and not is_bool
