"""Conditions under which a step is the one that followed the last time, as one function.

A run repeats the run before it: after a step comes the step that came after it then, unless something was changed.
Keys (`Contents`) answer which step it is among all that are known; a guard asks whether it is this one, by the same
contents, in less time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import lru_cache, partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...compiler.step import CONFIG, MISSING
from ...utils._torch_private import same_tensor
from ...utils.identity import is_self_contained
from .contents import Contents, has_tensors

# Called with the attributes, their contents, and the step's arguments.
Guard = Callable[[Mapping[str, Any], Contents, Tensor, Any, Tensor, Mapping[str, Any]], bool]
_SHORT = 16
# The timesteps, and the name of what is known of them.
_TIMESTEPS, _ENTRY = "state['timesteps']", "known_timesteps"
_HEAD = """\
def guard(values, state, contents, output, timestep, sample, options):
    {values} = values
    known, configs, of = contents.known.get, contents.configs.known.get, contents.of
    try:
        return bool(
            {conditions}
        )
    except AttributeError:  # a class or a module lost a name
        return False
"""


# What a step read of classes and modules: owner, name and value.
_Others = Iterable[tuple[Any, str, Any]]


class _UnguardedError(Exception):
    """A step has what a guard cannot ask for."""


class _Conditions:
    """Conditions in the words of Python, and the values that they name: those of a run's steps are mostly the same but
    for these, and Python runs code that it has just run in half of the time."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.values: list[Any] = []
        self.timesteps: Tensor | None = None
        self._numbers = itertools.count()

    def named(self, value: Any) -> str:
        """A name for a value."""
        self.values.append(value)
        return f"v{len(self.values) - 1}"

    def local(self) -> str:
        """A name for what a condition finds."""
        return f"x{next(self._numbers)}"

    def add(self, *conditions: str) -> None:
        """More of them."""
        self.lines += conditions

    def tensor(self, value: Tensor, where: str) -> None:
        """An input of a step: a tensor of two dimensions or more."""
        if value.requires_grad and torch.is_grad_enabled():
            raise _UnguardedError
        self.add(f"{self.named(same_tensor(value))}({where})")

    def current(self, others: _Others) -> None:
        """The classes and modules have what was read of them."""
        for owner, name, value in others:
            here = self.named(owner)
            self.add(f"not hasattr({here}, {name!r})" if value is MISSING else f"{here}.{name} is {self.named(value)}")

    def config(self, key: Hashable, items: frozenset[str] | None) -> None:
        """Some items of the config, or all."""
        here, entry = self.local(), self.local()
        self.add(f"({here} := state[{CONFIG!r}]) is not None", f"({entry} := configs(id({here}))) is not None")
        self.add(f"{entry}.config is {here}", f"{entry}.unchanged()")
        self.add(f"{entry}.keys.get({self.named(items)}) == {self.named(key)}")

    def element(self, value: Tensor, contents: Contents) -> Any:
        """The value of one of the timesteps; None for another tensor."""
        return None if self.timesteps is None else contents.element(self.timesteps, value)

    def contents(self, value: Any, where: str, contents: Contents) -> None:
        """A value that decides about a step."""
        kind, here = type(value), self.local()
        self.add(f"(type({here} := {where}) is {self.named(kind)})")
        if value is None or kind is bool:
            self.add(f"{here} is {value}")
        elif kind in (int, str) or (kind is float and value and value == value):
            self.add(f"{here} == {self.named(value)}")
        elif kind is np.ndarray and not value.dtype.hasobject:
            self.add(f"{here}.dtype == {self.named(value.dtype)}", f"{here}.shape == {value.shape}")
            self.add(f"{here}.tobytes() == {self.named(value.tobytes())}")
        elif kind is FunctionType and is_self_contained(value) and not (value.__defaults__ or value.__kwdefaults__):
            self.add(f"{here}.__code__ is {self.named(value.__code__)}", f"not {here}.__closure__")
            self.add(f"not ({here}.__defaults__ or {here}.__kwdefaults__)")
        elif kind is Tensor and value.ndim > 1:
            self.lines.pop()
            self.tensor(value, where)
        elif kind in (list, tuple) and (len(value) < _SHORT or has_tensors(value)):
            self.add(f"len({here}) == {len(value)}")
            for number, item in enumerate(value):
                self.contents(item, f"{here}[{number}]", contents)
        elif kind is Tensor and value.ndim == 0 and (number := self.element(value, contents)) is not None:
            # The steps kept in lists are other tensors in every run.
            self.add(f"{here}.ndim == 0", f"{here}.dtype is {self.named(value.dtype)}")
            self.add(f"{_ENTRY}.elements.get({here}.data_ptr()) == {self.named(number)}")
        elif kind is Tensor and value.ndim == 0 and value.is_cpu and value.item():
            # Levels that a step computes are other tensors in every step.
            self.add(f"{self.named(same_tensor(value))}({here})", f"{here}.item() == {self.named(value.item())}")
        elif id(value) in contents.known:
            entry = _ENTRY if where == _TIMESTEPS else self.local()
            self.add(f"({entry} := known(id({here}))) is not None", f"{entry}.value is {here}")
            self.add(f"{entry}.now() == {entry}.then")
            key = self.named(contents.known[id(value)].key)
            self.add(f"({entry}.key is {key} or {entry}.key == {key})")
        else:
            self.add(f"of({here}) == {self.named(contents.of(value))}")


def guard_of(
    others: _Others,
    read: tuple[tuple[str, ...], frozenset[str] | None],
    state: Mapping[str, Any],
    contents: Contents,
    output: Tensor,
    timestep: Any,
    sample: Tensor,
    options: Mapping[str, Any],
) -> Guard | None:
    """The conditions under which a step that reads some attributes, and items of the config, is the one it is with
    these, and classes and modules still have what it read of them (`others`); None if some of this cannot be asked."""
    reads, items = read
    conditions = _Conditions()
    try:
        for name, tensor in (("output", output), ("sample", sample)):
            conditions.tensor(tensor, name)
        conditions.add(f"tuple(options) == {conditions.named(tuple(options))}")
        for name, value in options.items():
            where = f"options[{name!r}]"
            if isinstance(value, torch.Generator):
                conditions.add(f"isinstance({where}, {conditions.named(torch.Generator)})")
            else:
                conditions.contents(_plain(value), where, contents)
        conditions.add(f"tuple(state) == {conditions.named(tuple(state))}")
        timesteps = state.get("timesteps")
        if type(timesteps) is Tensor and timesteps.ndim == 1:
            contents.look(timesteps)
            conditions.contents(timesteps, _TIMESTEPS, contents)
            conditions.add(f"{_ENTRY}.elements is not None")
            conditions.timesteps = timesteps
        if CONFIG in state:
            conditions.config(contents.configs.key(state[CONFIG], items), items)
        for name in reads:
            if name in state and (name != "timesteps" or conditions.timesteps is None):
                conditions.contents(state[name], f"state[{name!r}]", contents)
        _timestep(conditions, timestep, contents)
        conditions.current(others)
    except _UnguardedError:
        return None
    names = "".join(f"v{number}, " for number in range(len(conditions.values)))
    source = _HEAD.format(values=f"({names})", conditions="\n            and ".join(conditions.lines))
    return partial(_compiled(source), tuple(conditions.values))


@lru_cache(1024)
def _compiled(source: str) -> Callable[..., bool]:
    names: dict[str, Any] = {}
    exec(compile(source, "<guard>", "exec"), names)
    found: Callable[..., bool] = names["guard"]
    return found


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    raise _UnguardedError


def _timestep(conditions: _Conditions, timestep: Any, contents: Contents) -> None:
    if not isinstance(timestep, Tensor):
        conditions.contents(_plain(timestep), "timestep", contents)
    elif timestep.ndim or conditions.element(timestep, contents) is None:
        raise _UnguardedError
    else:
        conditions.contents(timestep, "timestep", contents)
