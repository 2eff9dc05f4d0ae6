"""A traced step made ready to run: functions that fetch its inputs, build its results and store its changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ...compiler.step import (
    MISSING,
    Constant,
    Container,
    Draw,
    Given,
    Means,
    Part,
    Small,
    Source,
    Sum,
    TracedStep,
    Write,
    laid_out,
)
from ...ops.combine import Combine
from ...utils.identity import Same
from ...utils.lru import LRU
from .fall_through import FallThroughError

_FORMS = 256  # kept for a class


class Call:
    """A step's arguments, the scheduler's attributes, and what is drawn and computed."""

    __slots__ = ("constants", "noises", "options", "output", "sample", "state", "sums", "timestep")

    def __init__(
        self, state: dict[str, Any], output: Tensor, timestep: Any, sample: Tensor, options: Mapping[str, Any]
    ) -> None:
        self.state, self.output, self.timestep, self.sample, self.options = state, output, timestep, sample, options
        self.constants: tuple[Any, ...] = ()
        self.noises: list[Tensor] = []
        self.sums: list[Tensor] = []


class ReadyStep:
    """A traced step, made ready for tensors like a sample: what it has in common with others, and its numbers."""

    __slots__ = ("combine", "constants", "following", "form")

    def __init__(self, form: StepForm, constants: tuple[Any, ...], combine: Combine | None) -> None:
        self.form, self.constants, self.combine = form, constants, combine
        self.following: Any = None  # of `steps`: what came after it

    def is_current(self) -> bool:
        """Whether the class and the modules still have what the step read of them."""
        return all(getattr(owner, name, MISSING) is value for owner, name, value in self.form.others)

    def run(self, call: Call) -> Any:
        """The step's result; the scheduler's attributes are changed as by the original."""
        form, call.constants = self.form, self.constants
        call.noises = [drawn(draw, call) for draw in form.draws]
        if self.combine is not None:
            sums = self.combine([fetch(call) for fetch in form.inputs], form.dtypes)
            if form.reordered:
                sums = [laid_out(total, order) for total, order in zip(sums, form.orders, strict=True)]
            call.sums = sums
        result = form.result(call)
        # All values first: some are what other attributes were.
        values = [value(call) for value in form.values]
        for store, value in zip(form.stores, values, strict=True):
            store(call, value)
        return result


class StepForm:
    """What steps that differ in nothing but numbers have in common: functions that fetch, build and store."""

    def __init__(self, traced: TracedStep, result: Part, writes: tuple[Write, ...], kind: Any) -> None:
        self.draws, self.dtypes, self.orders = traced.draws, traced.dtypes, traced.orders
        self.reordered = any(traced.orders)
        # A class or a module may be given other functions.
        modules = {(draw.module, draw.name): draw.function for draw in traced.draws}
        self.others = [(kind, name, value) for name, value in traced.of_class.items()]
        self.others += [(module, name, function) for (module, name), function in modules.items()]
        self.inputs = [_fetch(source) for source in traced.sources]
        self.result = _build(result)
        # What may fail comes first.
        writes = tuple(sorted(writes, key=lambda write: write.how != "copy"))
        self.values = [_build(write.part) for write in writes]
        self.stores = [_store(write) for write in writes]


class StepForms:
    """The forms of a class's steps."""

    def __init__(self) -> None:
        self._known: LRU[StepForm] = LRU(_FORMS)

    def ready(self, traced: TracedStep, kind: Any, output: Tensor, sample: Tensor) -> ReadyStep:
        """A traced step made ready for tensors like these."""
        constants: list[Any] = []
        result = _bare(traced.result, constants)
        writes = tuple(write._replace(part=_bare(write.part, constants)) for write in traced.writes)
        of_class = tuple((name, Same(value)) for name, value in traced.of_class.items())
        kinds = _kinds(result), tuple(_kinds(write.part) for write in writes)
        key = (kinds, result, writes, traced.sources, traced.dtypes, traced.orders, traced.draws, of_class)
        form = self._known.get_or_make(key, lambda: StepForm(traced, result, writes, kind))
        combine = None
        if traced.combination is not None:
            wide = torch.float64 in (output.dtype, sample.dtype, *traced.dtypes)
            combine = Combine(traced.combination, sample.device, torch.float64 if wide else torch.float32)
        return ReadyStep(form, tuple(constants), combine)


def _bare(part: Part, constants: list[Any]) -> Part:
    """A part with the numbers of its constants in place of these."""
    if isinstance(part, Small):
        constants.append((part.value, {}))  # and what it is on other devices
        return part._replace(value=len(constants) - 1)  # type: ignore[arg-type]
    if isinstance(part, Constant):
        constants.append(part.value)
        return part._replace(value=len(constants) - 1)
    if isinstance(part, Container):
        return part._replace(parts=tuple(_bare(item, constants) for item in part.parts))
    return part


def _kinds(part: Part) -> Any:
    """The classes of a part and of those in it: parts of two classes are equal if their numbers are."""
    return (Container, *map(_kinds, part.parts)) if isinstance(part, Container) else type(part)


def drawn(draw: Draw, call: Call) -> Tensor:
    """The noise of a draw for a step's sample, by the function that the original calls."""
    sample, moved = call.sample, list[tuple[torch.Generator, Tensor]]()
    try:
        if draw.like:
            same = draw.dtype in (None, sample.dtype)
            return draw.function(sample if same else torch.empty_like(sample, dtype=draw.dtype))
        options: dict[str, Any] = {"dtype": draw.dtype}
        if draw.generator:
            options["generator"] = generator = call.options["generator"]
            if isinstance(generator, list) and 1 != len(generator) < len(sample):
                raise ValueError("too few generators")  # before some of them are moved
            if isinstance(generator, list):  # some draw before what is drawn is put together
                moved = [(one, one.get_state()) for one in generator]
        if draw.device:
            options["device"] = sample.device
        return draw.function(sample.shape, **options).to(sample.device)
    except Exception as error:  # the original says it
        for one, state in moved:
            one.set_state(state)
        raise FallThroughError(f"its noise cannot be drawn ({error})") from error


def _fetch(source: Source) -> Callable[[Call], Any]:
    """A function that returns what is at a source."""
    kind, *keys = source
    if kind == "state":
        name, *rest = keys

        def from_state(call: Call) -> Any:
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


def _build(part: Part) -> Callable[[Call], Any]:
    """A function that makes a part of a result."""
    if isinstance(part, Sum):
        return lambda call: call.sums[part.number]
    if isinstance(part, Given):
        return _fetch(part.source)
    if isinstance(part, Means):
        return lambda call: call.output[:, : call.sample.shape[1]]
    if isinstance(part, Small):
        return lambda call: _small(call, part.value)  # type: ignore[arg-type]
    if isinstance(part, Constant):
        return lambda call: call.constants[part.value]
    parts, keys, kind = [_build(item) for item in part.parts], part.keys, part.kind
    if keys is None:
        return lambda call: kind([build(call) for build in parts])
    return lambda call: kind(**{key: build(call) for key, build in zip(keys, parts, strict=True)})


def _small(call: Call, number: int) -> Tensor:
    """A new small tensor, where the levels are."""
    value, by_device = call.constants[number]
    device = next((call.state[name].device for name in ("sigmas", "timesteps") if name in call.state), value.device)
    if device not in by_device:
        by_device[device] = value.to(device)
    copy: Tensor = by_device[device].clone()
    return copy


def _store(write: Write) -> Callable[[Call, Any], None]:
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
