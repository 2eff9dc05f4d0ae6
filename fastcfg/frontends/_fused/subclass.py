"""Classes of somebody else's with some methods of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["STATE", "as_subclass", "is_fused", "subclass"]

# What instances keep for us: nothing that is copied or pickled with them.
STATE = "_fastcfg_state"


def is_fused(candidate: type) -> bool:
    """Whether a class is one of ours."""
    return "_fastcfg_original" in vars(candidate)


def subclass(original: type, methods: Mapping[str, Any], again: Callable[[type], type]) -> type:
    """A subclass under the original's name and module, so that what is saved can be loaded where fastcfg is not
    installed.

    Args:
        original: the class.
        methods: by name.
        again: makes the subclass from the original once more, for pickled instances.
    """

    def reduce(self: Any) -> Any:
        state = {name: value for name, value in vars(self).items() if name != STATE}
        return _rebuilt, (again, original, state)

    names = {
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__reduce__": reduce,
        "_fastcfg_original": original,
    }
    return type(original.__name__, (original,), {**methods, **names})


def as_subclass(instance: Any, fused: type) -> Any:
    """An instance's state in an object of its subclass."""
    return _with_state(fused, vars(instance))


def _rebuilt(again: Callable[[type], type], original: type, state: Mapping[str, Any]) -> Any:
    return _with_state(again(original), state)


def _with_state(kind: Any, state: Mapping[str, Any]) -> Any:
    new: Any = object.__new__(kind)
    new.__dict__.update(state)
    return new
