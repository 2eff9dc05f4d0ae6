"""Run a step of a copy of a scheduler, and note what it does."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..patching import in_float64, modules_of, replaced
from .parts import OUTPUT, SAMPLE, TIMESTEP, Draw, Source, UntraceableError
from .tensors import CONFIG, MAX_DRAWS, Inputs, Tensors, order_of

_READS, _REFUSED, _CONVERTED = "_fastcfg_reads", "_fastcfg_refused", "_fastcfg_converted"
MISSING = object()  # what a class does not have


@dataclass(eq=False)
class Outcome:
    """What one run of a step did."""

    before: dict[str, Any]  # attributes, with copies of containers
    given: dict[int, Source] = field(default_factory=dict)  # tensors by identity
    kept: list[tuple[Tensor, int]] = field(default_factory=list)  # the same, and the noise, with their versions
    changed: list[Tensor] = field(default_factory=list)  # in place
    draws: list[Draw] = field(default_factory=list)
    after: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    converted: list[Tensor] = field(default_factory=list)


@dataclass(eq=False)
class Reads:
    """The names of the attributes that a step read: the scheduler's, and those it looked for in the class."""

    own: set[str]
    of_class: set[str] = field(default_factory=set)


def run_step(
    scheduler: Any,
    step: Callable[..., Any],
    timestep: Any,
    options: Mapping[str, Any],
    inputs: Inputs,
    reads: Reads,
    tensors: Tensors,
    clip_sample: bool | None = None,
) -> Outcome:
    """Run a step of a copy of a scheduler on some tensors; with `clip_sample` without thresholding, and with that for
    its option."""
    outcome = Outcome({})

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
            value = inputs.copy_of(value)
            outcome.given[id(value)] = source
            outcome.kept.append((value, value._version))
            return value
        if type(value) is dict:
            return {key: copied(item, (*source, key)) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(copied(item, (*source, key)) for key, item in enumerate(value))
        return value.copy() if isinstance(value, np.ndarray) else value

    state = {name: copied(value, ("state", name)) for name, value in vars(scheduler).items() if name != CONFIG}
    if (config := vars(scheduler).get(CONFIG)) is not None:
        state[CONFIG] = config if clip_sample is None else _with_clip(config, clip_sample)
    outcome.before = {name: _snapshot(value) for name, value in state.items()}
    own_kind: Any = type(scheduler)
    kind = _traced_class(own_kind, step)
    twin: Any = object.__new__(kind)
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
            outcome.result = step(twin, made(OUTPUT), timestep=t, sample=made(SAMPLE), **given)
    except UntraceableError:
        raise
    except Exception as error:
        raise UntraceableError(f"its step fails on an example ({type(error).__name__}: {error})") from error
    outcome.changed = [tensor for tensor, version in outcome.kept if tensor._version != version]
    if any(tensor.ndim < 2 or outcome.given[id(tensor)][0] == "draw" for tensor in outcome.changed):
        raise UntraceableError("its step changes levels or noise in place")
    outcome.after = {name: value for name, value in twin_state.items() if name not in (_READS, _REFUSED, _CONVERTED)}
    return outcome


def class_attribute(kind: Any, name: str) -> Any:
    """An attribute of a class, `MISSING` if it has none; None for class methods, which are a new object each time."""
    value = getattr(kind, name, MISSING)
    return value if value is getattr(kind, name, MISSING) else None


@contextmanager
def unchanged(scheduler: Any, step: Any) -> Iterator[None]:
    """Context that raises UntraceableError, and puts back what it was, where a step changes other things than its
    scheduler: attributes of its classes, or variables of its module."""
    kind: Any = type(scheduler)
    owners: list[Any] = [*_traced_class(kind, step).__mro__[:-1], None]

    def now() -> list[dict[str, Any]]:
        return [dict(getattr(step, "__globals__", {}) if owner is None else vars(owner)) for owner in owners]

    before, failed = now(), None
    try:
        yield
    except UntraceableError as error:
        failed = error
    for owner, old, new in zip(owners, before, now(), strict=True):
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


@cache
def _traced_class(kind: Any, step: Any) -> Any:
    """A subclass that notes which attributes are read, and what `convert_model_output` returns."""
    own = object.__getattribute__

    def get(self: Any, name: str) -> Any:
        state = own(self, "__dict__")
        if name == "__dict__":
            raise UntraceableError("its step reads its __dict__")
        if name not in state:
            state[_READS].of_class.add(name)
        else:
            state[_READS].own.add(name)
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


def _drawing(scheduler: Any, generator: Any, inputs: Inputs, tensors: Tensors, outcome: Outcome) -> list[Any]:
    """Replacements for the functions that draw, which give the run's noise and note the draw."""

    def drawn(draw: Draw, shape: Any, like: Tensor | None = None, **unknown: Any) -> Tensor:
        if unknown := {name: value for name, value in unknown.items() if value is not None}:
            raise UntraceableError(f"its noise is drawn with {', '.join(unknown)}")
        if tuple(shape) != tensors.shape:
            raise UntraceableError("its noise has another shape than the sample")
        if len(outcome.draws) == MAX_DRAWS:
            raise UntraceableError(f"it draws noise more than {MAX_DRAWS} times")
        noise = tensors.tensor(("draw", len(outcome.draws)), draw.dtype)
        if like is not None:
            noise = torch.empty_like(like, dtype=noise.dtype).copy_(noise)
        outcome.given[id(noise)] = ("draw", len(outcome.draws))
        outcome.draws.append(draw)
        outcome.kept.append((noise, noise._version))
        return noise

    def given(own: Any) -> bool:
        if own is not None and own is not generator:
            raise UntraceableError("it draws with a generator of its own")
        return own is not None

    def replacement(module: Any, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def draw(
            shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
        ) -> Tensor:
            layout = None if layout is torch.strided else layout
            given_device = device is not None
            made = Draw(module, "randn_tensor", function, dtype, generator=given(generator), device=given_device)
            return drawn(made, shape, layout=layout)

        return draw

    def randn(*size: Any, generator: Any = None, dtype: Any = None, device: Any = None, **unknown: Any) -> Tensor:
        size = size or (unknown.pop("size", ()),)
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        given_device = device is not None
        made = Draw(torch, "randn", originals["randn"], dtype, generator=given(generator), device=given_device)
        return drawn(made, shape, **unknown)

    def randn_like(input: Tensor, *, dtype: Any = None, **unknown: Any) -> Tensor:
        if tensors.dtype is None and order_of(input) != inputs.orders[SAMPLE]:
            # Its numbers depend on the layout.
            raise UntraceableError("its noise is drawn like a tensor of another layout than the sample's")
        dtype = dtype or (input.dtype if tensors.dtype is None else None)
        made = Draw(torch, "randn_like", originals["randn_like"], dtype, like=True)
        return drawn(made, input.shape, like=input, **unknown)

    originals: dict[str, Any] = {"randn": torch.randn, "randn_like": torch.randn_like}
    found: list[Any] = [(torch, "randn", randn), (torch, "randn_like", randn_like)]
    kind: Any = type(scheduler)
    for module in _modules_of(kind):
        if (function := getattr(module, "randn_tensor", None)) is not None:
            found.append((module, "randn_tensor", replacement(module, function)))
    return found


@cache
def _modules_of(kind: Any) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(modules_of(kind)))


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
    moved = [(put, state) for (get, put), state in zip(states, before, strict=True) if not _is_same(get(), state)]
    for put, state in moved:
        put(state)
    if moved:
        raise UntraceableError("it draws random numbers by another function than torch.randn's") from failed
    if failed is not None:
        raise failed


def _is_same(a: Any, b: Any) -> bool:
    """Whether two states of a generator are the same: tensors, Python's tuple, or numpy's, with an array in it."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a[1], np.ndarray):
        return np.array_equal(a[1], b[1]) and a[2:] == b[2:]
    return bool(a == b)


def _snapshot(value: Any) -> Any:
    """A value, with copies of the containers in it."""
    if type(value) is dict:
        return value, {key: _snapshot(item) for key, item in value.items()}
    if type(value) is list:
        return value, [_snapshot(item) for item in value]
    return value, value.copy() if isinstance(value, np.ndarray) else None


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
