"""An object's own code, with its steps made by a hook."""

from __future__ import annotations

import functools
import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from .recognition import STEPS

_STEP = "_fastcfg_step"
_SHORT = 64  # items of a list that are looked at in every step; longer ones are lists of times
# A step's name, the class's function and what it was called with.
Hook = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def with_steps(diffusion: Any, original: type, hook: Hook) -> Any:
    """An object of (a subclass of) a class with another object's attributes, in the same dictionary, whose steps are
    made by `hook(name, function, args, kwargs)`. The hook may call function(view, *args, **kwargs): the own step."""
    view: Any = object.__new__(_hooked(original))
    object.__setattr__(view, "__dict__", vars(diffusion))
    object.__setattr__(view, _STEP, hook)
    return view


def apart(diffusion: Any, original: type) -> Any:
    """An object of a class with copies of another's attributes: its lists and dictionaries are its own."""
    twin: Any = object.__new__(original)
    object.__setattr__(twin, "__dict__", copied(vars(diffusion)))
    return twin


def copied(value: Any) -> Any:
    """A value with its lists and dictionaries copied, and what they hold shared."""
    if isinstance(value, dict):
        kind: Any = type(value)
        twin = kind.__new__(kind)  # its own constructor may want other arguments
        vars(twin).update(getattr(value, "__dict__", {})) if hasattr(twin, "__dict__") else None
        if isinstance(value, defaultdict):
            twin.default_factory = value.default_factory
        dict.update(twin, {name: copied(item) for name, item in value.items()})
        return twin
    return [copied(item) for item in value] if type(value) is list else value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a value and of the containers in it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


class Contents:
    """What a value holds: its containers' items, the versions of its tensors, and its arrays' bytes."""

    def __init__(self, value: Any) -> None:
        self._items = list(_items(value))
        # Of a dictionary: its values, and what shows that one of them changed in place.
        self._names = tuple(value) if isinstance(value, dict) else ()
        self._values = tuple(value.values()) if isinstance(value, dict) else None
        self._same = [check for item in self._values or () if (check := _unchanged(item)) is not None]

    def is_current(self, value: Any) -> bool:
        """Whether a value holds the same, unchanged."""
        if self._values is not None and tuple(value) == self._names:
            kept = all(map(operator.is_, self._values, value.values()))
            if kept and all(check() for check in self._same):
                return True
        return all(
            was is now and before == version
            for (was, before), (now, version) in itertools.zip_longest(self._items, _items(value), fillvalue=(self, -1))
        )


def _unchanged(value: Any) -> Callable[[], bool] | None:
    """A function that says whether a value, still the same object, was not changed in place; None if it cannot be."""
    if isinstance(value, Tensor):
        before = version(value)
        return lambda: version(value) == before
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        tobytes, contents = value.tobytes, value.tobytes()
        return lambda: tobytes() == contents
    if type(value) is list and set(map(type, value)) == {int}:
        numbers = value.copy()
        return lambda: value == numbers
    if isinstance(value, dict | list | tuple) and value:
        items = Contents(value)
        return lambda: items.is_current(value)
    return None


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; -1 for tensors of inference mode, which do not count it."""
    return -1 if tensor.is_inference() else tensor._version


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Tensor):
        yield value, version(value)
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield value, value.tobytes()
    elif type(value) is list and set(map(type, value)) == {int}:
        yield value, tuple(value)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _items(item)
    elif isinstance(value, list | tuple) and len(value) <= _SHORT:
        for item in value:
            yield from _items(item)
    elif isinstance(value, list | tuple):
        yield value, len(value)
    elif isinstance(value, bool | int | float | str):
        yield type(value), hash(value)
    else:
        yield value, 0


@functools.cache
def _hooked(original: Any) -> Any:
    def hooked(name: str) -> Any:
        own = getattr(original, name)

        @functools.wraps(own)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            return object.__getattribute__(self, _STEP)(name, functools.partial(own, self), args, kwargs)

        return step

    methods = {name: hooked(name) for name in STEPS if callable(getattr(original, name, None))}
    names = {"__slots__": (_STEP,), "__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original)(original.__name__, (original,), {**methods, **names})
