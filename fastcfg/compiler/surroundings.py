"""What a function refers to beside its arguments: globals, captured variables and defaults, followed through the
functions that it calls."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch

# Packages whose functions are taken to do the same every time.
_LIBRARIES = {"torch", "numpy", "scipy", "math", "tqdm", "functools", "torchsde", "builtins", "itertools", "typing"}
_MOST = 2000

# Contexts that decorate functions.
_GRADIENTS = torch.no_grad | torch.enable_grad | torch.inference_mode | torch.set_grad_enabled


class Surroundings:
    """What a function refers to, as it was.

    Attributes:
        constant: whether all of it is numbers, strings, functions, classes and modules, so that the function does the
            same as long as `unchanged`.
    """

    def __init__(self, function: Any) -> None:
        self._reads: list[tuple[Any, str, Any]] = []  # (where, name, value)
        self._seen: dict[int, Any] = {}
        self.constant = self._visit(function)

    def unchanged(self) -> bool:
        """Whether every name still stands for the same object."""
        return all(_read(where, name) is value for where, name, value in self._reads)

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
        return isinstance(value, types.FunctionType) and self._visit_function(value)

    def _visit_function(self, function: types.FunctionType) -> bool:
        for part in ("__code__", "__defaults__", "__kwdefaults__"):
            self._reads.append((function, part, getattr(function, part)))
        found = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        names = set(_names(function.__code__))
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


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _read(where: Any, name: str) -> Any:
    """A value by name; `where` itself if there is none."""
    if isinstance(where, dict):
        return where.get(name, where)
    try:
        return where.cell_contents if isinstance(where, types.CellType) else getattr(where, name)
    except (ValueError, AttributeError):
        return where
