"""The steps of a fused scheduler: traced once for what they read, then run as sums."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import cache, partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ...compiler.step import (
    MISSING,
    Constant,
    Draw,
    Given,
    Means,
    Part,
    Small,
    Source,
    Sum,
    TracedStep,
    UntraceableError,
    Write,
    laid_out,
    trace_step,
)
from ...ops.combine import Combine
from ...utils.identity import NoValueError, value_key, view_index
from ...utils.lru import LRU
from .contents import Contents
from .fall_through import FallThroughError

_STEPS = 4096  # kept for a class; every step of a run is one


class FusedSteps:
    """Runs the steps of a scheduler.

    Nothing of a run is kept here: tensors and counters are read from the scheduler's own attributes and written to
    them, as by the original, so that they may be changed, replaced and copied between any two steps. What is kept are
    traced steps, by all that they read when they were traced.
    """

    def __init__(self, base: Any) -> None:
        self._base = base  # the class before it was fused
        self._contents = Contents()
        self._indices: LRU[tuple[int | None]] = LRU(_STEPS)
        self.last: _ReadyStep | None = None  # of the last step; None if the original made it

    def look(self, scheduler: Any) -> None:
        """Read what is on a device now, rather than in the first step."""
        for value in vars(scheduler).values():
            if isinstance(value, Tensor) and value.ndim == 1 and value.device.type != "cpu":
                self._contents.values(value)

    def find_index(self, scheduler: Any, timestep: Any) -> None:
        """Set a scheduler's index where a run begins, which some `scale_model_input`s look for on the device, waiting
        for it. The original looks for it in a copy on the host."""
        state = vars(scheduler)
        timesteps = state.get("timesteps")
        begins = "_step_index" in state and state["_step_index"] is None and state.get("_begin_index") is None
        if not begins or not isinstance(timesteps, Tensor) or timesteps.ndim != 1:
            return
        if (index := view_index(timesteps, timestep)) is None:
            return

        def look() -> tuple[int | None]:
            twin: Any = object.__new__(self._base)
            for name, value in state.items():
                vars(twin)[name] = value.cpu() if isinstance(value, Tensor) and value.ndim < 2 else value
            with torch.inference_mode(False), torch.no_grad():
                twin.scale_model_input(torch.zeros(1, 1), twin.timesteps[index])
            return (vars(twin)["_step_index"],)

        try:
            (state["_step_index"],) = self._indices.get_or_make((self._contents.of(timesteps), index), look)
        except Exception:  # the original says it
            return

    def step(self, scheduler: Any, output: Any, timestep: Any, sample: Any, options: Mapping[str, Any]) -> Any:
        """A step, with further arguments by name. Raises `FallThroughError`, before any change, if the original must
        run."""
        self.last = None
        for tensor in (sample, output):
            if type(tensor) is not Tensor or tensor.layout is not torch.strided:
                raise FallThroughError(f"sample or model output is a {type(tensor).__name__}")
        if torch.is_grad_enabled() and (output.requires_grad or sample.requires_grad):
            raise FallThroughError("its step must let gradients through")
        kind: Any = type(scheduler)
        state, known = vars(scheduler), _known_steps(kind, self._base.step)
        at = self._single(state, timestep) if isinstance(timestep, Tensor) else (type(timestep), timestep)
        call = [output.dtype, output.shape, output.stride(), output.device]
        call += (sample.dtype, sample.shape, sample.stride(), sample.device, at)
        for name, value in options.items():
            call += (name, self._option(state, name, value))
        fixed = tuple(call)
        ready = known.find(fixed, self._contents, state)
        if ready is None:
            reads, ready = self._trace(scheduler, output, timestep, sample, options)
            known.put(reads, fixed, self._contents, state, ready)
        if isinstance(ready, str):
            raise FallThroughError(ready)
        result = ready.run(_Call(state, output, timestep, sample, options))
        self.last = ready
        return result

    def _trace(
        self, scheduler: Any, output: Tensor, timestep: Any, sample: Tensor, options: Mapping[str, Any]
    ) -> tuple[frozenset[str], _ReadyStep | str]:
        """The attributes that a step reads, and what it was traced to, or why it was not."""
        on_host = partial(self._on_host, vars(scheduler))
        try:
            _check_tensors(output, sample)
            given = {name: on_host(value) for name, value in options.items()}
            traced = trace_step(scheduler, self._base.step, output, on_host(timestep), sample, given)
        except UntraceableError as error:
            return error.reads, str(error)
        return traced.reads, _ReadyStep(traced, type(scheduler), output, sample)

    def _single(self, state: Mapping[str, Any], tensor: Tensor) -> Any:
        """The key of a tensor of one number, which is not read from a device if it is one of the timesteps."""
        if tensor.numel() != 1:
            raise FallThroughError("its timesteps differ by sample")
        return Tensor, tensor.dtype, tensor.ndim, self._number(state, tensor)

    def _number(self, state: Mapping[str, Any], tensor: Tensor) -> Any:
        timesteps = state.get("timesteps")
        if type(timesteps) is Tensor and timesteps.ndim == 1:
            if (index := view_index(timesteps, tensor)) is not None:
                return self._contents.values(timesteps)[index]
        return tensor.item()

    def _option(self, state: Mapping[str, Any], name: str, value: Any) -> Any:
        """The key of a further argument."""
        if isinstance(value, Tensor):
            return self._single(state, value) if value.ndim < 2 else self._contents.of(value)
        if isinstance(value, torch.Generator):
            return torch.Generator
        if isinstance(value, list) and value and all(isinstance(item, torch.Generator) for item in value):
            return list, len(value)
        try:
            return value_key(value)
        except NoValueError:
            raise FallThroughError(f"{name} of its step is a {type(value).__name__}") from None

    def _on_host(self, state: Mapping[str, Any], value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim > 1:
            return value
        return torch.tensor(self._number(state, value), dtype=value.dtype).reshape(value.shape)


class _KnownSteps:
    """What is known about a class's steps: what they were traced to, or why they were not, by the attributes that they
    read and by what these contained. Most of them read the same few sets of attributes; the last to fit is tried first.
    """

    def __init__(self) -> None:
        self._by_reads: dict[tuple[str, ...], LRU[_ReadyStep | str]] = {}
        self._order: tuple[tuple[str, ...], ...] = ()

    def find(self, call: Hashable, contents: Contents, state: Mapping[str, Any]) -> _ReadyStep | str | None:
        """What is known about a step."""
        for reads in self._order:
            found = self._by_reads[reads].get((call, contents.key(state, reads)))
            if found is not None and (isinstance(found, str) or found.is_current()):
                if reads is not self._order[0]:
                    self._order = (reads, *(other for other in self._order if other is not reads))
                return found
        return None

    def put(
        self,
        names: frozenset[str],
        call: Hashable,
        contents: Contents,
        state: Mapping[str, Any],
        found: _ReadyStep | str,
    ) -> None:
        """Keep what was found about a step that reads some attributes."""
        reads = tuple(sorted(names))
        if reads not in self._by_reads:
            self._by_reads[reads] = LRU(_STEPS)
            self._order = (reads, *self._order)
        self._by_reads[reads].put((call, contents.key(state, reads)), found)


@cache
def _known_steps(kind: Any, original: Callable[..., Any]) -> _KnownSteps:
    return _KnownSteps()


class _Call:
    """A step's arguments, the scheduler's attributes, and what is drawn."""

    __slots__ = ("noises", "options", "output", "sample", "state", "timestep")

    def __init__(
        self, state: dict[str, Any], output: Tensor, timestep: Any, sample: Tensor, options: Mapping[str, Any]
    ) -> None:
        self.state, self.output, self.timestep, self.sample, self.options = state, output, timestep, sample, options
        self.noises: list[Tensor] = []


class _ReadyStep:
    """A `TracedStep`, made ready for tensors like a sample."""

    def __init__(self, traced: TracedStep, kind: Any, output: Tensor, sample: Tensor) -> None:
        self.traced = traced
        self._draws = traced.draws
        # A class or a module may be given other functions.
        modules = {(draw.module, draw.name): draw.function for draw in traced.draws}
        self._others = [(kind, name, value) for name, value in traced.of_class.items()]
        self._others += [(module, name, function) for (module, name), function in modules.items()]
        self._reordered = any(traced.orders)
        self._inputs = [_fetch(source) for source in traced.sources]
        self._combine: Combine | None = None
        if traced.combination is not None:
            wide = torch.float64 in (output.dtype, sample.dtype, *traced.dtypes)
            self._combine = Combine(traced.combination, sample.device, torch.float64 if wide else torch.float32)
        self._result = _build(traced.result)
        # What may fail comes first.
        writes = sorted(traced.writes, key=lambda write: write.how != "copy")
        self._values = [_build(write.part) for write in writes]
        self._stores = [_store(write) for write in writes]

    def is_current(self) -> bool:
        """Whether the class and the modules still have what the step read of them."""
        return all(getattr(owner, name, MISSING) is value for owner, name, value in self._others)

    def run(self, call: _Call) -> Any:
        """The step's result; the scheduler's attributes are changed as by the original."""
        call.noises = [_drawn(draw, call) for draw in self._draws]
        sums: list[Tensor] = []
        if self._combine is not None:
            sums = self._combine([fetch(call) for fetch in self._inputs], self.traced.dtypes)
            if self._reordered:
                sums = [laid_out(total, order) for total, order in zip(sums, self.traced.orders, strict=True)]
        result = self._result(call, sums)
        # All values first: some are what other attributes were.
        values = [value(call, sums) for value in self._values]
        for store, value in zip(self._stores, values, strict=True):
            store(call, value)
        return result


def _drawn(draw: Draw, call: _Call) -> Tensor:
    sample = call.sample
    try:
        if draw.like:
            same = draw.dtype in (None, sample.dtype)
            return draw.function(sample if same else torch.empty_like(sample, dtype=draw.dtype))
        options: dict[str, Any] = {"dtype": draw.dtype}
        if draw.generator:
            options["generator"] = generator = call.options["generator"]
            if isinstance(generator, list) and 1 != len(generator) < len(sample):
                raise ValueError("too few generators")  # before some of them are moved
        if draw.device:
            options["device"] = sample.device
        return draw.function(sample.shape, **options).to(sample.device)
    except Exception as error:  # the original says it
        raise FallThroughError(f"its noise cannot be drawn ({error})") from error


def _fetch(source: Source) -> Callable[[_Call], Any]:
    """A function that returns what is at a source."""
    kind, *keys = source
    if kind == "state":
        name, *rest = keys

        def from_state(call: _Call) -> Any:
            value = call.state[name]
            for key in rest:
                value = value[key]
            return value

        return from_state
    if kind == "draw":
        return lambda call: call.noises[keys[0]]
    if kind == "option":
        return lambda call: call.options[keys[0]]
    return attrgetter(kind)


def _build(part: Part) -> Callable[[_Call, list[Tensor]], Any]:
    """A function that makes a part of a result."""
    if isinstance(part, Sum):
        return lambda call, sums: sums[part.number]
    if isinstance(part, Given):
        fetch = _fetch(part.source)
        return lambda call, sums: fetch(call)
    if isinstance(part, Means):
        return lambda call, sums: call.output[:, : call.sample.shape[1]]
    if isinstance(part, Small):
        return partial(_small, part.value, {})
    if isinstance(part, Constant):
        return lambda call, sums: part.value
    parts, keys, kind = [_build(item) for item in part.parts], part.keys, part.kind
    if keys is None:
        return lambda call, sums: kind([build(call, sums) for build in parts])
    return lambda call, sums: kind(**{key: build(call, sums) for key, build in zip(keys, parts, strict=True)})


def _small(value: Tensor, by_device: dict[torch.device, Tensor], call: _Call, sums: list[Tensor]) -> Tensor:
    """A new small tensor, where the levels are."""
    device = next((call.state[name].device for name in ("sigmas", "timesteps") if name in call.state), value.device)
    if device not in by_device:
        by_device[device] = value.to(device)
    return by_device[device].clone()


def _store(write: Write) -> Callable[[_Call, Any], None]:
    """A function that makes a change."""
    if write.how != "set":
        fetch = _fetch(write.source)
        if write.how == "copy":
            return lambda call, value: fetch(call).copy_(value)
        return lambda call, value: fetch(call).__setitem__(slice(None), value)
    _, name, *keys = write.source
    if not keys:
        return lambda call, value: call.state.__setitem__(name, value)
    holder = _fetch(write.source[:-1])
    return lambda call, value: holder(call).__setitem__(keys[-1], value)


def _check_tensors(output: Tensor, sample: Tensor) -> None:
    for tensor in (sample, output):
        if not tensor.is_floating_point() or not tensor.numel():
            raise UntraceableError("sample and model output are not floating tensors with elements")
    if output.device != sample.device or sample.device.type == "meta":
        raise UntraceableError("sample and model output are on different devices, or on none")
