"""Rehearsals of sampling functions: what a function draws, passes on and tells its callback in a call, and its table.

A function is run on small stand-ins before every call. What it does there, to the last bit, is the key under which its
table is kept: whatever it reads of its model, its arguments or the world around it cannot be missed, and generators and
hooks are those of the call. When it does something new it is compiled, and rehearsed again at the call's shape, dtype
and device; there its table has to fit too. Only a function that refers to nothing but functions and constants, and that
reads nothing of its model, is not run again for a call alike.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.identity import Alike, NoValueError, Same, identity_key
from ..utils.lru import LRU
from .assembly import Compiled, verify
from .branches import mixed
from .draws import regrouped
from .probe import Recording
from .sampler import trace_subject
from .stand_ins import FormError, described, is_passive, is_plain, is_stateless, is_torchs
from .subject import Draw, ModelCall, Subject
from .surroundings import Surroundings, contents_of
from .tape import filled
from .told import check_alike, check_others
from .trial import Trial

_SMALL = 3  # the largest size of a small stand-in's dimensions after the first two
# Of the coefficients of a function that computes in its own dtype, for `verify`.
_ROUNDING = {torch.float64: 1e-7, torch.float32: 4e-6}
_HALF_ROUNDING = 1e-3
_MOST_FAILURES = 6


@dataclass(frozen=True, eq=False)
class SamplerRehearsal:
    """What a sampling function does in a call.

    Attributes:
        compiled: its table; a function's second output, told to its hook, is the first draw of every row.
        subject: how it is called, and which of its outputs is the table's.
        trial: at the shape, dtype and device of the call.
        call: the small trial of this very call, with its generators and hooks; its events are `trial`'s.
    """

    compiled: Compiled
    subject: Subject
    trial: Trial
    call: Trial


@dataclass(frozen=True, eq=False)
class _Closed:
    """A rehearsal that holds for every call alike, as long as what the function refers to, and what it reads of its
    model, is the same."""

    parts: list[Surroundings]
    read: dict[str, Any]  # of the model
    rehearsal: SamplerRehearsal
    confirmed: bool = False

    @property
    def has_objects(self) -> bool:
        """Whether the function refers to objects."""
        return any(part.has_objects for part in self.parts)

    @classmethod
    def of(cls, subject: Subject, names: set[str], rehearsal: SamplerRehearsal) -> _Closed | None:
        functions = getattr(subject.sample_fn, "functions", lambda: [subject.sample_fn])()
        functions += [type(value) for value in subject.arguments.values() if is_stateless(value)]
        parts = [Surroundings(function, objects=True) for function in functions]
        try:
            read = {name: contents_of(getattr(subject.model, name)) for name in names}
        except (NoValueError, AttributeError):
            return None
        return cls(parts, read, rehearsal) if all(part.constant for part in parts) else None

    def holds(self, model: Any) -> bool:
        """Whether nothing of this has changed."""
        try:
            same = all(contents_of(getattr(model, name)) == value for name, value in self.read.items())
        except (NoValueError, AttributeError):
            return False
        return same and all(part.unchanged() for part in self.parts)


_closed: LRU[_Closed] = LRU(64)
_rehearsed: LRU[tuple[Compiled, bool, Trial]] = LRU(64)
_failed: LRU[str] = LRU(256)
_failures: LRU[int] = LRU(256)


def rehearse_sampler(subject: Subject, x: Tensor, sigmas: Tensor) -> SamplerRehearsal:
    """Rehearse a call, and compile the function if it does something new; results and failures are kept. Generators
    are put back.

    Raises:
        ValueError: the function cannot be compiled, or fails on stand-ins; the next call alike fails at once.
    """
    function = Alike(subject.sample_fn)
    given = {name: value for name, value in subject.arguments.items() if name != "extra_args"}
    names = tuple((name, identity_key(value)) for name, value in given.items() if is_plain(value))
    names += tuple((name, described(v)) for name, v in given.items() if is_passive(v) and not is_plain(v))
    names += tuple((name, Same(v)) for name, v in given.items() if is_torchs(v))
    names += tuple((name, type(v)) for name, v in given.items() if is_stateless(v))
    layout = (tuple(x.shape), x.stride(), x.dtype, x.device, sigmas.dtype, sigmas.device, torch.is_grad_enabled())
    levels = tuple(sigmas.detach().cpu().tolist())
    kind = (function, names, subject.takes, subject.tuples, type(subject.model), layout, levels)
    contents: Any = getattr(subject.sample_fn, "contents", tuple)()
    again = None if contents is None else (kind, tuple(subject.extra_args), contents)
    known = None if again is None else _closed.get(again)
    known = known if known is not None and known.holds(subject.model) else None
    if known is not None and known.confirmed:
        return _repeated(known.rehearsal, subject)
    if (reason := _failed.get(kind)) is not None:
        raise ValueError(reason)
    if (_failures.get(function) or 0) >= _MOST_FAILURES:
        raise ValueError(f"it could not be fused in {_MOST_FAILURES} kinds of calls")
    try:
        with put_back(subject.arguments):
            call = _rehearsed_on(subject, x, sigmas, small=True)
            key = (kind, _fingerprint(call))
            if (found := _rehearsed.get(key)) is None:
                found = _compiled(subject, x, sigmas, call)
                _rehearsed.put(key, found)
            _failures.pop(function)
    except Exception as error:  # whatever a function raises, the original may run without it
        reason = (
            str(error) if isinstance(error, ValueError) else f"it fails on stand-ins ({type(error).__name__}: {error})"
        )
        _failed.put(kind, reason)
        _failures.put(function, (_failures.get(function) or 0) + 1)
        raise ValueError(reason) from error
    compiled, uncond_first, trial = found
    rehearsal = SamplerRehearsal(
        compiled, replace(subject, uncond_first=uncond_first), trial, _without_tensors(call, True)
    )
    if again is not None and _repeats(subject, call):
        template = copy.copy(rehearsal.call)
        template.events = [e.replaced(call.tape.template) if isinstance(e, ModelCall) else e for e in call.events]
        light = replace(subject, sample_fn=dict, arguments={}, model=None)
        closed = _Closed.of(subject, call.names_read, replace(rehearsal, subject=light, call=template))
        if closed is not None and not call.tape.reads:
            # What a run changes of objects shows when another run of it has ended.
            confirmed = not closed.has_objects or (known is not None and known.holds(subject.model))
            _closed.put(again, replace(closed, confirmed=confirmed))
    call.tape.close()
    return rehearsal


def _repeats(subject: Subject, call: Trial) -> bool:
    """Whether a function may do the same in a call alike: it was given nothing, and reads nothing, that a key lacks."""
    draws_own = all(draw.generator is None for draw in call.draws)
    hooked = any(event.passed.hook is not None for event in call.calls)
    return subject.is_described and not call.reads and not call.tape.reads and draws_own and not hooked


def _repeated(known: SamplerRehearsal, subject: Subject) -> SamplerRehearsal:
    """A rehearsal of an earlier call alike, with this call's tensors."""
    call = known.call
    if any(event.further or event.passed.changed for event in call.calls):
        made = call.tape.played(list(subject.own_tensors))

        def fill(value: Any) -> Any:
            return filled(value, made)

        call = copy.copy(call)
        call.events = [e.replaced(fill) if isinstance(e, ModelCall) else e for e in call.events]
    subject = replace(subject, uncond_first=False, tuples=known.subject.tuples)
    return replace(known, subject=subject, call=call)


def _compiled(subject: Subject, x: Tensor, sigmas: Tensor, call: Trial) -> tuple[Compiled, bool, Trial]:
    levels = sigmas.detach().cpu()
    levels = levels.double() if levels.is_floating_point() else levels
    compiled, subject = trace_subject(subject, levels, x.ndim, call)
    trial = _rehearsed_on(subject, x, sigmas, small=False)
    what = f"sample_fn: got {getattr(subject.sample_fn, '__name__', type(subject.sample_fn).__name__)}"
    events = list(map(type, trial.events))
    if list(map(len, trial.drawn)) != list(map(len, call.drawn)) or events != list(map(type, call.events)):
        raise FormError(f"{what} whose model calls or draws depend on shape or dtype, expected the same")
    check_alike(what, call, trial)
    if call.sums != trial.sums:
        raise FormError(f"{what} whose callback is told of other tensors in other shapes, expected the same")
    dtypes = [call.dtype for call in trial.calls] + [trial.result.dtype]
    rounding = max(_ROUNDING.get(dtype, _HALF_ROUNDING) for dtype in dtypes)

    def on_host(values: list[Tensor]) -> list[Tensor]:
        return [value.double().cpu() for value in values]

    states = on_host([*trial.inputs, trial.result - compiled.offset])
    drawn = [on_host(values) for values in regrouped(trial.drawn, compiled)]
    outputs = mixed([on_host(branches) for branches in trial.outputs], compiled.blend)
    recording = Recording(outputs, [], states, drawn)
    verify(compiled.table, compiled.draws, recording, compiled.clip, rounding, what)
    check_others(compiled, recording, trial, call.sums, 50 * rounding, what)
    start = compiled.start * _stand_in(x, small=False).double().cpu()
    for weight, value in zip(compiled.start_draws, drawn[0], strict=True):
        start = start + weight * value
    if not float((start - states[0]).abs().max()) <= 50 * rounding * max(1.0, float(states[0].abs().max())):
        raise FormError(f"{what} whose start depends on the shape or dtype, expected the same")
    # The model is given the original's own times, rounded as it rounds them.
    times = [float(call.time.flatten()[0]) if isinstance(call.time, Tensor) else call.time or 0 for call in trial.calls]
    rows = compiled.table.rows.copy()
    rows[:, 1] = times
    table = replace(compiled.table, rows=rows)
    return replace(compiled, table=table), subject.uncond_first, _without_tensors(trial)


def _without_tensors(trial: Trial, but_the_models: bool = False) -> Trial:
    """What is kept of a trial: of the call nothing, or what its model is given; of results their dtypes and strides."""
    result, light = trial.result, Trial(Subject(_without_tensors, {}), trial.output, trial.noise)
    light.output = light.noise = None  # type: ignore[assignment]
    for name in ("tree", "in_place", "changes_x", "scales_x", "uses_gradients", "talk", "left", "tape"):
        setattr(light, name, getattr(trial, name))
    for event in trial.events:
        if isinstance(event, ModelCall) and not but_the_models:
            event = event.without_tensors()
        elif isinstance(event, ModelCall) and event.passed.hook is not None:
            # A function's own hook holds its variables: only that there is one is kept.
            event = replace(event, passed=replace(event.passed, hook=dict))
        light.events.append(event)
    light.result = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
    others = [torch.empty(0, dtype=tensor.dtype, device="meta") for tensor in trial.outcome.others]
    light.outcome = replace(trial.outcome, main=light.result, others=others)
    light.sums = trial.sums
    return light


def _stand_in(x: Tensor, small: bool) -> Tensor:
    shape = (*x.shape[:2], *(min(size, _SMALL) for size in x.shape[2:])) if small else tuple(x.shape)
    values = torch.from_numpy(np.random.default_rng(1).standard_normal(shape))
    if small:
        return values.to(device=x.device, dtype=x.dtype)
    return torch.empty_like(x, requires_grad=False).copy_(values)


def _rehearsed_on(subject: Subject, x: Tensor, sigmas: Tensor, small: bool) -> Trial:
    rng = np.random.default_rng(2)
    stand_in, levels = _stand_in(x, small), sigmas.detach().clone()

    def output(_: int) -> Tensor:
        return torch.empty_like(stand_in).copy_(torch.from_numpy(rng.standard_normal(tuple(stand_in.shape))))

    def noise(_: int, like: Tensor) -> Tensor:
        return torch.empty_like(like).copy_(torch.from_numpy(rng.standard_normal(tuple(like.shape))))

    trial = Trial(subject, output, noise, follow=small)
    kept = stand_in.clone()
    trial.run(stand_in, levels)
    if not torch.equal(levels, sigmas):
        raise FormError("sample_fn: got one that changes its sigmas in place, expected one that leaves them alone")
    trial.changes_x = not torch.equal(kept, stand_in)
    if trial.changes_x and trial.returned is not stand_in:
        trial.changes_x, trial.scales_x = False, float(stand_in.flatten()[0] / kept.flatten()[0])
        if torch.allclose(stand_in, trial.scales_x * kept, rtol=1e-5 if x.itemsize > 2 else 1e-2):
            del trial.returned
            return trial
        raise FormError("sample_fn: got one that changes x in place, expected one that leaves it alone, or returns it")
    del trial.returned
    return trial


def _fingerprint(trial: Trial) -> bytes | tuple[Any, ...]:
    """Equal for trials in which a function did the same."""

    def key(value: Any) -> Any:
        if isinstance(value, Tensor):
            contents = value.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1)
            return tuple(value.shape), value.dtype, contents.view(torch.uint8).numpy().tobytes()
        if isinstance(value, tuple | list):
            return tuple(map(key, value))
        return repr(value)

    found: list[Any] = [
        key(trial.inputs),
        key(trial.result),
        repr(trial.outcome.template),
        key(list(trial.outcome.others)),
        repr(trial.talk),
        key(trial.callbacks),
        trial.in_place,
        trial.uses_gradients,
        trial.scales_x,
    ]
    found += [trial.changes_x, trial.tree is not None]
    for event in trial.events:
        if isinstance(event, ModelCall):
            grads = event.requires_grad, event.grad_enabled
            found.append(
                (
                    key(event.time),
                    described(event.further),
                    event.passed.summary(),
                    event.passed.hook is None,
                    grads,
                    event.form,
                )
            )
        elif isinstance(event, Draw):
            own = event.generator is None
            found.append((key(event.arguments), event.shape, event.stride, event.dtype, event.device, own, event.asked))
        else:
            found.append(tuple((name, kind, key(value)) for name, (kind, value) in event.info.items()))
    return tuple(found)


@contextmanager
def put_back(arguments: Any) -> Iterator[None]:
    """Context after which generators are as before: torch's, numpy's, Python's and those among the arguments; raises
    `FormError` if one had moved."""
    generators = [value for value in arguments.values() if isinstance(value, torch.Generator)]

    def states() -> list[Any]:
        cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
        theirs = [torch.get_rng_state(), *cuda, *(generator.get_state() for generator in generators)]
        return [*theirs, np.random.get_state(), random.getstate()]  # noqa: NPY002

    before = states()
    try:
        yield
    finally:
        after = states()
        moved = not all(map(_equal_states, before, after))
        if moved:
            torch.set_rng_state(before[0])
            if torch.cuda.is_initialized():
                torch.cuda.set_rng_state(before[1])
            for generator, state in zip(generators, before[len(before) - 2 - len(generators) : -2], strict=True):
                generator.set_state(state)
            np.random.set_state(before[-2])  # noqa: NPY002
            random.setstate(before[-1])
    if moved:
        raise FormError("sample_fn: got one that seeds or draws from a generator unseen, expected draws by torch")


def _equal_states(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
