"""The state that a caller's functions refer to, as it was at one time."""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .holders import Attributes, Holder, ModuleVariables, Series, State, Variables, is_users, is_users_module, slots
from .staleness import MAX_ITEMS

# What is larger is no model's state: a walk ends there.
_MAX_HOLDERS, _MAX_ELEMENTS = 100_000, 65_536
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)
# Attributes of a module whose contents are named without them.
_UNNAMED = ("_buffers", "_parameters", "_modules")


class Snapshot:
    """What some functions refer to, through modules, objects, containers, closures and globals.

    Attributes:
        tensors: those that were reached, by name. What they contain is not kept.

    Example:
        >>> model = nn.Module()
        >>> before = Snapshot({"model": model})
        >>> model.count = 3
        >>> before.changes()
        {'model.count': 3}
        >>> before.restore()
        >>> hasattr(model, "count")
        False
    """

    def __init__(self, functions: Mapping[str, Any]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._holders: list[Holder] = [
            State("Python's random", random.getstate, random.setstate),
            State("numpy.random", np.random.get_state, np.random.set_state),
        ]
        self._generators: list[Holder] = []  # torch's: a graph moves them too
        self._seen: dict[int, Any] = {}  # kept alive: an id must not be used again
        waiting = list(functions.items())
        while waiting and len(self._holders) < _MAX_HOLDERS:
            name, value = waiting.pop()
            if not isinstance(value, _PLAIN) and id(value) not in self._seen:
                self._seen[id(value)] = value
                waiting += self._visit(name, value)

    def changes(self) -> dict[str, Any]:
        """The values now that are others, by name; `ABSENT` for what is gone. torch's generators are not among them."""
        items = ((holder, key, value) for holder in self._holders for key, value in holder.changes().items())
        return {_joined(holder.name, key): value for holder, key, value in items}

    def restore(self) -> None:
        """Put back everything but the contents of tensors."""
        for holder in self._holders:
            holder.restore()
        self.restore_generators()

    def restore_generators(self) -> None:
        """Put back torch's generators that the functions refer to."""
        for holder in self._generators:
            holder.restore()

    def _visit(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Keep what a value holds; yields what it refers to, by name."""
        if isinstance(value, Tensor):
            self.tensors[name] = value
        elif isinstance(value, torch.Generator):
            self._generators.append(_of_generator(name, value))
        elif isinstance(value, tuple):
            yield from ((_joined(name, key), item) for key, item in enumerate(value))
        elif isinstance(value, types.MethodType):
            yield from ((name, value.__self__), (_joined(name, "func"), value.__func__))
        elif isinstance(value, partial):
            yield from ((name, value.func), (name, value.args), (name, value.keywords))
        else:
            for holder in _holders(name, value):
                self._holders.append(holder)
                if not isinstance(holder, State):  # which holds a copy
                    yield from ((_joined(holder.name, key), item) for key, item in holder.before.items())
            if is_users(type(value)):
                yield from _class_parts(name, type(value))


def _holders(name: str, value: Any) -> Iterator[Holder]:
    """What may change under a value."""
    if isinstance(value, types.FunctionType):
        yield (of_function := Variables(name, value))
        for key, item in of_function.before.items():
            if is_users_module(item):
                yield ModuleVariables(f"{name}.{key}", item, value)
        if vars(value):
            yield Holder(name, vars(value))
        return
    if isinstance(value, dict | list | deque | set) and len(value) <= MAX_ITEMS:
        yield Holder(name, value) if isinstance(value, dict) else Series(name, value)
    elif isinstance(value, np.ndarray) and value.size <= _MAX_ELEMENTS:
        yield State(name, value.copy, partial(value.__setitem__, ...))
    elif isinstance(value, random.Random):
        yield State(name, value.getstate, value.setstate)
    elif isinstance(value, np.random.RandomState):
        yield State(name, value.get_state, value.set_state)
    elif isinstance(value, np.random.Generator):
        generator = value.bit_generator
        yield State(name, lambda: generator.state, partial(setattr, generator, "state"))
    if isinstance(value, type):
        if is_users(value):
            yield Attributes(name, value)
    elif isinstance(value, nn.Module | types.SimpleNamespace) or is_users(type(value)):
        if isinstance(attributes := getattr(value, "__dict__", None), dict):
            yield Holder(name, attributes)
        if slots(type(value)):
            yield Attributes(name, value)


def _class_parts(name: str, kind: type) -> Iterator[tuple[str, Any]]:
    """The classes of an object, for their attributes, and their methods, for the variables these name."""
    for base in kind.__mro__:
        if is_users(base):
            yield name, base
            for value in vars(base).values():
                function = getattr(value, "__func__", getattr(value, "fget", value))
                if isinstance(function, types.FunctionType):
                    yield name, function


def _of_generator(name: str, generator: torch.Generator) -> State:
    return State(name, generator.get_state, generator.set_state)


def _joined(name: str, key: Any) -> str:
    return name if key == "" or key in _UNNAMED else f"{name}.{key}"
