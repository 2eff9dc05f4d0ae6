"""What a function refers to beside its arguments: globals, captured variables and defaults, followed through the
functions that it calls; and keys by value for objects."""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..utils.identity import NoValueError, Same, value_key

# Packages whose functions are taken to do the same every time.
_LIBRARIES = {"torch", "numpy", "scipy", "math", "tqdm", "functools", "torchsde", "builtins", "itertools", "typing"}
_LIBRARIES |= {"einops", "torchdiffeq"}
_MOST = 2000
_LARGEST = 1 << 20  # elements of a tensor that is known by its contents

# Contexts that decorate functions.
_GRADIENTS = torch.no_grad | torch.enable_grad | torch.inference_mode | torch.set_grad_enabled


class Surroundings:
    """What a function refers to, as it was.

    Args:
        function: the function, or a method or object that is called.
        objects: whether it may refer to objects and tensors. What it changes of them `unchanged` shows afterwards.

    Attributes:
        constant: whether all of it is numbers, strings, functions, classes, modules, and objects that have a key by
            value, so that the function does the same as long as `unchanged`.
    """

    def __init__(self, function: Any, objects: bool = False) -> None:
        self._by_value = objects
        self._reads: list[tuple[Any, str, Any]] = []  # (where, name, value)
        self._seen: dict[int, Any] = {}
        self._objects: list[tuple[Any, Hashable]] = []  # with their keys
        self.constant = self._visit(function)

    def unchanged(self) -> bool:
        """Whether every name still stands for the same object, and objects have the same contents."""
        try:
            same = all(contents_of(value) == key for value, key in self._objects)
        except NoValueError:
            return False
        return same and all(_read(where, name) is value for where, name, value in self._reads)

    def _visit(self, value: Any) -> bool:
        if id(value) in self._seen:
            return True
        self._seen[id(value)] = value
        if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
            return True
        if isinstance(value, tuple | frozenset):
            return all(map(self._visit, value))
        if isinstance(value, _GRADIENTS | types.ModuleType):
            return True
        if isinstance(value, types.BuiltinFunctionType):
            return isinstance(value.__self__, types.ModuleType | type | None)
        if isinstance(value, types.MethodType):
            return self._visit(value.__func__) and self._visit(value.__self__)
        if isinstance(value, functools.partial):
            return all(map(self._visit, (value.func, value.args, *value.keywords.values())))
        if isinstance(value, type | types.FunctionType) and _is_library(value) and not hasattr(value, "__wrapped__"):
            return True
        if isinstance(value, type):
            return all(self._visit(member) for member in vars(value).values() if isinstance(member, types.FunctionType))
        if isinstance(value, types.FunctionType):
            return self._visit_function(value)
        return self._by_value and type(value) not in (list, dict, set) and self._visit_object(value)

    @property
    def has_objects(self) -> bool:
        """Whether it refers to objects or tensors."""
        return bool(self._objects)

    def _visit_object(self, value: Any) -> bool:
        try:
            self._objects.append((value, contents_of(value)))
        except NoValueError:
            return False
        kinds = [kind for kind in type(value).__mro__ if not _is_library(kind)]
        inside = vars(value).values() if hasattr(value, "__dict__") else ()
        return all(map(self._visit, (*kinds, *active(inside))))

    def _visit_function(self, function: types.FunctionType) -> bool:
        for part in ("__code__", "__defaults__", "__kwdefaults__"):
            self._reads.append((function, part, getattr(function, part)))
        found = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        names = set(all_names(function.__code__))
        sources: list[tuple[Any, str]] = [(cell, "") for cell in function.__closure__ or ()]
        for name in names:
            sources.append((function.__globals__, name))
            module = function.__globals__.get(name)
            if isinstance(module, types.ModuleType) and not _is_library(module):
                sources += [(module, attribute) for attribute in names if hasattr(module, attribute)]
        for where, name in sources:
            value = _read(where, name)
            self._reads.append((where, name, value))
            found += [] if value is where else [value]
        return len(self._reads) < _MOST and all(map(self._visit, found))


def _is_library(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    return (name or "").partition(".")[0] in _LIBRARIES


def all_names(code: types.CodeType) -> Iterator[str]:
    """The names in a function's code, and in that of the functions in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from all_names(constant)


def _read(where: Any, name: str) -> Any:
    """A value by name; `where` itself if there is none."""
    if isinstance(where, dict):
        return where.get(name, where)
    try:
        return where.cell_contents if isinstance(where, types.CellType) else getattr(where, name)
    except (ValueError, AttributeError):
        return where


def contents_of(value: Any) -> Hashable:
    """A key by value. Objects are keyed by their attributes, methods by those that their code names, functions by
    themselves.

    Raises:
        NoValueError: there is none: networks, large tensors, objects that refer to themselves.
    """
    try:
        return _contents_of(value)
    except RecursionError:
        raise NoValueError from None


def _contents_of(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        if value.numel() > _LARGEST or value.is_inference():
            raise NoValueError
        return value_key(value) if value.device.type == "cpu" else (Same(value), value._version)
    if isinstance(value, list | tuple | dict):
        items = (*value, *value.values()) if isinstance(value, dict) else value
        return type(value), tuple(map(contents_of, items))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(_contents_of, value))
    if isinstance(value, types.MethodType):
        names = set(all_names(value.__func__.__code__)) if hasattr(value.__func__, "__code__") else set()
        read = {name: getattr(value.__self__, name) for name in sorted(names) if hasattr(value.__self__, name)}
        return Same(value.__func__), tuple((name, _contents_of(item)) for name, item in read.items())
    if isinstance(value, types.FunctionType | type):
        return Same(value)
    if isinstance(value, nn.Module):
        raise NoValueError
    if isinstance(value, enum.Enum):
        return Same(value)
    if type(value).__module__.partition(".")[0] in ("builtins", "torch", "numpy") or not hasattr(value, "__dict__"):
        return value_key(value)
    items = (*vars(value).items(), *class_data(type(value)))
    return type(value), tuple((name, _contents_of(item)) for name, item in items)


def class_data(kind: type) -> Iterator[tuple[str, Any]]:
    """The attributes of a class and its bases that are no functions or the like."""
    for base in kind.__mro__:
        if not _is_library(base):
            for name, value in vars(base).items():
                if not name.startswith("__") and not callable(value) and not hasattr(type(value), "__get__"):
                    yield name, value


def active(values: Iterable[Any]) -> Iterator[Any]:
    """The functions and objects among values, and in their containers."""
    for value in values:
        if isinstance(value, list | tuple | set | frozenset):
            yield from active(value)
        elif isinstance(value, dict):
            yield from active(value.values())
        elif isinstance(value, types.FunctionType | types.MethodType) or (
            hasattr(value, "__dict__") and not isinstance(value, type) and not _is_library(type(value))
        ):
            yield value
