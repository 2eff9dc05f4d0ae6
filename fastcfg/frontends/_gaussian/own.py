"""A diffusion object of another project with its own loops, whose steps the engine makes where it makes the same.

The object's class is subclassed, and only its loops are replaced: by their own code, run with other steps. What a loop
does before, between and after its steps is so what it always did. A step is the engine's once the object's own, made
with the caller's functions, was compared with it (`proof`); where it is not, the object makes it, and one logged line
says why. A loop that was seen to do nothing but its steps is left at its first one, from which the engine goes on as a
whole.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ...engine.model_output import output_tensor
from ...utils.lru import LRU
from .._fused.fall_through import log_once
from .._fused.keys import Key
from .._fused.subclass import ORIGINAL, STATE, as_subclass, is_fused, subclass
from .keys import arguments_key, object_key
from .loops import ENGINE, LoopRunner
from .manner import Manner
from .own_call import Known, OwnCall
from .own_run import Fit
from .own_table import compiled_steps
from .process import Process
from .proof import DifferentError, FirstStep, check_first
from .proof_times import check_times
from .recognition import LOOPS, STEPS, UnreadError, is_diffusion, named_types, own_steps, step_signature, twin_of
from .side_effects import writes
from .twin_steps import differing, proved
from .view import apart

__all__ = ["accelerated", "is_diffusion"]

# The engine's arguments that the object's own loop cannot be given.
_DIRECT = ("noise_source", "skip_timesteps", "init_image")
_DERIVED = "its class is derived from an accelerated one: accelerate an object of it"


def accelerated(diffusion: Any) -> Any:
    """The object of the subclass of its class that `accelerate` returns."""
    kind: Any = type(diffusion)
    return as_subclass(diffusion, _fused(kind))


@functools.cache
def _fused(original: type) -> type:
    methods = {name: _loop(original, name) for name in LOOPS if callable(getattr(original, name, None))}
    # Loops that the object lacks are guided-diffusion's, if its steps are.
    missing = {name: _added(name) for name in LOOPS if not hasattr(original, name)}
    return subclass(original, {**methods, **missing}, _fused)


def _loop(original: Any, name: str) -> Any:
    base = getattr(original, name)
    signature = inspect.signature(base)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    known = () if takes_any else tuple(argument for argument in ENGINE if argument not in signature.parameters)

    @functools.wraps(base)
    def loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = {argument: kwargs.pop(argument) for argument in known if argument in kwargs}
        return _state_of(self).run(self, name, base, args, kwargs, engine)

    parameters = list(signature.parameters.values())
    if known:
        parameters.append(inspect.Parameter("engine", inspect.Parameter.VAR_KEYWORD, annotation="Any"))
    loop.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return loop


def _added(name: str) -> Any:
    like = getattr(Process, name)

    @functools.wraps(like)
    def loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _state_of(self).run_added(self, name, args, kwargs)

    return loop


def _state_of(diffusion: Any) -> OwnLoops:
    state: OwnLoops | None = getattr(diffusion, STATE, None)
    if state is None:
        state = OwnLoops(getattr(type(diffusion), ORIGINAL))
        setattr(diffusion, STATE, state)
    return state


class OwnLoops:
    """Runs the loops of one object. What is kept are the engine's samplers and what was found out about its steps."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.runner = LoopRunner()
        self.last: dict[str, Any] = {}  # how the last call ran
        self._twins: LRU[tuple[Process | None, str]] = LRU(4)
        self._compiled: LRU[Fit | str] = LRU(32)
        self._key: Key | None = None
        self._known: LRU[Any] = LRU(64)

    def report(self) -> dict[str, Any]:
        """How the last call of a loop ran: `fastcfg.report`."""
        return dict(self.last)

    def run(
        self, diffusion: Any, name: str, base: Any, args: Any, kwargs: dict[str, Any], engine: dict[str, Any]
    ) -> Any:
        """Run a loop: its result, or a generator of its steps."""
        if not is_fused(type(diffusion)):
            self.last = {"run": "the original", "reason": _DERIVED}
            log_once(f"{type(diffusion).__name__}.{name}", _DERIVED)
            return base(diffusion, *args, **kwargs)
        try:
            bound = inspect.signature(base).bind(diffusion, *args, **kwargs)
        except TypeError:
            return base(diffusion, *args, **kwargs)  # which says what is wrong
        bound.apply_defaults()
        given = dict(list(bound.arguments.items())[1:])
        if options := [option for option in _DIRECT if option in engine]:
            reason = self._problem(diffusion, name, given | engine)
            if reason:
                got = f"{', '.join(options)} for a {type(diffusion).__name__}"
                raise TypeError(f"{name}: got {got}, expected none for an object of other steps ({reason})")
            return self._by_twin(diffusion, name, given | engine)
        return OwnCall(self, diffusion, name, base, bound, engine).run()

    def run_added(self, diffusion: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a loop that the class lacks."""
        bound = inspect.signature(getattr(Process, name)).bind(diffusion, *args, **kwargs)
        bound.apply_defaults()
        given = dict(list(bound.arguments.items())[1:])
        given |= given.pop("engine", {})
        if reason := self._problem(diffusion, name, given):
            got = f"a {type(diffusion).__name__} without it"
            raise TypeError(f"{name}: got {got}, expected an object whose steps are guided-diffusion's ({reason})")
        return self._by_twin(diffusion, name, given)

    def run_in_place(self, diffusion: Any, name: str, given: Mapping[str, Any], error: Exception) -> Any:
        """Run guided-diffusion's loop in place of an object's own, whose step fails for what it is given: outputs that
        are no tensors, or types that are spelled in another way than its code expects. Raises its error where the two
        are not the same but for that."""
        parameters = inspect.signature(getattr(self.original, name)).parameters
        unknown = {argument for argument in given if argument not in _parameters(name)}
        changed = unknown - {name for name, one in parameters.items() if name in given and given[name] is one.default}
        given = {argument: value for argument, value in given.items() if argument not in unknown}
        reason = self._problem(diffusion, name, given)
        if changed or reason:
            raise error
        said = f"its own fails ({type(error).__name__}: {error})"
        log_once(f"{type(diffusion).__name__}.{LOOPS[name]}", said, "is guided-diffusion's")
        return self._by_twin(diffusion, name, given)

    def judge(self, diffusion: Any, name: str, own: Callable[..., Any], first: FirstStep) -> Fit | str:
        """How the engine makes an object's steps, or why it cannot."""
        found: Fit | str = first.problem
        if not found and (writing := writes(self.original, name)):
            found = f"its step may write somewhere ({writing})"
        if not found:
            twin, reason = self._twin(diffusion)
            found = reason if twin is None else proved(twin, name, self._step(diffusion, name), first)
            if isinstance(found, str):
                reason, key = found, arguments_key({**first.call.others, "model": name})
                key = object_key(diffusion), key
                found = self._compiled.get_or_make(key, lambda: self._compiled_or_why(diffusion, name, first))
                found = f"{reason}; {found}" if isinstance(found, str) else found
        if isinstance(found, Fit) and found.kind.variance.startswith("learned"):
            dtype = output_tensor(first.recorders["model"].calls[0].returned).dtype
            if dtype not in (torch.float32, torch.float64):
                found = f"its step computes variances in {dtype}"
        if isinstance(found, Fit):
            found = replace(found, kind=replace(found.kind, orders=first.orders))
        return found.replace("its step", f"its {name}") if isinstance(found, str) else found

    def known(self, diffusion: Any) -> Known:
        """What was found out about the loops and steps of an object as it is."""
        now = object_key(diffusion)
        if self._key is None or self._key.value != now:
            self._key = Key(now)  # which is the same object, with its hash, as long as nothing changes
        return Known(self._known, self._key)

    def _twin(self, diffusion: Any) -> tuple[Process | None, str]:
        """The process that an object describes, or why it describes none."""

        def made() -> tuple[Process | None, str]:
            try:
                return twin_of(diffusion), ""
            except UnreadError as error:
                return None, str(error)

        return self._twins.get_or_make(object_key(diffusion), made)

    def _step(self, diffusion: Any, name: str) -> Callable[..., Any]:
        """A step of a copy of an object."""
        return partial(getattr(self.original, name), apart(diffusion, self.original))

    def _compiled_or_why(self, diffusion: Any, name: str, first: FirstStep) -> Fit | str:
        """How the engine makes steps that are no process's, or why it cannot."""
        reason = ""
        for manner in first.manners:
            found = self._compile(diffusion, name, first, manner)
            if isinstance(found, Fit):
                return found
            reason = found
        return reason

    def _compile(self, diffusion: Any, name: str, first: FirstStep, manner: Manner) -> Fit | str:
        own, model, steps = self._step(diffusion, name), first.recorders["model"], diffusion.num_timesteps
        try:
            if len(model.calls) != 1:
                raise DifferentError(f"it calls the model {len(model.calls)} times")
            try:
                fit, other = compiled_steps(own, first, steps, STEPS[name] == "ddim_reverse", manner)
            finally:
                first.after.put_back()  # what is not patched draws
            check_first(first, other)
            check_times(own, first.call, model.calls[0].returned, other, steps)
        except DifferentError as error:
            return str(error)
        except Exception as error:  # of its step, for samples of another shape or dtype
            return f"its step cannot be compiled ({type(error).__name__}: {error})"
        return fit

    def _problem(self, diffusion: Any, name: str, given: Mapping[str, Any]) -> str:
        """Why a process's loop, with these arguments, is not an object's; empty if it is."""
        twin, reason = self._twin(diffusion)
        if twin is None or not is_fused(type(diffusion)):
            return reason or _DERIVED
        if others := sorted(set(given) - _parameters(name) - set(ENGINE)):
            return f"its {name} takes {', '.join(others)}"
        if "model" not in given or not given.keys() & {"shape", "x"}:
            return f"its {name} takes no model and shape by name"
        step = LOOPS[name] if LOOPS[name] in own_steps(self.original) else "p_sample"
        own, signature = self._step(named_types(diffusion), step), step_signature(self.original, step)
        return differing(twin, step, signature, own, given).replace("its step", f"its {step}")

    def _by_twin(self, diffusion: Any, name: str, given: Mapping[str, Any]) -> Any:
        self.last = {"run": "engine", "reason": ""}
        return getattr(self._twin(diffusion)[0], name)(**given)


def _parameters(name: str) -> set[str]:
    return set(inspect.signature(getattr(Process, name)).parameters)
