"""Subclasses of other projects' classes, with some methods replaced."""

from __future__ import annotations

import copy
import copyreg
import functools
from collections.abc import Callable, Mapping
from typing import Any

# The attribute of an instance with what we keep: nothing of a run, so it is neither copied nor pickled. It is a slot:
# the instance's dictionary is the original's.
STATE = "_fastcfg_state"
# The attribute of our classes and functions with the original's.
ORIGINAL = "_fastcfg_original"


def is_fused(candidate: type) -> bool:
    """Whether a class was made by `subclass`."""
    return ORIGINAL in vars(candidate)


def subclass(original: type, methods: Mapping[str, Any], again: Callable[[type], type]) -> type:
    """A subclass with the original's name and module, so that saved objects load where fastcfg is not installed.
    Pickles of it and its instances call `again`, a function of a module, with the original."""

    def reduce(self: Any) -> Any:
        return _with_state, (type(self), dict(vars(self)))

    names = {
        "__slots__": () if STATE in dir(original) else (STATE,),
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__reduce__": reduce,
        ORIGINAL: original,
        "_fastcfg_again": staticmethod(again),
    }
    made: type = _metaclass(type(original))(original.__name__, (original,), {**methods, **names})
    return made


def as_subclass(instance: Any, fused: type) -> Any:
    """An instance's state in an object of its subclass. Its lists and dictionaries are copied: the two go different
    ways."""
    state = {name: copy.copy(value) if type(value) in (list, dict) else value for name, value in vars(instance).items()}
    return _with_state(fused, state)


@functools.cache
def _metaclass(kind: Any) -> Any:
    """A metaclass for subclasses that pickle: by their name, pickle would find the original."""
    made = type(f"Fused{kind.__name__}", (kind,), {})
    copyreg.pickle(made, _reduce_class)
    return made


def _reduce_class(fused: Any) -> Any:
    """How to pickle a class: ours is made again, a class derived from it is found by its name."""
    return (fused._fastcfg_again, (fused._fastcfg_original,)) if is_fused(fused) else fused.__qualname__


def _with_state(kind: Any, state: Mapping[str, Any]) -> Any:
    new: Any = object.__new__(kind)
    new.__dict__.update(state)
    return new
