"""What a traced step returns and changes, described by its inputs and by sums."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...combination import Combination
from ...utils.identity import is_self_contained

# Where a tensor comes from: ("sample",), ("output",), ("state", attribute, *keys), ("option", name), ("draw", number).
Source = tuple[Any, ...]
SAMPLE, OUTPUT = ("sample",), ("output",)


class UntraceableError(ValueError):
    """A step that is no sum of tensors, or does what cannot be reproduced; the message says why. `reads` and `config`
    are what it read until this was found."""

    reads: frozenset[str] = frozenset()
    config: frozenset[str] | None = frozenset()


class Sum(NamedTuple):
    """A part of a result: the combination's output of this number."""

    number: int


class Given(NamedTuple):
    """A part of a result: the object that the caller or the scheduler's state gave."""

    source: Source


class Means(NamedTuple):
    """A part of a result: the model's output without its variance channels, as a view."""


class Small(NamedTuple):
    """A part of a result: a new tensor of at most one dimension, such as a level."""

    value: Tensor


class Constant(NamedTuple):
    """A part of a result: a value without tensors."""

    value: Any


class Container(NamedTuple):
    """A part of a result: a list or tuple of parts; with keys, a dictionary."""

    kind: Callable[..., Any]
    parts: tuple[Any, ...]
    keys: tuple[Any, ...] | None = None


Part = Sum | Given | Means | Small | Constant | Container
# What the caller gave as the timestep.
TIMESTEP = Given(("timestep",))


class Write(NamedTuple):
    """A change that a step makes of what is at a source, ("state", attribute, *keys). How: "set" gives the attribute or
    item a new value; "fill" gives a list, which stays the same object, new items; "copy" changes a tensor in place,
    which may be the caller's."""

    source: Source
    part: Part
    how: str = "set"


@dataclass(frozen=True)
class Draw:
    """A draw of noise of the sample's shape: the function, an attribute of a module, and its arguments beside shape,
    generator and device, which are the caller's."""

    module: Any
    name: str
    function: Callable[..., Tensor]
    dtype: torch.dtype | None
    like: bool = False  # called as torch.randn_like
    generator: bool = False
    device: bool = False


@dataclass(frozen=True, eq=False)
class TracedStep:
    """A step as sums.

    Attributes:
        reads: the attributes of the scheduler that decided about it, but its config.
        config: the config's items that did; None for the whole config.
        of_class: what the step read of the class, by name.
        sources: of the combination's inputs; the first is the sample, the second the model's output.
        combination: the sums; None if nothing is computed.
        dtypes: of the combination's outputs.
        orders: of their dimensions in memory, the largest stride first; None for the sample's.
        draws: all of the step's, used or not, in its order.
        result: what the step returns.
        writes: what it changes in the scheduler, in order.
    """

    reads: frozenset[str]
    config: frozenset[str] | None
    of_class: Mapping[str, Any]
    sources: tuple[Source, ...]
    combination: Combination | None
    dtypes: tuple[torch.dtype, ...]
    orders: tuple[tuple[int, ...] | None, ...]
    draws: tuple[Draw, ...]
    result: Part
    writes: tuple[Write, ...]


# Without state of their own.
_NUMBERS = {type(None), bool, int, float, str}
_PLAIN = (complex, bytes, range, enum.Enum, torch.dtype, torch.device, np.generic, type)


def are_numbers(values: Any) -> bool:
    """Whether a list or the like has nothing but numbers and strings."""
    return set(map(type, values)) <= _NUMBERS


def is_plain(value: Any) -> bool:
    """Whether a value has neither tensors nor a state of its own."""
    if type(value) in _NUMBERS:
        return True
    if isinstance(value, tuple | list | set | frozenset):
        return are_numbers(value) or all(map(is_plain, value))
    if isinstance(value, FunctionType):
        return is_self_contained(value)
    return isinstance(value, (*_PLAIN, *_NUMBERS))


def same_parts(a: Any, b: Any) -> bool:
    """Whether two descriptions are the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, partial) and isinstance(b, partial):
        return a.args == b.args
    if isinstance(a, tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(same_parts, a, b))
    return type(a) is type(b) and bool(a == b)


def has_number(part: Any, numbers: tuple[int, ...]) -> bool:
    """Whether a description has a constant that is one of some numbers, or divisible by the product of two."""
    if isinstance(part, Constant):
        return _has_number(part.value, numbers)
    return isinstance(part, tuple) and any(has_number(item, numbers) for item in part)


def _has_number(value: Any, numbers: tuple[int, ...]) -> bool:
    if isinstance(value, tuple | list | set | frozenset):
        return any(_has_number(item, numbers) for item in value)
    if type(value) not in (int, float) or not value:
        return False
    return value in numbers or any(value % (a * b) == 0 for a, b in combinations(numbers, 2))
