"""Sampling functions of k-diffusion's form, run by their compiled tables."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ...compiler.patching import BROWNIAN_TREE, Talk
from ...compiler.provenance import Provenance
from ...compiler.sampler_rehearsal import SamplerRehearsal, put_back, rehearse_sampler
from ...compiler.stand_ins import DrawMode, StandInModel, is_passive, is_stateless, is_torchs, tensors_in
from ...compiler.subject import CallbackCall, Draw, Subject
from ...engine.noise import NoiseSource
from ...engine.sampler import Sampler
from ...ops.stepper import Stepper
from ...utils.identity import Alike
from ...utils.lru import LRU
from ..classifier_free import split_by_branch
from .arguments import main_arguments
from .fall_through import FallThroughError, falling_through, log_once
from .stepped import SteppedRun
from .subclass import ORIGINAL

# Arguments that are no options of the function's own.
_KNOWN = ("extra_args", "callback", "disable", "noise_sampler", "randn_like")
# Of a model that a stepped run found fit for the engine.
_FIT = "fit"


def fused(sample_fn: Callable[..., Tensor], backend: str, graph: str | bool) -> Callable[..., Tensor]:
    """As `fastcfg.frontends.k_diffusion.fuse`."""
    if not callable(sample_fn):
        raise TypeError(f"sample_fn: got {type(sample_fn).__name__}, expected a function")
    runner = Runner(sample_fn, backend, graph)

    @wraps(sample_fn)
    def sample(*args: Any, **kwargs: Any) -> Tensor:
        try:
            call = runner.prepared(args, kwargs)
        except FallThroughError as error:
            runner.note("the original", str(error))
            log_once(runner.name, str(error))
            return sample_fn(*args, **kwargs)
        return runner.run(call)

    setattr(sample, ORIGINAL, sample_fn)
    sample.report = runner.report  # type: ignore[attr-defined]
    return sample


class Runner:
    """A fused function: its samplers, steppers, and what it knows of its models."""

    def __init__(self, sample_fn: Callable[..., Tensor], backend: str, graph: str | bool) -> None:
        self.sample_fn, self._backend, self._graph = sample_fn, backend, graph
        self.name = getattr(sample_fn, "__name__", type(sample_fn).__name__)
        self._signature = inspect.signature(sample_fn)
        self._samplers: LRU[Sampler] = LRU(4)
        self._steppers: LRU[Stepper] = LRU(4)  # those that no run uses
        # By model and table: why the original must run, and whether the engine may or why not.
        self._unfit: LRU[str] = LRU(32)
        self._captured: LRU[str] = LRU(32)
        self._report: dict[str, Any] = {}

    def report(self) -> dict[str, Any]:
        """How the last call ran: "run" ("engine", "stepped", "the original", or "stepped, then the original"), "reason"
        (why no further), and with the engine its sampler's report."""
        return dict(self._report)

    def note(self, run: str, reason: str = "", **more: Any) -> None:
        self._report = {"run": run, "reason": reason, **more}

    def prepared(self, args: Any, kwargs: Any, more: dict[str, Any] | None = None) -> _Call:
        """A call, rehearsed; `FallThroughError` if the original must make it. `more` are arguments that the function
        has beside those of its signature."""
        with falling_through(TypeError):
            bound = self._signature.bind(*args, **kwargs)
        call = _Call(self.sample_fn, self._signature, bound.arguments | (more or {}))
        if (reason := self._unfit.get(self._key(call))) is not None:
            raise FallThroughError(reason)
        return call

    def run(self, call: _Call) -> Any:
        """What the function returns."""
        for line in call.rehearsal.call.talk.lines:
            print(*line)
        call.draw_x()
        reason = call.not_captured or self._captured.get(self._key(call)) or "its first call looks at the model"
        result: Any
        if reason == _FIT:
            sampler = self._sampler_for(call)
            result = call.run_on(sampler)
            self.note("engine", **sampler.report())
        else:
            result = self._stepped(call, reason)
        with torch.no_grad():
            if call.rehearsal.trial.changes_x:
                return call.x.copy_(result)
            if (scale := call.rehearsal.trial.scales_x) != 1.0 and self._report["run"] in ("engine", "stepped"):
                call.x.mul_(scale)
        return result

    def _key(self, call: _Call) -> Any:
        return Alike(call.model), call.rehearsal.compiled.table, call.x.device, tuple(sorted(call.extra_args))

    def _sampler_for(self, call: _Call) -> Sampler:
        model, table, device, dtype = call.model, call.rehearsal.compiled.table, call.x.device, call.model_dtype
        options = {"backend": self._backend, "graph": self._graph, "device": device, "dtype": dtype}
        clip = call.rehearsal.compiled.clip
        key = (Alike(model), table, dtype, device, clip)
        state = call.state_dtype
        return self._samplers.get_or_make(key, lambda: Sampler(model, table, state_dtype=state, clip=clip, **options))

    @contextmanager
    def _borrowed(self, call: _Call) -> Any:
        table, shape = call.rehearsal.compiled.table, tuple(call.x.shape)
        clip = call.rehearsal.compiled.clip
        key = (table, shape, call.state_dtype, call.x.device, clip)
        stepper = self._steppers.pop(key)
        if stepper is None:
            like = torch.empty(shape, dtype=call.state_dtype, device=call.x.device)
            stepper = Stepper(table, like, clip=clip, backend=self._backend, keep_x0=False)
        yield stepper
        self._steppers.put(key, stepper)

    def _stepped(self, call: _Call, reason: str) -> Any:
        """What the function returns, row by row."""
        observers = call.callback, call.noise_sampler
        self.note("stepped", reason)
        with self._borrowed(call) as stepper:
            run = SteppedRun(
                call.rehearsal, stepper, call.state_dtype, call.model, call.x, call.sigmas, *observers, call.progress
            )
            result = run.run()
        if run.taken_over:
            log_once(self.name, f"{run.taken_over}; the original takes over")
            self.note("stepped, then the original", run.taken_over)
            if run.by_model:
                self._unfit.put(self._key(call), run.taken_over)
            return result
        if not call.not_captured:
            moves = "the model draws random numbers itself"
            self._captured.put(self._key(call), moves if run.draws_itself else _FIT)
        return result


class _Call:
    """A call of a sampling function, rehearsed. Raises `FallThroughError` if the original must make it."""

    def __init__(
        self,
        sample_fn: Callable[..., Tensor],
        signature: inspect.Signature,
        arguments: dict[str, Any],
    ) -> None:
        given = dict(arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        names = main_arguments(signature, given)
        self.model, self.x, self.sigmas = (given.pop(name, None) for name in names)
        self.extra_args, self.callback = given.get("extra_args") or {}, given.get("callback")
        x, sigmas = self.x, self.sigmas
        self._draws_x = None if names[1] else _first_draw(Subject(sample_fn, given, names, self.model, free=True))
        if self._draws_x is not None:
            like = self._draws_x
            self.x = x = torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device=like.device)
        if not names[2]:
            self.sigmas = sigmas = torch.empty(0)
        if not isinstance(x, Tensor) or x.ndim < 2 or not x.numel() or not x.dtype.is_floating_point:
            raise FallThroughError("x is not a floating tensor [B, C, ...] with elements")
        if not isinstance(sigmas, Tensor) or sigmas.ndim != 1:
            raise FallThroughError("sigmas are not a tensor of levels")
        if not callable(self.model):
            raise FallThroughError("its model is not callable")
        for name, value in given.items():
            draws = isinstance(value, torch.Generator) or is_torchs(value) or is_stateless(value)
            if name not in _KNOWN and not (draws or is_passive(value)):
                raise FallThroughError(f"{name} is a {type(value).__name__}")
        taken = ("callback", "noise_sampler", "randn_like")
        takes = tuple(name for name in taken if given.get(name) is not None and not is_torchs(given[name]))
        if given.get("callback") is not None and any(True for _ in tensors_in(_without(given, "extra_args"))):
            raise FallThroughError("its callback may change the tensors that it is given")
        subject = Subject(sample_fn, given, names, self.model, takes, free=True)
        self.rehearsal: SamplerRehearsal = _rehearsed(subject, x, sigmas)
        trial = self.rehearsal.trial
        self._calls = trial.calls
        if torch.is_grad_enabled() and x.requires_grad and any(call.grad_enabled for call in self._calls):
            raise FallThroughError("gradients are wanted: call it under torch.no_grad()")
        told = [event for event in trial.events if isinstance(event, CallbackCall)]
        if any(kind == "unknown" for event in told for kind, _ in event.info.values()):
            raise FallThroughError("its callbacks are given other tensors than the model's")
        if told and (trial.in_place or trial.changes_x or trial.scales_x != 1.0 or self.rehearsal.compiled.offset):
            raise FallThroughError("it changes in place what it gives its callback")
        self.model_dtype = self._calls[-1].dtype
        wide = torch.float64 in [*(call.dtype for call in self._calls), trial.result.dtype]
        self.state_dtype = torch.float64 if wide else torch.float32
        if "disable" in signature.parameters:
            self.progress = _shown(signature, given)
        else:
            self.progress = _is_shown(self.rehearsal.call.talk.bar)
        # The caller's, the function's own Brownian tree, or None for torch's draws.
        self.noise_sampler = given.get("noise_sampler") or given.get("randn_like")
        if trial.tree is not None:
            args, keywords = self.rehearsal.call.tree  # type: ignore[misc]
            make: Any = getattr(inspect.getmodule(sample_fn), BROWNIAN_TREE)
            self.noise_sampler = make(x, *args, **keywords)

    def draw_x(self) -> None:
        """Draw x, where the function does."""
        if self._draws_x is not None:
            self.x.normal_(generator=self._draws_x.generator)

    @property
    def not_captured(self) -> str:
        """Why the engine cannot run the call; empty if it can."""
        calls, table, trial = self._calls, self.rehearsal.compiled.table, self.rehearsal.trial
        if self.callback is not None:
            return "its callback is given what the model is, as it runs"
        if any(call.passed.hook is not None for call in calls):
            return "its model is given a hook"
        if any(call.form.branches > 1 for call in calls):
            return "it lays its branches side by side"
        if not trial.outcome.alone:
            return "it returns more than its samples"
        if self.rehearsal.subject.tuples:
            return "its model returns a tuple"
        if any(not call.form.timed or call.form.x_name for call in calls):
            return "its model is called by keyword"
        if any(call.further or call.passed.changed or call.passed.left_out for call in calls):
            return "its model is given further arguments"
        if any(call.grad_enabled or call.requires_grad for call in calls):
            return "gradients are on: call it under torch.no_grad()"
        if len({call.dtype for call in calls}) > 1:
            return "its model's inputs change their dtype"
        time = torch.int64 if table.integer_time else torch.float32
        for call in calls:
            if not isinstance(call.time, Tensor) or (call.time.dtype, call.time.shape) != (time, (len(self.x),)):
                return f"its model's times are not {time} [{len(self.x)}]"
        if not self.x.is_contiguous():
            return "x is not contiguous"
        return ""

    def run_on(self, sampler: Sampler) -> Tensor:
        """The samples, by the engine."""
        compiled, start = self.rehearsal.compiled, self.x.to(sampler.state_dtype)
        self._draws = iter(self.rehearsal.call.draws)
        self._like = iter(self.rehearsal.trial.draws)
        if compiled.start != 1.0:
            start = start * compiled.start
        if (noise := compiled.start_noise(self._draw)) is not None:
            start = torch.add(start, noise)
        result = sampler.sample(
            tuple(start.shape),
            branches=split_by_branch(self.extra_args, len(start), halves=False),
            noise=NoiseSource(torch.empty_like, self._fill, always=any(compiled.draws)),  # type: ignore[arg-type]
            x_T=start,
            progress=self.progress,
        )
        result = result + compiled.offset if compiled.offset else result
        return result.to(self.rehearsal.trial.result.dtype)

    def _fill(self, row: int, buffer: Tensor | None) -> None:
        noise = self.rehearsal.compiled.noise(self._draw, row)
        if buffer is not None:
            buffer.zero_() if noise is None else buffer.copy_(noise)

    def _draw(self) -> Tensor:
        """The next draw, in the original's order."""
        mine, like = next(self._draws), next(self._like)
        if like.arguments is None:
            empty = torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device=like.device)
            if like.asked:
                return self.noise_sampler(empty.fill_(torch.nan))  # type: ignore[misc]
            return empty.normal_(generator=mine.generator)
        copies = (value.clone() if isinstance(value, Tensor) else value for value in like.arguments)
        result: Tensor = self.noise_sampler(*copies)  # type: ignore[misc]
        return result


def _shown(signature: inspect.Signature, given: dict[str, Any]) -> bool:
    """Whether the original shows a progress bar, as tqdm takes `disable`."""
    default = signature.parameters["disable"].default
    return _is_shown(given.get("disable", None if default is inspect.Parameter.empty else default))


def _is_shown(disable: bool | None) -> bool:
    return sys.stderr.isatty() if disable is None else not disable


def _rehearsed(subject: Subject, x: Tensor, sigmas: Tensor) -> SamplerRehearsal:
    """A rehearsal with a model that returns a tensor, or else a tuple."""
    try:
        return rehearse_sampler(subject, x, sigmas)
    except ValueError as error:
        try:
            return rehearse_sampler(replace(subject, tuples=True), x, sigmas)
        except ValueError:
            raise FallThroughError(str(error)) from error


class _ModelCalledError(Exception):
    """A function has come to its first call of the model."""


def _first_draw(subject: Subject) -> Draw:
    """The draw that is x, of a function that has no argument x: the only one before it calls its model."""
    draws: list[Draw] = []

    def draw(like: Tensor, generator: torch.Generator | None) -> Tensor:
        draws.append(Draw(None, tuple(like.shape), like.stride(), like.dtype, like.device, generator))
        return like.zero_()

    def stop(*_: Any, **__: Any) -> Any:
        raise _ModelCalledError

    try:
        with falling_through(Exception), put_back(subject.arguments), Talk().heard():
            try:
                with DrawMode(draw, provenance=Provenance(subject.tensors, follow=False)):
                    subject.call(StandInModel(stop, subject.model), torch.empty(0), torch.empty(0), {})
            except _ModelCalledError:
                pass
    except FallThroughError as error:
        raise FallThroughError(f"it is given no x ({error})") from error
    if len(draws) != 1:
        raise FallThroughError(f"it is given no x, and draws {len(draws)} tensors before it calls its model")
    return draws[0]


def _without(given: dict[str, Any], name: str) -> dict[str, Any]:
    return {other: value for other, value in given.items() if other != name}
