"""See what a step changes beside its scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

from .parts import UntraceableError
from .random_states import GLOBAL_GENERATORS, GlobalGenerator
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
    given = [one for one in (generator if isinstance(generator, list) else [generator]) if one is not None]
    generators = [*GLOBAL_GENERATORS, *(GlobalGenerator(one.get_state, one.set_state) for one in given)]
    before = [one.state() for one in generators]
    failed: UntraceableError | None = None
    try:
        yield
    except UntraceableError as error:
        failed = error
    moved = [(one, state) for one, state in zip(generators, before, strict=True) if not one.is_in(state)]
    for one, state in moved:
        one.put(state)
    if moved:
        raise UntraceableError("it draws random numbers by another function than torch.randn's") from failed
    if failed is not None:
        raise failed
