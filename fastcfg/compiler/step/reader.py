"""Describe what a run of a step returned and changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .parts import (
    OUTPUT,
    Constant,
    Container,
    Given,
    Means,
    Part,
    Small,
    Source,
    Sum,
    UntraceableError,
    Write,
    is_plain,
)
from .run import Outcome
from .tensors import OURS, Examples, order_of


class Reader:
    """Describes the results and changes of a run on examples, by its inputs and by sums.

    Attributes:
        result, writes: the descriptions.
        dtypes, orders: of the sums, and of their dimensions in memory.
    """

    def __init__(self, examples: Examples, trial: Outcome) -> None:
        self.examples, self.trial = examples, trial
        self._numbers: dict[int, int] = {}
        self._paths: list[tuple[Any, ...]] = []
        self.dtypes: list[torch.dtype] = []
        self.orders: list[tuple[int, ...]] = []
        self.result = self._part(trial.result, ("result",))
        self.writes = tuple(self._writes())

    def _part(self, value: Any, path: tuple[Any, ...]) -> Part:
        """A value that the step returned or kept, at a path."""
        if (source := self.trial.given.get(id(value))) is not None:
            return Given(source)
        if isinstance(value, Tensor):
            if value.ndim < 2:
                return Small(value.clone())
            if tuple(value.shape) != self.examples.shape or not value.is_floating_point():
                raise UntraceableError(f"its step makes a tensor of {value.dtype} of another shape than the sample")
            return Means() if self._is_view(value) else self._sum(value, path)
        if is_plain(value):
            return Constant(value)
        if isinstance(value, Mapping):
            parts = [self._part(item, (*path, key)) for key, item in value.items()]
            return Container(type(value), tuple(parts), tuple(value))
        if isinstance(value, tuple | list):
            kind = getattr(type(value), "_make", type(value))
            return Container(kind, tuple(self._part(item, (*path, key)) for key, item in enumerate(value)))
        if hasattr(value, "__dict__"):
            names, made = tuple(vars(value)), _objects(type(value))  # type: ignore[arg-type]
            return Container(made, tuple(self._part(item, (*path, key)) for key, item in vars(value).items()), names)
        raise UntraceableError(f"its step makes a {type(value).__name__}")

    def _is_view(self, value: Tensor) -> bool:
        """Whether a tensor is the output's first channels; UntraceableError for another view of an input."""
        memory = value.untyped_storage().data_ptr()
        for tensor, _ in self.trial.kept:
            if tensor.ndim > 1 and tensor.untyped_storage().data_ptr() == memory:
                whole = self.trial.given[id(tensor)] == OUTPUT and tensor.shape != value.shape
                if whole and value.storage_offset() == 0 and value.stride() == tensor.stride():
                    return True
                raise UntraceableError("its step returns or keeps a view of what it was given")
        return False

    def _sum(self, value: Tensor, path: tuple[Any, ...]) -> Sum:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._paths)
            self._paths.append(path)
            self.dtypes.append(value.dtype)
            self.orders.append(order_of(value))
        return Sum(self._numbers[id(value)])

    def _writes(self) -> Iterator[Write]:
        """The changes of the scheduler's attributes."""
        before, after = self.trial.before, self.trial.after
        if missing := sorted(set(before) - set(after)):
            raise UntraceableError(f"its step deletes {', '.join(missing)}")
        for name, value in after.items():
            if not name.startswith(OURS):
                yield from self._changes(value, before.get(name), ("state", name))
        for tensor in self.trial.changed:
            source = self.trial.given[id(tensor)]
            yield Write(source, self._sum(tensor, ("given", source)), "copy")

    def _changes(self, value: Any, before: Any, source: Source) -> Iterator[Write]:
        path = ("after", *source[1:])
        if before is None or value is not before[0]:
            if before is not None and type(value) is type(before[0]) and is_plain(value) and value == before[0]:
                return
            yield Write(source, self._part(value, path))
        elif type(value) is list and len(value) != len(before[1]):
            parts = tuple(self._part(item, (*path, key)) for key, item in enumerate(value))
            yield Write(source, Container(list, parts), "fill")
        elif type(value) is list:
            for key, (item, old) in enumerate(zip(value, before[1], strict=True)):
                old = old if isinstance(old, tuple) else (old, None)  # of a list of numbers
                if item is not old[0] or old[1] is not None:
                    yield from self._changes(item, old, (*source, key))
        elif type(value) is dict:
            if set(before[1]) - set(value):
                raise UntraceableError(f"its step deletes items of {source[1]}")
            for key, item in value.items():
                yield from self._changes(item, before[1].get(key), (*source, key))
        elif isinstance(value, np.ndarray) and not np.array_equal(value, before[1]):
            raise UntraceableError(f"its step changes {source[1]} in place")

    def sums_of(self, outcome: Outcome) -> list[Tensor]:
        """The tensors of another run where this one's sums are."""
        found = []
        tensors = {outcome.given.get(id(tensor)): tensor for tensor, _ in outcome.kept}
        for first, *path in self._paths:
            value: Any = {"result": outcome.result, "after": outcome.after, "given": tensors}[first]
            try:
                for key in path:
                    value = value[key] if isinstance(value, Mapping | tuple | list) else getattr(value, key)
            except (KeyError, IndexError, AttributeError):
                value = None
            if not isinstance(value, Tensor):
                raise UntraceableError("its step does other things in float64")
            found.append(value)
        return found


@cache
def _objects(kind: Any) -> Any:
    """A function that makes an object of a class with attributes, always the same one."""
    return partial(_object, kind)


def _object(kind: type, **attributes: Any) -> Any:
    new: Any = object.__new__(kind)
    vars(new).update(attributes)
    return new
