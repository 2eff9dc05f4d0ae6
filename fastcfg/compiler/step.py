"""One step of a scheduler as sums of tensors, found by running it.

A step is a function of the sample, the model's output, the tensors that the scheduler kept from earlier steps in its
own attributes, and draws of noise; all other attributes (levels, counters, options) decide which. It is run on basis
vectors, which show the coefficients of everything it returns or keeps, and on random tensors of the caller's dtypes,
which show what it draws, the dtypes of its results, and which attributes it writes. The sums are proved on both. They
hold as long as the attributes that the step read have the same contents.
"""

from __future__ import annotations

import enum
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..clip import DynamicThreshold
from ..combination import Combination
from ..reference.quantile import quantile_bound
from ..utils.identity import is_self_contained
from .patching import in_float64, modules_of, replaced
from .probe import Array

__all__ = ["TIMESTEP", "Constant", "Container", "Draw", "Given", "Part", "Small", "StepProgram", "Sum", "Write"]
__all__ += ["UntraceableError", "is_plain", "trace_step"]

MAX_DRAWS = 4
_RANDOM = 4  # positions of the linear run with random inputs
_SHORT = 0.3  # the other length of basis vectors
_TOLERANCE = 5e-6  # of coefficients, relative to their row's: some schedulers compute in float32
_ROUNDING = 1e-13  # smaller shares of a row are what float64 left of a cancellation
# Between the sums and the original's step in the caller's dtypes, which may cancel: roundings of the coarsest dtype.
_ROUNDINGS, _TOLERANCE_FLOAT32 = 64, 2e-4
_SATURATED = 1e4
_MAX_CHANNELS = 16
_CONFIG = "_internal_dict"  # the attribute with a diffusers config
_READS, _REFUSED, _CONVERTED = "_fastcfg_reads", "_fastcfg_refused", "_fastcfg_converted"
_OURS = "_fastcfg"

# Where a tensor comes from: ("sample",), ("output",), ("state", attribute, *keys), ("option", name), ("draw", number).
Source = tuple[Any, ...]
_SAMPLE, _OUTPUT = ("sample",), ("output",)


class UntraceableError(ValueError):
    """A step that is no sum of tensors, or does what cannot be reproduced; the message says why. `reads` are the
    attributes that it read until this was found."""

    reads: frozenset[str] = frozenset()


class Sum(NamedTuple):
    """A part of a result: the combination's output of this number."""

    number: int


class Given(NamedTuple):
    """A part of a result: the object that the caller or the scheduler's state gave."""

    source: Source


class Small(NamedTuple):
    """A part of a result: a new tensor of at most one dimension, such as a level."""

    value: Tensor


class Constant(NamedTuple):
    """A part of a result: a value without tensors."""

    value: Any


class Container(NamedTuple):
    """A part of a result: a list or tuple of parts; with keys, a dictionary."""

    kind: Callable[..., Any]
    parts: tuple[Any, ...]
    keys: tuple[Any, ...] | None = None


Part = Sum | Given | Small | Constant | Container
# The timestep that the caller gave.
TIMESTEP = Given(("timestep",))


class Write(NamedTuple):
    """A change that a step makes of what is at a source, ("state", attribute, *keys). How: "set" gives the attribute or
    item a new value; "fill" gives a list, which stays the same object, new items; "copy" changes a tensor in place,
    which may be the caller's."""

    source: Source
    part: Part
    how: str = "set"


@dataclass(frozen=True)
class Draw:
    """A draw of noise of the sample's shape: the function, and its arguments beside shape, generator and device, which
    are the caller's."""

    function: Callable[..., Tensor]
    dtype: torch.dtype | None
    like: bool = False  # called as torch.randn_like
    generator: bool = False
    device: bool = False


@dataclass(frozen=True, eq=False)
class StepProgram:
    """A step as sums.

    Attributes:
        reads: the attributes of the scheduler that decided about it.
        sources: of the combination's inputs; the first is the sample, the second the model's output.
        combination: the sums; None if nothing is computed.
        dtypes: of the combination's outputs.
        draws: all of the step's, used or not, in its order.
        result: what the step returns.
        writes: what it changes in the scheduler, in order.
    """

    reads: frozenset[str]
    sources: tuple[Source, ...]
    combination: Combination | None
    dtypes: tuple[torch.dtype, ...]
    draws: tuple[Draw, ...]
    result: Part
    writes: tuple[Write, ...]


def is_plain(value: Any) -> bool:
    """Whether a value has neither tensors nor a state of its own."""
    if isinstance(value, tuple | list | set | frozenset):
        return all(map(is_plain, value))
    if isinstance(value, FunctionType):
        return is_self_contained(value)
    plain = (
        None | bool | int | float | complex | str | bytes | range | enum.Enum | torch.dtype | torch.device | np.generic
    )
    return isinstance(value, plain | type)


def trace_step(
    scheduler: Any, step: Callable[..., Any], output: Tensor, timestep: Any, sample: Tensor, options: Mapping[str, Any]
) -> StepProgram:
    """Trace a step of a scheduler, which is not changed; no random numbers are drawn.

    Args:
        scheduler: an object with whatever attributes the step reads.
        step: called as step(scheduler, output, timestep, sample, **options).
        output, sample: the step's tensors, [B, C, ...], output also [B, 2C, ...]; their contents are not read.
        timestep: a number, or a tensor of one in the host's memory.
        options: further arguments; tensors like the sample are inputs too, others are small and in the host's memory.

    Raises:
        UntraceableError: the step is no sum of its tensors, fails on an example, or does what cannot be reproduced.
    """
    reads: set[str] = {_CONFIG} if _CONFIG in vars(scheduler) else set()
    try:
        with torch.inference_mode(False), _guarded(options.get("generator")):
            return _traced(scheduler, step, output, timestep, sample, options, reads)
    except UntraceableError as error:
        error.reads = frozenset(reads)
        raise


def _traced(
    scheduler: Any,
    step: Callable[..., Any],
    output: Tensor,
    timestep: Any,
    sample: Tensor,
    options: Mapping[str, Any],
    reads: set[str],
) -> StepProgram:
    inputs = _Inputs.of(scheduler, output, sample, options)
    run = partial(_run, scheduler, step, timestep, options, inputs, reads)
    clip = _clip(vars(scheduler).get(_CONFIG))
    linear = run(_BasisVectors(inputs), **{} if clip is None else {"clip_sample": False})
    trial = run(_Examples(inputs, seed=0))
    reader = _Reader(inputs, trial)
    result = reader.part(trial.result)
    writes = tuple(reader.writes())
    combination = None
    used: list[int] = []
    if reader.dtypes:
        combination = _combination(inputs, reader.sums_of(linear), bool(trial.draws))
        if clip is not None:
            combination = _clipped(combination, inputs, linear, reader, clip, run)
        found = [value.double() for value in reader.sums_of(trial)]
        coarsest = max(torch.finfo(dtype).eps for dtype in (*inputs.dtypes.values(), *reader.dtypes))
        tolerance = max(_ROUNDINGS * coarsest, _TOLERANCE_FLOAT32)
        _prove(combination, inputs, _Examples(inputs, seed=0).values(), found, tolerance, together=True)
        rows = (
            combination.coefficients
            if combination.x0 is None
            else np.vstack([combination.coefficients, combination.x0])
        )
        used = [i for i in range(len(inputs.names)) if i < 2 or rows[:, i].any() or i == combination.noise]
        combination = replace(
            combination,
            coefficients=combination.coefficients[:, used],
            x0=None if combination.x0 is None else combination.x0[used],
            noise=None if combination.noise is None else used.index(combination.noise),
        )
    sources = tuple(inputs.names[i] for i in used)
    return StepProgram(frozenset(reads), sources, combination, tuple(reader.dtypes), tuple(trial.draws), result, writes)


@dataclass(eq=False)
class _Inputs:
    """The tensors of a step: dtypes by source, in order, without draws; and the attributes that a step must not read,
    with the reason."""

    dtypes: dict[Source, torch.dtype]
    shape: tuple[int, ...]
    wide: bool
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, scheduler: Any, output: Tensor, sample: Tensor, options: Mapping[str, Any]) -> _Inputs:
        shape = tuple(sample.shape)
        if sample.ndim < 2:
            raise UntraceableError("its samples have less than two dimensions")
        wide = sample.ndim > 2 and tuple(output.shape) == (shape[0], 2 * shape[1], *shape[2:])
        if output.shape != sample.shape and not wide:
            raise UntraceableError("the model output has another shape than the sample")
        if wide and shape[1] > _MAX_CHANNELS:
            raise UntraceableError(f"its samples have more than {_MAX_CHANNELS} channels and learned variances")
        inputs = cls({_SAMPLE: sample.dtype, _OUTPUT: output.dtype}, shape, wide)
        for name, value in vars(scheduler).items():
            if name != _CONFIG and not name.startswith(_OURS):
                try:
                    inputs.dtypes |= inputs._kept(value, ("state", name))
                except UntraceableError as error:
                    inputs.refused[name] = f"its attribute {name} {error}"
        for name, value in options.items():
            if isinstance(value, Tensor) and value.ndim > 1:
                inputs.dtypes |= inputs._kept(value, ("option", name))
        return inputs

    def _kept(self, value: Any, source: Source) -> dict[Source, torch.dtype]:
        """The tensors like the sample in a value."""
        if isinstance(value, Tensor):
            if value.ndim < 2:
                return {}
            if tuple(value.shape) != self.shape:
                raise UntraceableError(f"has shape {tuple(value.shape)}, the sample {self.shape}")
            if not value.is_floating_point() or (value.requires_grad and torch.is_grad_enabled()):
                raise UntraceableError(f"is a tensor of {value.dtype}, or needs gradients")
            return {source: value.dtype}
        if type(value) in (list, tuple, dict):
            items = value.items() if type(value) is dict else enumerate(value)
            found: dict[Source, torch.dtype] = {}
            for key, item in items:
                found |= self._kept(item, (*source, key))
            return found
        if not is_plain(value) and not (isinstance(value, np.ndarray) and not value.dtype.hasobject):
            raise UntraceableError(f"is a {type(value).__name__}")
        return {}

    @property
    def names(self) -> list[Source]:
        """All inputs, the draws last."""
        return [*self.dtypes, *(("draw", number) for number in range(MAX_DRAWS))]

    def example_shape(self, batch: int, *rest: int) -> tuple[int, ...]:
        """A shape of as many dimensions as the sample's, with its channels up to a limit, and a last dimension."""
        *middle, last = rest
        if len(self.shape) == 2:
            return batch, last
        return batch, min(self.shape[1], _MAX_CHANNELS), *(middle or [1]) * (len(self.shape) - 3), last


class _Tensors:
    """The input tensors of a run, by source: `shape`, without a wide output's channels, and the draws' dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # of all tensors; None for the caller's

    def tensor(self, source: Source, dtype: torch.dtype | None = None) -> Tensor:
        raise NotImplementedError


class _BasisVectors(_Tensors):
    """Float64 vectors along the last dimension: 0, then 1 for each input in turn, then a shorter one for each; with a
    wide output, each draw again where the variance channels are -1 and 1, not 0; last random positions."""

    dtype = torch.float64

    def __init__(self, inputs: _Inputs) -> None:
        self._inputs, names = inputs, inputs.names
        self._wide = 2 * MAX_DRAWS if inputs.wide else 0
        self.shape = inputs.example_shape(1, 1 + 2 * len(names) + self._wide + _RANDOM)

    def tensor(self, source: Source, dtype: torch.dtype | None = None) -> Tensor:
        """The values of an input; a wide output's are [1, 2C, ...]."""
        names = self._inputs.names
        index, count = names.index(source), len(names)
        value = torch.zeros(self.shape, dtype=torch.float64)
        value[..., 1 + index], value[..., 1 + count + index] = 1.0, _SHORT
        if source[0] == "draw" and self._wide:
            value[..., 1 + 2 * count + 2 * source[1] + torch.tensor([0, 1])] = 1.0
        generator = torch.Generator().manual_seed(index)
        value[..., -_RANDOM:].normal_(generator=generator)
        if source != _OUTPUT or not self._inputs.wide:
            return value
        variance = torch.zeros_like(value)
        variance[..., 1 + 2 * count : 1 + 2 * count + self._wide] = torch.tensor([-1.0, 1.0]).repeat(MAX_DRAWS)
        variance[..., -_RANDOM:].uniform_(-1, 1, generator=generator)
        return torch.cat([value, variance], dim=1)


class _Examples(_Tensors):
    """Random tensors [2, C, ...], float64 of a size if that is given, else of the caller's dtypes."""

    def __init__(self, inputs: _Inputs, seed: int, size: float | None = None) -> None:
        self._inputs, self._seed, self._size = inputs, seed, 1.0 if size is None else size
        self.dtype = None if size is None else torch.float64
        self.shape = inputs.example_shape(2, 3, 5)

    def tensor(self, source: Source, dtype: torch.dtype | None = None) -> Tensor:
        """The values of an input, always the same for the same source and dtype."""
        inputs = self._inputs
        generator = torch.Generator().manual_seed(1000 * self._seed + inputs.names.index(source))
        shape = list(self.shape)
        if source == _OUTPUT and inputs.wide:
            shape[1] *= 2
        value = torch.empty(shape, dtype=torch.float64).normal_(generator=generator) * self._size
        if source == _OUTPUT and inputs.wide:
            value[:, shape[1] // 2 :].clamp_(-1, 1)
        return value.to(self.dtype or dtype or inputs.dtypes.get(source, torch.float32))

    def values(self) -> Callable[[Source], Tensor]:
        """Its tensors as float64."""
        return lambda source: self.tensor(source).double()


class _Saturated(_Tensors):
    """Float64 vectors with which x0, of coefficients p, is far above every bound: first a common point, then for each
    input one with a larger value of it."""

    dtype = torch.float64

    def __init__(self, inputs: _Inputs, p: Array) -> None:
        self._inputs = inputs
        self.base = _SATURATED * np.sign(p)
        self.added = np.where(p >= 0, _SATURATED, -_SATURATED)
        self.shape = inputs.example_shape(1, 1 + len(inputs.names))

    def tensor(self, source: Source, dtype: torch.dtype | None = None) -> Tensor:
        """The values of an input; the variance channels of a wide output are 0."""
        index = self._inputs.names.index(source)
        value = torch.full(self.shape, self.base[index], dtype=torch.float64)
        value[..., 1 + index] += self.added[index]
        return torch.cat([value, 0 * value], dim=1) if source == _OUTPUT and self._inputs.wide else value


@dataclass(eq=False)
class _Outcome:
    """What one run of a step did."""

    before: dict[str, Any]  # attributes, with copies of containers
    given: dict[int, Source] = field(default_factory=dict)  # tensors by identity
    kept: list[tuple[Tensor, int]] = field(default_factory=list)  # the same, and the noise, with their versions
    changed: list[Tensor] = field(default_factory=list)  # in place
    draws: list[Draw] = field(default_factory=list)
    after: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    converted: list[Tensor] = field(default_factory=list)


def _run(
    scheduler: Any,
    step: Callable[..., Any],
    timestep: Any,
    options: Mapping[str, Any],
    inputs: _Inputs,
    reads: set[str],
    tensors: _Tensors,
    clip_sample: bool | None = None,
) -> _Outcome:
    """Run a step of a copy of a scheduler on some tensors; with `clip_sample` without thresholding, and with that for
    its option."""
    outcome = _Outcome({})

    def made(source: Source) -> Tensor:
        tensor = tensors.tensor(source)
        outcome.given[id(tensor)] = source
        outcome.kept.append((tensor, tensor._version))
        return tensor

    def copied(value: Any, source: Source) -> Any:
        if isinstance(value, Tensor):
            if source in inputs.dtypes:
                return made(source)
            if value.ndim > 1:
                return value
            value = value.detach().cpu().clone()
            outcome.given[id(value)] = source
            outcome.kept.append((value, value._version))
            return value
        if type(value) is dict:
            return {key: copied(item, (*source, key)) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(copied(item, (*source, key)) for key, item in enumerate(value))
        return value.copy() if isinstance(value, np.ndarray) else value

    state = {name: copied(value, ("state", name)) for name, value in vars(scheduler).items() if name != _CONFIG}
    if (config := vars(scheduler).get(_CONFIG)) is not None:
        state[_CONFIG] = config if clip_sample is None else _with_clip(config, clip_sample)
    outcome.before = {name: _snapshot(value) for name, value in state.items()}
    kind: Any = type(scheduler)
    twin: Any = object.__new__(_traced_class(kind, step))
    twin_state = object.__getattribute__(twin, "__dict__")
    twin_state |= state | {_READS: reads, _REFUSED: inputs.refused, _CONVERTED: outcome.converted}
    given: dict[str, Any] = {
        name: made(("option", name)) if ("option", name) in inputs.dtypes else value for name, value in options.items()
    }
    t = timestep.clone() if isinstance(timestep, Tensor) else timestep
    if isinstance(t, Tensor):
        outcome.given[id(t)] = TIMESTEP.source
    patches = _drawing(scheduler, options.get("generator"), inputs, tensors, outcome)
    try:
        with replaced(patches), in_float64() if tensors.dtype is not None else nullcontext(), torch.no_grad():
            outcome.result = step(twin, made(_OUTPUT), t, made(_SAMPLE), **given)
    except UntraceableError:
        raise
    except Exception as error:
        raise UntraceableError(f"its step fails on an example ({type(error).__name__}: {error})") from error
    outcome.changed = [tensor for tensor, version in outcome.kept if tensor._version != version]
    if any(tensor.ndim < 2 or id(tensor) not in outcome.given for tensor in outcome.changed):
        raise UntraceableError("its step changes levels or noise in place")
    outcome.after = {name: value for name, value in twin_state.items() if name not in (_READS, _REFUSED, _CONVERTED)}
    return outcome


@cache
def _traced_class(kind: Any, step: Any) -> Any:
    """A subclass that notes which attributes are read, and what `convert_model_output` returns."""
    own = object.__getattribute__

    def get(self: Any, name: str) -> Any:
        state = own(self, "__dict__")
        if name == "__dict__":
            raise UntraceableError("its step reads its __dict__")
        if name in state and name != _READS:
            state[_READS].add(name)
            if name in state[_REFUSED]:
                raise UntraceableError(state[_REFUSED][name])
        return super(traced, self).__getattribute__(name)

    methods: dict[str, Any] = {"__getattribute__": get, "__module__": kind.__module__, "step": step}
    if hasattr(kind, "convert_model_output"):

        def convert_model_output(self: Any, *args: Any, **kwargs: Any) -> Any:
            converted = kind.convert_model_output(self, *args, **kwargs)
            own(self, "__dict__")[_CONVERTED].append(converted)
            return converted

        methods["convert_model_output"] = convert_model_output
    traced = type(kind)(kind.__name__, (kind,), methods)
    return traced


def _drawing(scheduler: Any, generator: Any, inputs: _Inputs, tensors: _Tensors, outcome: _Outcome) -> list[Any]:
    """Replacements for the functions that draw, which give the run's noise and note the draw."""

    def drawn(draw: Draw, shape: Any, **unknown: Any) -> Tensor:
        if unknown := {name: value for name, value in unknown.items() if value is not None}:
            raise UntraceableError(f"its noise is drawn with {', '.join(unknown)}")
        if tuple(shape) != tensors.shape:
            raise UntraceableError("its noise has another shape than the sample")
        if len(outcome.draws) == MAX_DRAWS:
            raise UntraceableError(f"it draws noise more than {MAX_DRAWS} times")
        noise = tensors.tensor(("draw", len(outcome.draws)), draw.dtype)
        outcome.draws.append(draw)
        outcome.kept.append((noise, noise._version))
        return noise

    def given(own: Any) -> bool:
        if own is not None and own is not generator:
            raise UntraceableError("it draws with a generator of its own")
        return own is not None

    def replacement(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def draw(
            shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
        ) -> Tensor:
            layout = None if layout is torch.strided else layout
            made = Draw(function, dtype, generator=given(generator), device=device is not None)
            return drawn(made, shape, layout=layout)

        return draw

    def randn(*size: Any, generator: Any = None, dtype: Any = None, device: Any = None, **unknown: Any) -> Tensor:
        size = size or (unknown.pop("size", ()),)
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        made = Draw(originals["randn"], dtype, generator=given(generator), device=device is not None)
        return drawn(made, shape, **unknown)

    def randn_like(input: Tensor, *, dtype: Any = None, **unknown: Any) -> Tensor:
        made = Draw(originals["randn_like"], dtype or (input.dtype if tensors.dtype is None else None), like=True)
        return drawn(made, input.shape, **unknown)

    originals: dict[str, Any] = {"randn": torch.randn, "randn_like": torch.randn_like}
    found: list[Any] = [(torch, "randn", randn), (torch, "randn_like", randn_like)]
    kind: Any = type(scheduler)
    for module in _modules_of(kind):
        if (function := getattr(module, "randn_tensor", None)) is not None:
            found.append((module, "randn_tensor", replacement(function)))
    return found


@cache
def _modules_of(kind: Any) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(modules_of(kind)))


@contextmanager
def _guarded(generator: Any) -> Iterator[None]:
    """Context that raises UntraceableError, and puts the state back, where random numbers were drawn."""
    generators = [one for one in (generator if isinstance(generator, list) else [generator]) if one is not None]
    before = [one.get_state() for one in generators]
    everywhere = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        moved = False
        if not torch.equal(torch.get_rng_state(), everywhere[0]):
            moved = True
            torch.set_rng_state(everywhere[0])
        now: Any = np.random.get_state()  # noqa: NPY002
        if now[2:] != everywhere[1][2:] or not np.array_equal(now[1], everywhere[1][1]):  # type: ignore[index]
            moved = True
            np.random.set_state(everywhere[1])  # noqa: NPY002
        if random.getstate() != everywhere[2]:
            moved = True
            random.setstate(everywhere[2])
        for one, state in zip(generators, before, strict=True):
            if not torch.equal(one.get_state(), state):
                moved = True
                one.set_state(state)
    if moved:
        raise UntraceableError("it draws random numbers by another function than torch.randn's")


def _snapshot(value: Any) -> Any:
    """A value, with copies of the containers in it."""
    if type(value) is dict:
        return value, {key: _snapshot(item) for key, item in value.items()}
    if type(value) is list:
        return value, [_snapshot(item) for item in value]
    return value, value.copy() if isinstance(value, np.ndarray) else None


class _Reader:
    """Describes a run's results and changes by its inputs and by sums."""

    def __init__(self, inputs: _Inputs, trial: _Outcome) -> None:
        self._inputs, self._trial = inputs, trial
        self._shape = inputs.example_shape(2, 3, 5)
        self._numbers: dict[int, int] = {}
        self._paths: list[tuple[Any, ...]] = []
        self.dtypes: list[torch.dtype] = []

    def part(self, value: Any, path: tuple[Any, ...] = ("result",)) -> Part:
        """A value that the step returned or kept, at a path."""
        if (source := self._trial.given.get(id(value))) is not None:
            return Given(source)
        if isinstance(value, Tensor):
            if value.ndim < 2:
                return Small(value.clone())
            if tuple(value.shape) != self._shape or not value.is_floating_point():
                raise UntraceableError(f"its step makes a tensor of {value.dtype} of another shape than the sample")
            return self._sum(value, path)
        if is_plain(value):
            return Constant(value)
        if isinstance(value, Mapping):
            parts = [self.part(item, (*path, key)) for key, item in value.items()]
            return Container(type(value), tuple(parts), tuple(value))
        if isinstance(value, tuple | list):
            kind = getattr(type(value), "_make", type(value))
            return Container(kind, tuple(self.part(item, (*path, key)) for key, item in enumerate(value)))
        if hasattr(value, "__dict__"):
            names, kind = tuple(vars(value)), partial(_object, type(value))
            return Container(kind, tuple(self.part(item, (*path, key)) for key, item in vars(value).items()), names)
        raise UntraceableError(f"its step makes a {type(value).__name__}")

    def _sum(self, value: Tensor, path: tuple[Any, ...]) -> Sum:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._paths)
            self._paths.append(path)
            self.dtypes.append(value.dtype)
        return Sum(self._numbers[id(value)])

    def writes(self) -> Iterator[Write]:
        """The changes of the scheduler's attributes."""
        before, after = self._trial.before, self._trial.after
        if missing := sorted(set(before) - set(after)):
            raise UntraceableError(f"its step deletes {', '.join(missing)}")
        for name, value in after.items():
            if not name.startswith(_OURS):
                yield from self._changes(value, before.get(name), ("state", name))
        for tensor in self._trial.changed:
            source = self._trial.given[id(tensor)]
            yield Write(source, self._sum(tensor, ("given", source)), "copy")

    def _changes(self, value: Any, before: Any, source: Source) -> Iterator[Write]:
        path = ("after", *source[1:])
        if before is None or value is not before[0]:
            if before is not None and type(value) is type(before[0]) and is_plain(value) and value == before[0]:
                return
            yield Write(source, self.part(value, path))
        elif type(value) is list and len(value) != len(before[1]):
            parts = tuple(self.part(item, (*path, key)) for key, item in enumerate(value))
            yield Write(source, Container(list, parts), "fill")
        elif type(value) is list:
            for key, (item, old) in enumerate(zip(value, before[1], strict=True)):
                yield from self._changes(item, old, (*source, key))
        elif type(value) is dict:
            if set(before[1]) - set(value):
                raise UntraceableError(f"its step deletes items of {source[1]}")
            for key, item in value.items():
                yield from self._changes(item, before[1].get(key), (*source, key))
        elif isinstance(value, np.ndarray) and not np.array_equal(value, before[1]):
            raise UntraceableError(f"its step changes {source[1]} in place")

    def sums_of(self, outcome: _Outcome) -> list[Tensor]:
        """The tensors of another run where this one's sums are."""
        found = []
        tensors = {outcome.given.get(id(tensor)): tensor for tensor, _ in outcome.kept}
        for first, *path in self._paths:
            value: Any = {"result": outcome.result, "after": outcome.after, "given": tensors}[first]
            try:
                for key in path:
                    value = value[key] if isinstance(value, Mapping | tuple | list) else getattr(value, key)
            except (KeyError, IndexError, AttributeError):
                value = None
            if not isinstance(value, Tensor):
                raise UntraceableError("its step does other things in float64")
            found.append(value)
        return found


def _object(kind: type, **attributes: Any) -> Any:
    new: Any = object.__new__(kind)
    vars(new).update(attributes)
    return new


def _combination(inputs: _Inputs, sums: list[Tensor], draws: bool) -> Combination:
    """The sums of a run on basis vectors, proved on its random positions."""
    vectors = _BasisVectors(inputs)
    rows = np.array([_coefficients(value, vectors, inputs) for value in sums])
    rows = rows.reshape(len(sums), len(inputs.names))
    combination = Combination(rows)
    if inputs.wide and draws:
        combination = _learned(combination, inputs, sums)
    found = [value.double()[..., -_RANDOM:] for value in sums]
    _prove(combination, inputs, lambda source: vectors.tensor(source)[..., -_RANDOM:], found, _TOLERANCE)
    return combination


def _coefficients(value: Tensor, vectors: _BasisVectors, inputs: _Inputs) -> Array:
    """The coefficients of all inputs in a tensor [1, C, ..., positions]."""
    count = len(inputs.names)
    if value.shape[-1] != vectors.shape[-1]:
        raise UntraceableError("its step makes a tensor of another shape than the sample")
    found: Array = value.double().reshape(-1, vectors.shape[-1]).numpy()
    if not np.isfinite(found).all():
        raise UntraceableError("its results are not finite")
    row, size = found[0, 1 : 1 + count].copy(), max(float(np.abs(found[:, 1 : 1 + count]).max()), 1e-300)
    if np.abs(found[:, 0]).max() > _TOLERANCE * size:
        raise UntraceableError("its steps are not linear: without inputs its result is not 0")
    if np.abs(found[:, 1 : 1 + count] - row).max() > _TOLERANCE * size:
        raise UntraceableError("its coefficients differ by channel")
    if np.abs(found[:, 1 + count : 1 + 2 * count] / _SHORT - row).max() > _TOLERANCE * size:
        raise UntraceableError("its steps are not linear")
    row[np.abs(row) < _ROUNDING * size] = 0.0
    return row


def _learned(combination: Combination, inputs: _Inputs, sums: list[Tensor]) -> Combination:
    """With the coefficient of noise as a power of the variance channels, if it depends on them."""
    first, names = 1 + 2 * len(inputs.names), inputs.names
    for number, value in enumerate(sums):
        at = value.double().reshape(-1, value.shape[-1])[0, first : first + 2 * MAX_DRAWS].view(MAX_DRAWS, 2)
        for draw, (low, high) in enumerate(at.tolist()):
            index = names.index(("draw", draw))
            middle = float(combination.coefficients[number, index])
            if abs(low - middle) + abs(high - middle) <= _TOLERANCE * abs(middle):
                continue
            if number or combination.noise is not None or min(low, middle, high) <= 0:
                raise UntraceableError("its noise depends on the variance channels in another way than by a power")
            l_0, l_v = float(np.log2(middle)), float(np.log2(high) - np.log2(low)) / 2
            combination.coefficients[number, index] = 0.0
            combination = replace(combination, noise=index, l_0=l_0, l_v=l_v)
    return combination


def _prove(
    combination: Combination,
    inputs: _Inputs,
    values: Callable[[Source], Tensor],
    found: list[Tensor],
    tolerance: float,
    together: bool = False,
) -> None:
    """Raise UntraceableError unless the sums give the tensors that were found, up to a share of each one's terms
    (`together`: of the largest sum's, where the original rounded what they share)."""
    made, sizes = _evaluate(combination, inputs, values)
    largest = max(sizes, default=0.0)
    for got, want, size in zip(made, found, sizes, strict=True):
        if want.shape != got.shape or not torch.isfinite(want).all():
            raise UntraceableError("its results are not finite, or of another shape")
        error = float((got - want).abs().max()) / max(largest if together else size, 1e-300)
        if not error <= tolerance:
            raise UntraceableError("its steps are not linear")


def _evaluate(
    combination: Combination, inputs: _Inputs, values: Callable[[Source], Tensor]
) -> tuple[list[Tensor], list[float]]:
    """The sums in float64, plainly written, and the size of each one's terms."""
    tensors = [values(source) for source in inputs.names]
    variance = None
    if inputs.wide:
        tensors[1], variance = tensors[1].chunk(2, dim=1)

    def total(row: Array) -> tuple[Tensor, float]:
        terms = [c * v for c, v in zip(row.tolist(), tensors, strict=True) if c]
        return sum(terms, 0 * tensors[0]), max((float(term.abs().max()) for term in terms), default=0.0)

    x0, x0_size = None, 0.0
    if combination.x0 is not None:
        x0, x0_size = total(combination.x0)
        if isinstance(combination.clip, DynamicThreshold):
            rank = combination.clip.rank(x0[0].numel(), torch.float64)
            bound = quantile_bound(x0, rank).view(-1, *[1] * (x0.ndim - 1))
            x0 = torch.clamp(x0, -bound, bound) / bound
        elif combination.clip is not None:
            x0 = x0.clamp(-combination.clip, combination.clip)
    made, sizes = [], []
    for number, row in enumerate(combination.coefficients):
        value, size = total(row)
        if x0 is not None and combination.of_x0[number]:  # type: ignore[index]
            value, size = value + combination.of_x0[number] * x0, max(size, abs(combination.of_x0[number]) * x0_size)  # type: ignore[index]
        if number == 0 and combination.noise is not None:
            std = torch.exp2(combination.l_0 + combination.l_v * variance)  # type: ignore[operator, arg-type]
            noise = std * tensors[combination.noise]
            value, size = value + noise, max(size, float(noise.abs().max()))
        made.append(value)
        sizes.append(size)
    return made, sizes


def _clip(config: Any) -> float | DynamicThreshold | None:
    """The limit of x0 that a diffusers config asks for, read as its schedulers read it."""

    def option(name: str, default: Any) -> Any:
        return getattr(config, name, config.get(name, default) if isinstance(config, Mapping) else default)

    if option("thresholding", False):
        quantile, ceiling = float(option("dynamic_thresholding_ratio", 0.995)), float(option("sample_max_value", 1.0))
        return DynamicThreshold(quantile, 1.0, max(ceiling, 1.0))
    return float(option("clip_sample_range", 1.0)) if option("clip_sample", False) else None


def _with_clip(config: Any, clip_sample: bool) -> Any:
    """A copy of a config without thresholding."""
    copied = type(config)(dict(config))
    vars(copied).update(vars(config))
    for name, value in {"clip_sample": clip_sample, "thresholding": False}.items():
        if name in copied:
            OrderedDict.__setitem__(copied, name, value)
        if name in vars(copied):
            vars(copied)[name] = value
    return copied


def _clipped(
    combination: Combination,
    inputs: _Inputs,
    linear: _Outcome,
    reader: _Reader,
    clip: float | DynamicThreshold,
    run: Callable[..., _Outcome],
) -> Combination:
    """The sums with what passes through a limited x0 written over it. Candidates for x0 are what the step converts its
    output to and what it returns or keeps beside the next sample; the sums are proved on the step with its limit."""
    vectors = _BasisVectors(inputs)
    converted = [value for value in linear.converted if value.shape[-1] == vectors.shape[-1]]
    for p in (*(_coefficients(value, vectors, inputs) for value in converted), *combination.coefficients[1:]):
        if not p.any():
            continue
        # With which x0 lies on both sides of the limit.
        size = (clip if isinstance(clip, float) else 1.0) / float(np.linalg.norm(p))
        examples = _Examples(inputs, seed=1, size=size)
        found = reader.sums_of(run(examples))
        for of_x0, rest in _over_x0(combination, inputs, p, reader, run):
            over = replace(combination, coefficients=rest, x0=p, of_x0=of_x0, clip=clip)
            try:
                _prove(over, inputs, examples.values(), found, _TOLERANCE)
            except UntraceableError:
                continue
            return over
    raise UntraceableError("what limits its x0 cannot be told from its other terms")


def _over_x0(
    combination: Combination,
    inputs: _Inputs,
    p: Array,
    reader: _Reader,
    run: Callable[..., _Outcome],
) -> Iterator[tuple[Array, Array]]:
    """Ways to write the sums over x0: its coefficients, and those of the other terms."""
    rows = combination.coefficients
    pivot = 1 if p[1] else int(np.abs(p).argmax())
    of_x0 = rows[:, pivot] / p[pivot]
    yield of_x0, _cleaned(rows - of_x0[:, None] * p, rows)
    # Where x0 is at its bound it is constant: the derivatives there are those of the other terms. How it is limited
    # makes no difference to them.
    saturated = _Saturated(inputs, p)
    outcome = run(saturated, clip_sample=True)
    found = np.array([value.double().reshape(-1, value.shape[-1])[0].numpy() for value in reader.sums_of(outcome)])
    rest = _cleaned((found[:, 1:] - found[:, :1]) / saturated.added, rows)
    bound = _clip(outcome.before[_CONFIG][0])
    if isinstance(bound, float):
        yield (found[:, 0] - rest @ saturated.base) / bound, rest


def _cleaned(rest: Array, rows: Array) -> Array:
    """Without what rounding left of a difference."""
    return np.where(np.abs(rest) < 1e-9 * np.abs(rows).max(axis=1, keepdims=True), 0.0, rest)
