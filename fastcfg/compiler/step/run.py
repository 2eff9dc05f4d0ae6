"""Run a step of copies of a scheduler, and note what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..patching import in_float64, replaced
from .config import ConfigReads, noting
from .drawing import Drawing
from .parts import OUTPUT, SAMPLE, TIMESTEP, Draw, Source, UntraceableError, are_numbers
from .tensors import CONFIG, Inputs, Tensors

# Where a copy of a scheduler keeps its `_Twin`, and the names of the attributes that it was given.
_TWIN, _SEEN = "_fastcfg_twin", "_fastcfg_seen"
MISSING = object()  # what a class does not have


@dataclass(eq=False)
class Outcome:
    """What one run of a step did."""

    before: dict[str, Any] = field(default_factory=dict)  # attributes that it read, with copies of containers
    given: dict[int, Source] = field(default_factory=dict)  # tensors by identity
    kept: list[tuple[Tensor, int]] = field(default_factory=list)  # the same, and the noise, with their versions
    changed: list[Tensor] = field(default_factory=list)  # in place
    draws: list[Draw] = field(default_factory=list)
    after: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    converted: list[Tensor] = field(default_factory=list)

    def keep(self, tensor: Tensor, source: Source) -> Tensor:
        """Note a tensor that the step is given."""
        self.given[id(tensor)] = source
        self.kept.append((tensor, tensor._version))
        return tensor


@dataclass(eq=False)
class Reads:
    """The names of the attributes that a step read: the scheduler's, those it looked for in the class, and what it read
    of the config."""

    own: set[str] = field(default_factory=set)
    of_class: set[str] = field(default_factory=set)
    config: ConfigReads = field(default_factory=ConfigReads)


class Runs:
    """Runs a step of copies of a scheduler; within `open`, which replaces the functions that draw and convert."""

    def __init__(
        self,
        scheduler: Any,
        step: Callable[..., Any],
        timestep: Any,
        options: Mapping[str, Any],
        inputs: Inputs,
        reads: Reads,
    ) -> None:
        self._step, self._timestep, self._options = step, timestep, options
        self._inputs, self._reads = inputs, reads
        kind: Any = type(scheduler)
        self._kind, self._traced = kind, traced_class(kind, step)
        self._state = dict(vars(scheduler))
        self.config = noting(self._state[CONFIG], reads.config) if CONFIG in self._state else None
        self._drawing = Drawing(options.get("generator"), inputs)
        self._in_float64 = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Context for the runs."""
        with replaced(self._drawing.replacements(self._kind)), in_float64(lambda: self._in_float64):
            yield

    def __call__(self, tensors: Tensors) -> Outcome:
        """Run the step on some tensors."""
        outcome = Outcome()
        twin: Any = object.__new__(self._traced)
        twin_state = object.__getattribute__(twin, "__dict__")
        known = _Twin(self, tensors, outcome)
        vars(self._traced)[_TWIN].__set__(twin, known)
        vars(self._traced)[_SEEN].__set__(twin, known.seen)
        given = {name: self._copied(value, ("option", name), tensors, outcome) for name, value in self._options.items()}
        t = self._timestep
        if isinstance(t, Tensor):
            outcome.given[id(t := t.clone())] = TIMESTEP.source
        sample = outcome.keep(tensors.tensor(SAMPLE), SAMPLE)
        output = outcome.keep(tensors.tensor(OUTPUT), OUTPUT)
        self._drawing.start(tensors)
        self._in_float64 = tensors.dtype is not None
        try:
            with torch.no_grad():
                outcome.result = self._step(twin, output, timestep=t, sample=sample, **given)
        except UntraceableError:
            raise
        except Exception as error:
            raise UntraceableError(f"its step fails on an example ({type(error).__name__}: {error})") from error
        finally:
            self._in_float64 = False
        outcome.draws = self._drawing.draws
        for number, noise in enumerate(self._drawing.noise):
            outcome.given[id(noise)] = ("draw", number)
        for tensor, version in outcome.kept:
            if tensor._version != version:
                outcome.changed.append(tensor)
        if any(tensor.ndim < 2 for tensor in outcome.changed) or self._drawing.changed():
            raise UntraceableError("its step changes levels or noise in place")
        outcome.kept += [(noise, noise._version) for noise in self._drawing.noise]
        outcome.after = twin_state
        return outcome

    def read(self, name: str, state: dict[str, Any], tensors: Tensors, outcome: Outcome) -> None:
        """Give a copy of the scheduler, whose attributes these are, one that it reads for the first time."""
        if name not in self._state:
            if name not in state:
                self._reads.of_class.add(name)
            return
        self._reads.own.add(name)
        if name in self._inputs.refused:
            raise UntraceableError(self._inputs.refused[name])
        if name in state:  # set before it was read
            return
        value = self._state[name]
        if name == CONFIG:
            outcome.given[id(self.config)] = ("state", CONFIG)
            copy = self.config
        else:
            copy = self._copied(value, ("state", name), tensors, outcome)
        state[name], outcome.before[name] = copy, _snapshot(copy)

    def _copied(self, value: Any, source: Source, tensors: Tensors, outcome: Outcome) -> Any:
        """What a run gets for a value: its tensors for those like the sample, the same small tensor as other runs."""
        if isinstance(value, Tensor):
            if source in self._inputs.dtypes:
                return outcome.keep(tensors.tensor(source), source)
            if value.ndim > 1 or source[0] == "option":
                return value
            return outcome.keep(self._inputs.copy_of(value), source)
        if source[0] == "option":
            return value
        if type(value) is dict:
            return {key: self._copied(item, (*source, key), tensors, outcome) for key, item in value.items()}
        if type(value) in (list, tuple):
            if are_numbers(value):
                return value[:]
            items = [self._copied(item, (*source, key), tensors, outcome) for key, item in enumerate(value)]
            return type(value)(items)
        return value.copy() if isinstance(value, np.ndarray) else value


class _Twin:
    """What a copy of a scheduler knows beside its attributes, which it is given when they are read."""

    __slots__ = ("outcome", "runs", "seen", "tensors")

    def __init__(self, runs: Runs, tensors: Tensors, outcome: Outcome) -> None:
        self.runs, self.tensors, self.outcome, self.seen = runs, tensors, outcome, set[str]()

    def read(self, name: str, state: dict[str, Any]) -> None:
        """An attribute is read for the first time."""
        if name == "__dict__":
            raise UntraceableError("its step reads its __dict__")
        self.runs.read(name, state, self.tensors, self.outcome)
        self.seen.add(name)


def class_attribute(kind: Any, name: str) -> Any:
    """An attribute of a class, `MISSING` if it has none; None for class methods, which are a new object each time."""
    value = getattr(kind, name, MISSING)
    return value if value is getattr(kind, name, MISSING) else None


@cache
def traced_class(kind: Any, step: Any) -> Any:
    """A subclass that is given its attributes when they are read, and notes what `convert_model_output` returns."""
    own, of_kind = object.__getattribute__, kind.__getattribute__

    def get(self: Any, name: str) -> Any:
        if name not in seen(self):
            twin(self).read(name, own(self, "__dict__"))
        return of_kind(self, name)

    methods: dict[str, Any] = {"__getattribute__": get, "__module__": kind.__module__, "step": step}
    methods["__slots__"] = (_TWIN, _SEEN)
    if hasattr(kind, "convert_model_output"):

        def convert_model_output(self: Any, *args: Any, **kwargs: Any) -> Any:
            converted = kind.convert_model_output(self, *args, **kwargs)
            twin(self).outcome.converted.append(converted)
            return converted

        methods["convert_model_output"] = convert_model_output
    made = type(kind)(kind.__name__, (kind,), methods)
    twin, seen = vars(made)[_TWIN].__get__, vars(made)[_SEEN].__get__
    return made


def _snapshot(value: Any) -> Any:
    """A value, with copies of the containers in it."""
    if type(value) is dict:
        return value, {key: _snapshot(item) for key, item in value.items()}
    if type(value) is list:
        return value, value[:] if are_numbers(value) else [_snapshot(item) for item in value]
    return value, value.copy() if isinstance(value, np.ndarray) else None
