"""See what a step changes beside its scheduler."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .parts import UntraceableError
from .run import MISSING, traced_class


@contextmanager
def unchanged(scheduler: Any, step: Any) -> Iterator[None]:
    """Context that raises UntraceableError, and puts back what it was, where a step changes other things than its
    scheduler: attributes of its classes, or variables of its module."""
    kind: Any = type(scheduler)
    owners: list[Any] = [*traced_class(kind, step).__mro__[:-1], None]

    variables = [getattr(step, "__globals__", {}) if owner is None else vars(owner) for owner in owners]
    before, failed = [of_owner.copy() for of_owner in variables], None
    try:
        yield
    except UntraceableError as error:
        failed = error
    for owner, old, new in zip(owners, before, variables, strict=True):
        if all(map(is_, old, new)) and len(old) == len(new) and all(map(is_, old.values(), new.values())):
            continue
        changed = [name for name in new if new[name] is not old.get(name, MISSING)]
        for name in changed:
            if owner is None:
                step.__globals__.update({name: old[name]} if name in old else {})
            elif name in old:
                setattr(owner, name, old[name])
            else:
                delattr(owner, name)
        if changed:
            raise UntraceableError(f"its step changes {', '.join(changed)}, which is not its scheduler's") from failed
    if failed is not None:
        raise failed


@contextmanager
def undrawn(generator: Any) -> Iterator[None]:
    """Context that raises UntraceableError, and puts the state back, where random numbers were drawn."""
    generators = [one for one in (generator if isinstance(generator, list) else [generator]) if one is not None]
    states: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (torch.get_rng_state, torch.set_rng_state),
        (np.random.get_state, np.random.set_state),
        (random.getstate, random.setstate),
        *((one.get_state, one.set_state) for one in generators),
    ]
    before = [get() for get, _ in states]
    failed: UntraceableError | None = None
    try:
        yield
    except UntraceableError as error:
        failed = error
    moved = []
    for (get, put), state in zip(states, before, strict=True):
        if not (get is np.random.get_state and _numpy_is_at(state)) and not _is_same(get(), state):
            moved.append((put, state))
    for put, state in moved:
        put(state)
    if moved:
        raise UntraceableError("it draws random numbers by another function than torch.randn's") from failed
    if failed is not None:
        raise failed


def _numpy_is_at(state: Any) -> bool:
    """Whether numpy's generator is certainly in a state: by its memory, as reading a state word by word takes 45 us.
    Of a state in which a second normal number waits it cannot be said: drawing that leaves the memory as it is."""
    get_generator: Any = getattr(np.random, "get_bit_generator", None)  # numpy 1.24
    generator = get_generator and get_generator()
    if type(generator) is not np.random.MT19937 or state[3]:
        return False
    wanted = state[1].tobytes() + bytes(ctypes.c_int(state[2]))
    return ctypes.string_at(generator.ctypes.state_address, len(wanted)) == wanted


def _is_same(a: Any, b: Any) -> bool:
    """Whether two states of a generator are the same: tensors, Python's tuple, or numpy's, with an array in it."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a[1], np.ndarray):
        return np.array_equal(a[1], b[1]) and a[2:] == b[2:]
    return bool(a == b)
