"""Keys of what a loop and its steps depend on: the object, its class's functions, and the kinds of their arguments."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ...utils.identity import Alike, NoValueError, Same, value_key

_LARGE = 1 << 20  # elements of a tensor that is known by its identity and version
_DEEP = 3
_FUNCTIONS = ("model", "cond_fn", "denoised_fn")


def object_key(diffusion: Any) -> Hashable:
    """Equal while an object's attributes have the same contents and its classes the same functions. An attribute that
    has no value is known by its identity, and by its own attributes."""
    methods = tuple(tuple(vars(base).items()) for base in type(diffusion).__mro__ if base is not object)
    functions = tuple(
        (name, value if type(value) is FunctionType else Same(value))
        for items in methods
        for name, value in items
        if name != "__dict__"
    )
    return functions, tuple((name, _content(value, 0)) for name, value in vars(diffusion).items())


def _content(value: Any, depth: int) -> Hashable:
    if isinstance(value, Tensor) and (value.device.type != "cpu" or value.numel() > _LARGE):
        return Same(value), value._version
    if isinstance(value, nn.Module) or callable(value):
        return Alike(value)
    try:
        return value_key(value)
    except NoValueError:
        pass
    if depth == _DEEP:
        return Same(value)
    if isinstance(value, Mapping):
        return type(value), tuple((Same(name), _content(item, depth + 1)) for name, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return type(value), tuple(_content(item, depth + 1) for item in value)
    inside = getattr(value, "__dict__", {})
    return Same(value), tuple((name, _content(item, depth + 1)) for name, item in inside.items())


def arguments_key(arguments: Mapping[str, Any]) -> Hashable:
    """Equal for arguments of the same kinds: numbers of the same value, tensors of the same shape and dtype, the same
    functions, containers of these."""
    return tuple((name, _kind(value, name in _FUNCTIONS)) for name, value in arguments.items())


def _kind(value: Any, is_function: bool = False) -> Hashable:
    if is_function:
        return Alike(value)
    if isinstance(value, Tensor):
        return Tensor, tuple(value.shape), value.dtype, value.device, value.is_contiguous()
    if value is None or isinstance(value, bool | int | float | str | torch.device | torch.dtype):
        return type(value), value if value == value else "nan"
    if isinstance(value, Mapping):
        return type(value), tuple((name, _kind(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_kind, value))
    return Alike(value)


def has_others(arguments: Mapping[str, Any]) -> bool:
    """Whether some arguments are neither the originals' functions nor numbers, tensors or containers of these."""

    def other(value: Any) -> bool:
        if isinstance(value, Mapping):
            return any(map(other, value.values()))
        if isinstance(value, list | tuple):
            return any(map(other, value))
        plain = bool | int | float | str | torch.device | torch.dtype | Tensor
        return value is not None and not isinstance(value, plain)

    return any(other(value) for name, value in arguments.items() if name not in _FUNCTIONS)
