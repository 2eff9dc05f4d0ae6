"""Keys for caches: objects compared by identity, by value, or by what a re-created function does."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch


class Same:
    """Equal for the same object (`value`), which it keeps alive: a freed object's id may be given to another one."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class Alike(Same):
    """Also equal for re-created closures: same code, same (or equal) captured values and defaults. Methods and partials
    are compared part by part."""

    def __eq__(self, other: object) -> bool:
        try:
            return isinstance(other, Alike) and _alike(self.value, other.value)
        except RecursionError:  # functions that refer to themselves
            return False

    def __hash__(self) -> int:
        value = self.value
        while isinstance(value, partial | MethodType):
            value = value.func if isinstance(value, partial) else value.__func__
        return id(value.__code__ if isinstance(value, FunctionType) else value)


def _alike(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, FunctionType):
        return a.__code__ is b.__code__ and a.__globals__ is b.__globals__ and _alike(_captured(a), _captured(b))
    if isinstance(a, MethodType):
        return a.__func__ is b.__func__ and a.__self__ is b.__self__
    if isinstance(a, partial):
        return _alike((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if type(a) is dict:
        return list(a) == list(b) and all(map(_alike, a.values(), b.values()))
    return isinstance(a, bool | int | float | str) and a == b


def _captured(function: FunctionType) -> tuple[Any, ...]:
    """A function's closure and defaults. An empty cell equals only itself."""
    cells = function.__closure__ or ()
    try:
        contents = tuple(cell.cell_contents for cell in cells)
    except ValueError:
        contents = cells
    return contents, function.__defaults__ or (), function.__kwdefaults__ or {}


def identity_key(value: Any) -> Any:
    """A key by value for numbers, strings and containers, and by identity for everything else."""
    if isinstance(value, tuple | list):
        return (type(value), *map(identity_key, value))
    if isinstance(value, dict):
        return (dict, *((key, identity_key(item)) for key, item in value.items()))
    if isinstance(value, int | float | str | bytes | torch.dtype | None):
        return type(value), value
    return Same(value)


class NoValueError(Exception):
    """An object cannot be compared by value."""


def value_key(value: Any) -> Hashable:
    """A key by value for numbers, strings, CPU tensors, arrays, self-contained functions, and containers of them.

    Raises:
        NoValueError: anything else.
    """
    if isinstance(value, float):
        return type(value), value.hex()  # 0.0 is not -0.0, and NaN is NaN
    if value is None or isinstance(value, bool | int | str | torch.dtype | torch.device | type):
        return type(value), value
    if isinstance(value, torch.Tensor) and value.device.type == "cpu":
        return torch.Tensor, value.dtype, tuple(value.shape), host_array(value).tobytes()
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return np.ndarray, value.dtype, value.shape, value.tobytes()
    if isinstance(value, Mapping):
        # diffusers' configurations are read by item and by attribute, which may differ.
        attributes = value_key(vars(value)) if hasattr(value, "__dict__") else ()
        return type(value), tuple((value_key(name), value_key(item)) for name, item in value.items()), attributes
    if isinstance(value, FunctionType) and is_self_contained(value):
        return FunctionType, value.__code__, value_key(value.__defaults__), value_key(value.__kwdefaults__)
    if isinstance(value, list | tuple):
        return type(value), tuple(map(value_key, value))
    raise NoValueError


def host_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The memory of a tensor on the host; as integers where numpy lacks the dtype."""
    tensor = tensor.detach()
    try:
        found: np.ndarray[Any, Any] = tensor.numpy()
    except TypeError:
        found = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]).numpy()
    return found


def is_self_contained(function: FunctionType) -> bool:
    """Whether a function refers to nothing but its arguments. Nested functions might, so they count as if they did."""
    code = function.__code__
    return not (function.__closure__ or code.co_names or any(isinstance(part, CodeType) for part in code.co_consts))


def view_index(values: torch.Tensor, element: Any) -> int | None:
    """The index of an element of a 1-d tensor that is a view of it; None for anything else. Reads no contents."""
    if not isinstance(element, torch.Tensor) or element.dtype != values.dtype or element.numel() != 1:
        return None
    index, rest = divmod(element.data_ptr() - values.data_ptr(), values.element_size() * max(values.stride(0), 1))
    return index if not rest and 0 <= index < len(values) and element.device == values.device else None
