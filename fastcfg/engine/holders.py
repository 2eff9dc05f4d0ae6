"""What holds values that a call may replace: attributes, containers, variables of functions, random generators."""

from __future__ import annotations

import ast
import itertools
import types
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .staleness import LIBRARIES, named, variables

# Compared by value; everything else is the same only if it is the same object.
_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device, range, slice)
# What a class has beside its data.
_METHODS = (types.FunctionType, property, classmethod, staticmethod, types.MemberDescriptorType)

Items = dict[Any, Any]


class _Absent:
    def __repr__(self) -> str:
        return "<absent>"


ABSENT = _Absent()


class Holder:
    """The values that something refers to, by key, as they were when this was made."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value
        self.before = {key: _copied(item) for key, item in self.read().items()}

    def read(self) -> Items:
        """The values now."""
        return dict(self.value)

    def write(self, before: Items, now: Items) -> None:
        """Make the values those of `before`; `now` is what they are."""
        for key in now.keys() - before.keys():
            del self.value[key]
        if list(self.value) != [key for key in before if key in self.value]:
            self.value.clear()  # in their order
        for key, item in before.items():
            if not same(self.value.get(key, ABSENT), item):
                self.value[key] = item

    def changes(self) -> Items:
        """The values now, by key, that are others; ABSENT where there is none any more."""
        now, before = self.read(), self.before
        changed = {key: item for key, item in now.items() if not same(before.get(key, ABSENT), item)}
        return changed | {key: ABSENT for key in before if key not in now}

    def restore(self) -> None:
        """Put back what changed."""
        now = self.read()
        if self.changes() or list(now) != list(self.before):
            self.write({key: _copied(item) for key, item in self.before.items()}, now)


class Series(Holder):
    """A list, deque or set."""

    def read(self) -> Items:
        return dict.fromkeys(self.value) if isinstance(self.value, set) else dict(enumerate(self.value))

    def write(self, before: Items, now: Items) -> None:
        self.value.clear()
        add = self.value.update if isinstance(self.value, set) else self.value.extend
        add(before if isinstance(self.value, set) else before.values())


class Attributes(Holder):
    """Those of a class, its methods left out, or those that an object keeps in slots."""

    def read(self) -> Items:
        if not isinstance(self.value, type):
            names = slots(type(self.value))
            return {name: getattr(self.value, name) for name in names if hasattr(self.value, name)}
        data = vars(self.value).items()
        return {
            key: item for key, item in data if not key.startswith(("__", "_abc_")) and not isinstance(item, _METHODS)
        }

    def write(self, before: Items, now: Items) -> None:
        # Past the __setattr__ of frozen dataclasses.
        kind: Any = type if isinstance(self.value, type) else object
        for key in now.keys() - before.keys():
            kind.__delattr__(self.value, key)
        for key, item in before.items():
            if not same(now.get(key, ABSENT), item):
                kind.__setattr__(self.value, key, item)


class Variables(Holder):
    """The variables that a function's code names: closure, defaults and globals."""

    def read(self) -> Items:
        defaults = {"defaults": self.value.__defaults__, "kwdefaults": self.value.__kwdefaults__}
        return dict(variables(self.value)) | defaults

    def write(self, before: Items, now: Items) -> None:
        cells = dict(zip(self.value.__code__.co_freevars, self.value.__closure__ or (), strict=True))
        scope = self.value.__globals__
        for key in now.keys() - before.keys():
            if key in cells:
                del cells[key].cell_contents
            else:
                scope.pop(key, None)
        for key, item in before.items():
            if key in cells:
                cells[key].cell_contents = item
            elif key in scope or key not in now:
                scope[key] = item


class ModuleVariables(Holder):
    """The variables of a Python module that a function's code may name."""

    def __init__(self, name: str, module: types.ModuleType, function: types.FunctionType) -> None:
        self._keys = named(function.__code__)
        super().__init__(name, vars(module))

    def read(self) -> Items:
        return {key: self.value[key] for key in self._keys if key in self.value}

    def write(self, before: Items, now: Items) -> None:
        for key in now.keys() - before.keys():
            del self.value[key]
        self.value.update(before)


class State(Holder):
    """Something that is read and put back as a whole, such as a random generator."""

    def __init__(self, name: str, get: Callable[[], Any], put: Callable[[Any], object]) -> None:
        self._get, self._put = get, put
        super().__init__(name, None)

    def read(self) -> Items:
        return {"": self._get()}

    def write(self, before: Items, now: Items) -> None:
        self._put(before[""])

    def changes(self) -> Items:
        now = self.read()
        return {} if alike(now, self.before) else now


def same(a: Any, b: Any) -> bool:
    """Whether two values are one object, or equal where they are plain."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple) and not isinstance(a, torch.Size):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, types.MethodType):
        return a.__self__ is b.__self__ and a.__func__ is b.__func__
    if isinstance(a, _VALUES):
        return bool(a == b) or repr(a) == repr(b)  # NaN equals itself
    return isinstance(a, itertools.count) and repr(a) == repr(b)


def alike(a: Any, b: Any) -> bool:
    """Whether two values have the same contents, tensors' included."""
    if same(a, b):
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and _same_bits(a, b)
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(map(alike, a.values(), b.values()))
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, partial):
        return alike((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if isinstance(a, set | frozenset):
        return bool(a == b)
    attributes = getattr(a, "__dict__", None)
    return isinstance(attributes, dict) and not callable(a) and alike(attributes, vars(b))


def contents(value: Any) -> Any:
    """A value with copies of the tensors and containers in it, which keeps what they hold now."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in (dict, list, tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        copied = {key: contents(item) for key, item in items}
        return copied if isinstance(value, dict) else type(value)(copied.values())
    return _copied(value)


def is_users(kind: type) -> bool:
    """Whether objects of a class may hold a model's state: those of most libraries do not."""
    top = str(kind.__module__).partition(".")[0]
    if top == "fastcfg":  # wrapped models, but no samplers
        return any("__call__" in vars(base) for base in kind.__mro__)
    return top not in LIBRARIES and not issubclass(kind, types.ModuleType | BaseException)


def is_users_module(value: Any) -> bool:
    """Whether a value is a Python module that is none of a library's."""
    return isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] not in LIBRARIES


def slots(kind: type) -> list[str]:
    """The names under which objects of a class keep values outside their `__dict__`."""
    members = [vars(base).items() for base in kind.__mro__]
    found = [name for items in members for name, item in items if isinstance(item, types.MemberDescriptorType)]
    return [name for name in found if not name.startswith("__")]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    try:
        return torch.equal(*(t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)))
    except (RuntimeError, NotImplementedError):  # without storage
        return False


def _copied(item: Any) -> Any:
    """The item, or for a counter, which has no other way back, a counter that stands where it does."""
    if isinstance(item, itertools.count):
        start = ast.literal_eval(repr(item).removeprefix("count"))
        return itertools.count(*start) if isinstance(start, tuple) else itertools.count(start)
    return item
