"""The steps of a fused scheduler: traced once for what they read, then run as sums."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import cache, partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ...compiler.step import TracedStep, UntraceableError, trace_step
from ...utils.identity import NoValueError, value_key, view_index
from ...utils.lru import LRU
from .contents import Contents
from .fall_through import FallThroughError
from .guards import Guard, guard_of
from .ready import ReadyStep, StepForms

_MOST_GUARDS = 8  # made after one step: runs that differ every time have none
# The attributes that a step read, in order, and what it read of the config: the names of items, or None for all.
Read = tuple[tuple[str, ...], frozenset[str] | None]
UNKNOWN = object()  # the result of a step that is another than before
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
        self.scaling: Any = None  # a `FusedScaling`
        self.last: ReadyStep | None = None  # of the last step; None if the original made it

    def look(self, scheduler: Any) -> None:
        """Read a new run's levels now, rather than in its first step."""
        self.last = None
        for name, value in vars(scheduler).items():
            if type(value) is Tensor and value.ndim == 1 and (name == "timesteps" or value.device.type != "cpu"):
                self._contents.look(value)
            elif (type(value) is Tensor and value.ndim == 1) or type(value) in (list, tuple):
                self._contents.of(value)

    def find_index(self, scheduler: Any, timestep: Any) -> None:
        """Set a scheduler's index where a run begins, which some `scale_model_input`s look for on the device, waiting
        for it. The original looks for it in a copy on the host."""
        state = vars(scheduler)
        if state.get("_step_index", 0) is not None or state.get("_begin_index") is not None:
            return
        timesteps = state.get("timesteps")
        if not isinstance(timesteps, Tensor) or timesteps.ndim != 1:
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

    def follow(self, scheduler: Any, output: Any, timestep: Any, sample: Any, options: Mapping[str, Any]) -> Any:
        """A step that is the one which came after the last one before; `UNKNOWN` if this is not known. Raises as
        `step`."""
        kind: Any = type(scheduler)
        last, state = self.last, vars(scheduler)
        following = _known_steps(kind, self._base.step).first if last is None else last.following
        if following is None or following.guarded is None:
            return UNKNOWN
        guard, ready = following.guarded
        if not guard(state, self._contents, output, timestep, sample, options):
            return UNKNOWN
        self.last = None
        result = ready.run(ready, state, output, timestep, sample, options)
        self.last = ready
        return result

    def step(self, scheduler: Any, output: Any, timestep: Any, sample: Any, options: Mapping[str, Any]) -> Any:
        """A step that is not the one which came before, with further arguments by name. Raises `FallThroughError`,
        before any change, if the original must run."""
        last, self.last = self.last, None
        kind: Any = type(scheduler)
        state, known = vars(scheduler), _known_steps(kind, self._base.step)
        for tensor in (sample, output):
            if type(tensor) is not Tensor or tensor.layout is not torch.strided:
                raise FallThroughError(f"sample or model output is a {type(tensor).__name__}")
        if torch.is_grad_enabled() and (output.requires_grad or sample.requires_grad):
            raise FallThroughError("its step must let gradients through")
        at = self._single(state, timestep) if isinstance(timestep, Tensor) else (type(timestep), timestep)
        tensors: tuple[Any, ...] = (output.dtype, output.shape, output.stride(), output.device)
        tensors += (sample.dtype, sample.shape, sample.stride(), sample.device)
        fixed = (tensors, at, *((name, self._option(state, name, value)) for name, value in options.items()))
        ready, reads = known.find(fixed, self._contents, state)
        if ready is None:
            traced, ready = self._trace(known.forms, scheduler, output, timestep, sample, options)
            known.put(traced, fixed, self._contents, state, ready)
        elif isinstance(ready, ReadyStep):
            arguments = ready.form.others, reads, state, self._contents, output, timestep, sample, options
            _Following.after(last, known).note(ready, partial(guard_of, *arguments))
        if isinstance(ready, str):
            raise FallThroughError(ready)
        result = ready.run(ready, state, output, timestep, sample, options)
        self.last = ready
        return result

    def _trace(
        self,
        forms: StepForms,
        scheduler: Any,
        output: Tensor,
        timestep: Any,
        sample: Tensor,
        options: Mapping[str, Any],
    ) -> tuple[Read, ReadyStep | str]:
        """What a step reads, and what it was traced to, or why it was not."""
        on_host = partial(self._on_host, vars(scheduler))
        try:
            _check_tensors(output, sample)
            given = {name: on_host(value) for name, value in options.items()}
            traced = trace_step(scheduler, self._base.step, output, on_host(timestep), sample, given)
        except UntraceableError as error:
            return (tuple(sorted(error.reads)), error.config), str(error)
        ready = self._ready(forms, traced, scheduler, output, timestep, sample)
        return (tuple(sorted(traced.reads)), traced.config), ready

    def _ready(
        self, forms: StepForms, traced: TracedStep, scheduler: Any, output: Tensor, timestep: Any, sample: Tensor
    ) -> ReadyStep | str:
        """A traced step made ready to run, or why it cannot be."""
        return forms.ready(traced, type(scheduler), output, sample)

    def _single(self, state: Mapping[str, Any], tensor: Tensor) -> Any:
        """The key of a tensor of one number, which is not read from a device if it is one of the timesteps."""
        if tensor.numel() != 1:
            raise FallThroughError("its timesteps differ by sample")
        return Tensor, tensor.dtype, tensor.ndim, self._number(state, tensor)

    def _number(self, state: Mapping[str, Any], tensor: Tensor) -> Any:
        timesteps: Any = state.get("timesteps")
        known = self._contents.element(timesteps, tensor) if type(timesteps) is Tensor and timesteps.ndim == 1 else None
        return tensor.item() if known is None else known

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


class _Following:
    """What came after a step: the last one that was found by its key, and a guard of it from the second time on."""

    __slots__ = ("guarded", "made", "ready")

    def __init__(self) -> None:
        self.ready: Any = None
        self.guarded: tuple[Guard, ReadyStep] | None = None  # in one: threads share them
        self.made = 0

    @staticmethod
    def after(last: ReadyStep | None, known: _KnownSteps) -> _Following:
        """That of a step, or of the beginning of a run."""
        holder = known if last is None else last
        name = "first" if last is None else "following"
        if getattr(holder, name) is None:
            setattr(holder, name, _Following())
        found: _Following = getattr(holder, name)
        return found

    def note(self, ready: ReadyStep, make: Callable[[], Guard | None]) -> None:
        """Note the step that came after it."""
        if ready is not self.ready:
            self.ready, self.guarded = ready, None
        elif self.made < _MOST_GUARDS:
            guard, self.made = make(), self.made + 1
            self.guarded = None if guard is None else (guard, ready)


class _KnownSteps:
    """What is known about a class's steps: what they were traced to, or why they were not, by the attributes that they
    read and by what these contained. Most of them read the same few sets of attributes; the last to fit is tried first.
    """

    def __init__(self) -> None:
        self.forms = StepForms()
        self.first: _Following | None = None
        self._tensors: LRU[Hashable] = LRU(64)
        # The oldest first; an LRU would cost two more hashes a step.
        self._by_reads: dict[Read, dict[Hashable, ReadyStep | str]] = {}
        self._order: tuple[Read, ...] = ()
        self._lock = Lock()

    def find(self, call: Hashable, contents: Contents, state: Mapping[str, Any]) -> tuple[ReadyStep | str | None, Read]:
        """What is known about a step, and what it reads."""
        order = self._order
        for reads in order:
            found = self._by_reads[reads].get((call, contents.key(state, reads)))
            if found is not None and (isinstance(found, str) or found.is_current()):
                if reads is not order[0]:
                    self._order = (reads, *(other for other in order if other is not reads))
                return found, reads
        return None, ((), None)

    def put(
        self,
        read: Read,
        call: tuple[Hashable, ...],
        contents: Contents,
        state: Mapping[str, Any],
        found: ReadyStep | str,
    ) -> None:
        """Keep what was found about a step that reads some attributes."""
        tensors, *rest = call
        call = (self._tensors.get_or_make(tensors, lambda: tensors), *rest)  # steps of a run share it
        with self._lock:
            steps = self._by_reads.setdefault(read, {})
            steps[call, contents.key(state, read)] = found
            if len(steps) > _STEPS:
                del steps[next(iter(steps))]
            if read not in self._order:
                self._order = (read, *self._order)


@cache
def _known_steps(kind: Any, original: Callable[..., Any]) -> _KnownSteps:
    return _KnownSteps()


def _check_tensors(output: Tensor, sample: Tensor) -> None:
    for tensor in (sample, output):
        if not tensor.is_floating_point() or not tensor.numel():
            raise UntraceableError("sample and model output are not floating tensors with elements")
    if output.device != sample.device or sample.device.type == "meta":
        raise UntraceableError("sample and model output are on different devices, or on none")
