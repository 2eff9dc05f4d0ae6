"""The contents of what a step reads, as a key that shows every change and costs a few microseconds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...compiler.step import CONFIG
from ...utils.identity import host_array
from .configs import Configs
from .keys import Key, hashable

# Types whose values are told apart by ==. Floats and booleans are not: 1.0 and True equal 1.
_PLAIN = frozenset({int, str, type(None), torch.dtype, torch.device})
_CONTAINERS = frozenset({list, tuple, dict})
_MISSING = object()
_KEPT = 64  # objects with a known key
_LONG = 16  # lists from here on are compared with a copy


class _Known:
    """An object and its key, which is valid as long as `unchanged()`."""

    __slots__ = ("elements", "key", "now", "then", "unchanged", "value")

    def __init__(self, value: Any, key: Hashable, unchanged: Callable[[], bool]) -> None:
        self.value, self.key, self.unchanged = value, Key(key), unchanged
        # Of a tensor in the host's memory: a function that returns its bytes, and what these were.
        self.now: Callable[[], Any] = unchanged
        self.then: Any = True
        self.elements: dict[int, Any] | None = None  # of a tensor, by address


class Contents:
    """Keys of a scheduler's attributes, by what is in them.

    Numbers and strings are their own keys. Small tensors, long lists and configs have one that is kept; at every step
    their bytes and items are compared with a copy. On a device a tensor is known by its identity and version (in
    inference mode by its identity) and read when these change: the only times at which the host waits. Tensors of two
    dimensions and more are a step's inputs: their contents do not decide about it.
    """

    def __init__(self) -> None:
        self.known: dict[int, _Known] = {}
        self.configs = Configs()

    def key(self, state: Mapping[str, Any], read: tuple[Iterable[str], frozenset[str] | None]) -> tuple[Any, ...]:
        """The key of some attributes of a `__dict__`, of some items of its config (None: of all), and of which
        attributes there are."""
        names, items = read
        parts: list[Any] = [tuple(state)]
        if CONFIG in state:
            parts.append(self.configs.key(state[CONFIG], items))
        for name in names:
            value = state.get(name, _MISSING)
            parts.append(value if type(value) in _PLAIN else self.of(value))
        return tuple(parts)

    def of(self, value: Any) -> Hashable:
        """The key of a value."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is Tensor:
            if value.ndim > 1:
                wanted = value.requires_grad and torch.is_grad_enabled()
                return value.dtype, value.shape, value.stride(), value.device, wanted
        elif kind is bool or kind is float:
            return kind, value
        elif kind in _CONTAINERS and (len(value) < _LONG or has_tensors(value)):
            items = value if kind is not dict else (*value, *value.values())
            return kind, *[item if type(item) in _PLAIN else self.of(item) for item in items]
        known = self.known.get(id(value))
        if known is not None and known.value is value and known.unchanged():
            return known.key
        if isinstance(value, Tensor):
            return self._kept(value, _tensor).key if value.ndim < 2 else (kind, value.dtype, value.shape)
        if kind in _CONTAINERS or isinstance(value, Mapping):
            return self._kept(value, _container).key
        return hashable(value)

    def look(self, tensor: Tensor) -> None:
        """Read a one-dimensional tensor now, rather than when its contents are asked for."""
        self._elements(tensor)

    def element(self, tensor: Tensor, element: Tensor) -> Any:
        """The value of an element of a one-dimensional tensor that is a view of it; None for any other tensor."""
        return self._elements(tensor).get(element.data_ptr()) if element.dtype == tensor.dtype else None

    def _elements(self, tensor: Tensor) -> dict[int, Any]:
        known = self.known.get(id(tensor))
        if known is None or known.value is not tensor or not known.unchanged():
            known = self._kept(tensor, _tensor)
        if known.elements is None:
            step = tensor.element_size() * max(tensor.stride(0), 1)
            known.elements = {tensor.data_ptr() + step * index: value for index, value in enumerate(tensor.tolist())}
        return known.elements

    def _kept(self, value: Any, make: Callable[[Any], _Known]) -> _Known:
        known = self.known.get(id(value))
        if known is None or known.value is not value or not known.unchanged():
            if len(self.known) >= _KEPT:
                del self.known[next(iter(self.known))]  # the oldest
            known = self.known[id(value)] = make(value)
        return known


def has_tensors(values: Any) -> bool:
    """Whether a list or the like ends with a step's input: a past, which tells as many others."""
    return type(values) in (list, tuple) and bool(values) and type(values[-1]) is Tensor and values[-1].ndim > 1


def _tensor(tensor: Tensor) -> _Known:
    contents = host_array(tensor.detach().cpu()).tobytes()
    key: Hashable = (type(tensor), tensor.dtype, tuple(tensor.shape), tensor.device, contents)
    if tensor.requires_grad:  # whether a gradient is wanted may change at any time
        return _Known(tensor, (key, torch.is_grad_enabled()), lambda: False)
    if tensor.device.type == "cpu":
        # The same memory: changes through other tensors and arrays are seen as well.
        tobytes = host_array(tensor).tobytes
        known = _Known(tensor, key, lambda: tobytes() == contents)
        known.now, known.then = tobytes, contents
        return known
    if tensor.is_inference():
        return _Known(tensor, key, lambda: True)
    version = tensor._version
    return _Known(tensor, key, lambda: tensor._version == version)


def _container(value: Any) -> _Known:
    """A long list, or a mapping, which may have attributes as diffusers' configs have."""
    attributes = vars(value) if hasattr(value, "__dict__") else {}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    key = (type(value), *((name, hashable(item)) for part in (items, attributes.items()) for name, item in part))
    same, same_attributes = copy.deepcopy(dict(value) if isinstance(value, Mapping) else value), dict(attributes)
    same_attributes = copy.deepcopy(same_attributes)

    def unchanged() -> bool:
        try:
            return bool(value == same and attributes == same_attributes)
        except (RuntimeError, ValueError):  # tensors and arrays in it have no single answer
            return False

    return _Known(value, key, unchanged)
