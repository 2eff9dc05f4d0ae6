"""A sampling function's call run row by row in the original's order, so that its model, callback and noise sampler are
given the original's tensors at the original's moments.

Whatever comes back unlike the rehearsal (an edited tensor, an output of another dtype, a gradient) makes the original
take over: it runs from the start on the outputs and draws that were recorded, which evaluates no model and calls no
callback twice, and from the same place on runs by itself.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...compiler.branches import mixed
from ...compiler.patching import BROWNIAN_TREE, replaced
from ...compiler.sampler_rehearsal import SamplerRehearsal
from ...compiler.stand_ins import DrawMode, StandInModel
from ...compiler.subject import CallbackCall, Draw, ModelCall
from ...compiler.trial import Unread
from ...ops.stepper import Stepper
from ...utils.progress import progress_bar

# Stands for an output that is the model's input.
_INPUT: Any = object()


class SteppedRun:
    """One call.

    Args:
        rehearsal: of the call.
        stepper: of its table.
        dtype: the state's and the stepper's.
        model, x, sigmas, callback, noise_sampler: the caller's; the last two may be None.
        progress: whether to show a bar.

    Attributes:
        taken_over: why the original took over; empty if it did not.
        by_model: whether an unlike output was why, which will happen again.
        draws_itself: whether the model moved torch's generators.
    """

    def __init__(
        self,
        rehearsal: SamplerRehearsal,
        stepper: Stepper,
        dtype: torch.dtype,
        model: Callable[..., Any],
        x: Tensor,
        sigmas: Tensor,
        callback: Callable[[Any], Any] | None,
        noise_sampler: Callable[..., Tensor] | None,
        progress: bool,
    ) -> None:
        self._rehearsal, self._stepper, self._model, self._x, self._sigmas = rehearsal, stepper, model, x, sigmas
        self._callback, self._noise_sampler, self._progress = callback, noise_sampler, progress
        self._dtype = dtype
        self.taken_over, self.by_model, self.draws_itself = "", False, False
        self._records: list[Any] = []  # of every event so far: (output, what its hook was told), a draw, or None
        self._handed: dict[tuple[int, str], _Watched] = {}
        self._others: dict[int, Tensor] = {}  # by their place in `Compiled.others`

    def run(self) -> Any:
        """What the function returns."""
        with torch.inference_mode(False), torch.no_grad():
            # Normal tensors also in inference mode: what is written into them is noticed by their version.
            self._kept = self._x.clone(), self._sigmas.clone()
            self._times = [
                call.time.clone() if isinstance(call.time, Tensor) else call.time
                for call in self._rehearsal.trial.calls
            ]
        self._state: Tensor | None = None  # before the row that is next or runs
        self._output: Tensor | None = None  # of the row that runs
        self._row, self._drawn = -1, list[Tensor]()
        self._inputs: dict[int, Tensor] = {}
        # Outputs that are told or compared later; of the others it is known whether the caller still holds them.
        self._outputs: dict[int, Tensor] = {}
        self._alive: dict[int, weakref.ref[Tensor]] = {}
        self._last_told: dict[int, int] = {}  # by row, the last event that tells its output
        for position, event in enumerate(self._rehearsal.trial.events):
            if isinstance(event, CallbackCall):
                self._last_told |= {row: position for kind, row in event.info.values() if kind == "output"}
        table = self._rehearsal.compiled.table
        with progress_bar(self._progress, total=table.num_steps) as bar:
            try:
                for event, mine in zip(self._rehearsal.trial.events, self._rehearsal.call.events, strict=True):
                    if isinstance(event, ModelCall):
                        self._evaluate(event, mine)
                        bar.update(int(table.steps[self._row]) - bar.n)
                    elif isinstance(event, Draw):
                        self._draw(event, mine)
                    else:
                        self._call_back(event)
                result: Any = self._input(self._row + 1, self._rehearsal.trial.result)
                if offset := self._rehearsal.compiled.offset:
                    with torch.inference_mode(False), torch.no_grad():
                        result = result + offset
                result = self._outcome(result)
                bar.update(table.num_steps - bar.n)
            except _SurpriseError as surprise:
                self.taken_over = surprise.reason
                return _Resumed(self, surprise).run()
        return result

    def _input(self, call: int, like: Any) -> Tensor:
        """The input of a model call, or the result, in a dtype and with strides."""
        if call in self._inputs:
            return self._inputs[call]
        if call == 0:
            self._start()
        elif call == self._row + 1:
            self._advance()
        stride = like.stride() if isinstance(like, Tensor) else like.stride
        state: Tensor = self._state  # type: ignore[assignment]
        with torch.inference_mode(False), torch.no_grad():
            made = state.to(like.dtype)
            if not _same_layout(made, stride):
                made = torch.empty_strided(made.shape, stride, dtype=made.dtype, device=made.device).copy_(made)
        self._inputs = {call: made}
        return made

    def _start(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            compiled, dtype = self._rehearsal.compiled, self._dtype
            start = self._x.to(dtype, memory_format=torch.contiguous_format, copy=True)
            if compiled.start != 1.0:
                start = start * compiled.start
            for weight in compiled.start_draws:
                value = self._drawn.pop(0)
                if weight:
                    start = start + weight * value.to(dtype)
            self._state = start

    def _advance(self) -> None:
        """Run the row whose output and draws are known."""
        with torch.inference_mode(False), torch.no_grad():
            noise = self._rehearsal.compiled.noise(lambda: self._drawn.pop(0), self._row)
            state: Tensor = self._state  # type: ignore[assignment]
            if noise is not None:
                noise = noise.to(torch.promote_types(state.dtype, torch.float32)).expand_as(state).contiguous()
            output = self._output.contiguous()  # type: ignore[union-attr]
            self._state, _ = self._stepper(self._row, output, state, noise)
            self._keep_others(self._row, state)
        self._output, self._inputs = None, {}

    def _evaluate(self, event: ModelCall, mine: Any) -> None:
        """A call of the model."""
        row = self._row + 1
        x = self._input(row, event)
        self._row = row
        if event.requires_grad:
            x = self._inputs[row] = x.detach().requires_grad_()
        watched, told = _Watched(x), list[dict[str, Any]]()

        def hook(args: dict[str, Any]) -> Any:
            told.append(args)
            return args["denoised"]

        arguments = mine.passed.arguments(self._rehearsal.subject.extra_args, hook)
        form, given = event.form, torch.cat([x] * event.form.branches) if event.form.branches > 1 else x
        by_position = () if form.x_name else (given,)
        if form.timed:
            by_position = (*by_position, self._times[row], *mine.further)
        elif form.x_name:
            arguments = {**arguments, form.x_name: given}
        before = None if self._callback is not None else _positions(x.device)
        with torch.set_grad_enabled(event.grad_enabled):
            returned = output = self._model(*by_position, **arguments)
        if self._rehearsal.subject.tuples:
            output = returned[0] if isinstance(returned, tuple | list) and returned else None
        if before is not None and before != _positions(x.device):
            self.draws_itself = True
        reason, hooked = _unlike(output, given, event, self._rehearsal), event.passed.hook is not None
        if watched.changed():
            reason = "its model changes its input"
        elif not reason and self._reused(output, x):
            reason = "its model returns memory that it returned before, which the function may hold or change"
        if hooked and not reason:
            reason = _hook_unlike(told, x)
        if reason:
            edits = {"x": x.detach().clone()} if watched.changed() else {}
            self.by_model = "gradients" not in reason
            raise _SurpriseError(reason, len(self._records), edits, _INPUT if output is x else returned, told)
        with torch.inference_mode(False), torch.no_grad():
            output = output.detach()
            kept = output.clone()
            # Writing into a tensor of inference mode is not noticed, so callbacks are given a copy.
            live = output.clone() if output.is_inference() and self._callback is not None else output
        self._settle(live)
        kept_rows = {row - 1, *(r for r, last in self._last_told.items() if last >= len(self._records))}
        self._outputs = {r: tensor for r, tensor in self._outputs.items() if r in kept_rows} | {row: live}
        self._alive[row] = weakref.ref(live)
        self._output, main = kept, kept
        if hooked:
            other = told[0]["uncond_denoised"].detach().clone()
            told = [{"denoised": kept, "uncond_denoised": other}]
            main, other = (other, kept) if self._rehearsal.subject.uncond_first else (kept, other)
            self._output = main
            self._drawn.append(other)
        if form.branches > 1:
            self._output = mixed([kept.chunk(form.branches)], [self._rehearsal.compiled.blend[row]])[0]
        self._records.append((kept, told))
        self._keep_others(row)

    def _keep_others(self, row: int, before: Tensor | None = None) -> None:
        """Compute what the function tells, beside its samples, of a row's state and output: after the row has run, if
        the state before it is given."""
        for i, (at, a, b, c, constant) in enumerate(self._rehearsal.compiled.others):
            if at == row and bool(c) == (before is not None):
                with torch.inference_mode(False), torch.no_grad():
                    state: Tensor = self._state  # type: ignore[assignment]
                    made = a * (state if before is None else before)
                    if b:
                        made += b * self._output.to(made.dtype)  # type: ignore[union-attr]
                    if before is not None:
                        made += c * state
                    self._others[i] = made + constant if constant else made

    def _outcome(self, result: Tensor) -> Any:
        """What the function returns."""
        outcome = self._rehearsal.trial.outcome
        if outcome.alone:
            return result
        self._keep_others(self._row + 1)
        made = [self._others[i].to(like.dtype) for i, like in enumerate(outcome.others)]
        return outcome.rebuilt(result, made, self._x)

    def _reused(self, output: Any, x: Tensor) -> bool:
        """Whether an output's memory is that of its input or of the output before, and this matters."""
        last = self._outputs.get(self._row - 1)
        shared = output.data_ptr() == x.data_ptr() or (last is not None and output.data_ptr() == last.data_ptr())
        rehearsal = self._rehearsal
        return shared and (rehearsal.trial.in_place or rehearsal.compiled.table.num_history > 0)

    def _settle(self, live: Tensor) -> None:
        """Keep the last output itself and not its copy, unless a callback has it or it was written over."""
        last = self._outputs.get(self._row - 1)
        if last is None or last.data_ptr() == live.data_ptr() or self._callback is not None:
            return
        position = max(i for i, record in enumerate(self._records) if isinstance(record, tuple))
        kept, told = self._records[position]
        if not told and last.dtype == kept.dtype:
            self._records[position] = last, told

    def _draw(self, event: Draw, mine: Any) -> None:
        """A draw of noise."""
        like = torch.empty_strided(event.shape, event.stride, dtype=event.dtype, device=event.device)
        if event.arguments is None and not event.asked:
            value = like.normal_(generator=mine.generator)
        else:
            # The contents of what noise is drawn like should not matter: NaN would show.
            given = (like.fill_(torch.nan),) if event.arguments is None else event.arguments
            copies = (v.clone() if isinstance(v, Tensor) else v for v in given)
            value = self._noise_sampler(*copies)  # type: ignore[misc]
            fits = isinstance(value, Tensor) and value.dtype == event.dtype and value.device == event.device
            if not fits or not _broadcasts(tuple(value.shape), tuple(self._x.shape)):
                raise _SurpriseError("its noise sampler's noise is unlike x", len(self._records), {}, value)
        self._records.append(value)
        self._drawn.append(value)

    def _call_back(self, event: CallbackCall) -> None:
        """A call of the callback."""
        info, position = {}, len(self._records)
        for name, (kind, value) in event.info.items():
            if kind == "input":
                trial = self._rehearsal.trial
                info[name] = self._input(value, trial.calls[value] if value < len(trial.calls) else trial.result)
            elif kind == "output":
                info[name] = self._outputs[value]
            elif kind == "start":
                info[name] = self._x
            elif kind == "sum":
                returned, told = len(self._rehearsal.trial.outcome.others), self._rehearsal.trial.sums
                info[name] = self._others.pop(returned + told.index((position, name))).to(value)
            elif kind == "level":
                info[name] = self._sigmas[value]
            else:
                with torch.inference_mode(False):
                    info[name] = value.clone() if isinstance(value, Tensor) else value
        now = {(position, name): _Watched(value) for name, value in info.items() if isinstance(value, Tensor)}
        levels = _Watched(self._sigmas)
        result = self._callback(dict(info))  # type: ignore[misc]
        # Earlier ones by their version alone.
        edits = {key: watched.copy() for key, watched in self._handed.items() if watched.has_new_version()}
        edits |= {key: watched.copy() for key, watched in now.items() if watched.changed()}
        if edits or levels.changed():
            raise _SurpriseError("its callback changes what it is given", position, edits, result)
        for watched in now.values():
            watched.let_go()
        self._handed |= now
        self._records.append(None)


class _SurpriseError(Exception):
    """What came back at an event is unlike the rehearsal.

    Attributes:
        reason: for the log.
        position: of the event.
        edits: new contents of tensors that were handed out, by event and name, or of the model's input, as "x".
        value: what was returned.
        told: what the function's hook was told by the model.
    """

    def __init__(
        self, reason: str, position: int, edits: dict[Any, Tensor], value: Any, told: list[dict[str, Any]] | None = None
    ) -> None:
        super().__init__(reason)
        self.reason, self.position, self.edits, self.value, self.told = reason, position, edits, value, told or []
        # A model may write over its output.
        self.contents = value.detach().clone() if isinstance(value, Tensor) else None


class _Watched:
    """A tensor, and whether its contents were changed since: by its version, and in the host's memory by a copy too,
    as writing through `.data` and numpy leaves the version alone."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Callable[[], Tensor | None] = lambda: tensor
        self._version = None if tensor.is_inference() else tensor._version
        self._copy = tensor.detach().clone() if tensor.device.type == "cpu" else None

    def has_new_version(self) -> bool:
        tensor = self._tensor()
        return tensor is not None and self._version is not None and tensor._version != self._version

    def changed(self) -> bool:
        tensor = self._tensor()
        return self.has_new_version() or not (tensor is None or self._copy is None or _identical(tensor, self._copy))

    def let_go(self) -> None:
        """Hold the tensor no longer: what no one else holds will not change."""
        tensor, self._copy = self._tensor(), None
        self._tensor = weakref.ref(tensor)

    def copy(self) -> Tensor:
        return self._tensor().detach().clone()  # type: ignore[union-attr]


@dataclass(eq=False)
class _Resumed:
    """The original's run from an event of a stepped run on."""

    stepped: SteppedRun
    surprise: _SurpriseError
    live: bool = False
    lacks_x: bool = False
    position: int = 0
    told: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    generators: dict[int, tuple[torch.Generator, torch.Generator]] = field(default_factory=dict)

    def run(self) -> Any:
        run = self.stepped
        self._edited_levels, self._calls = run._sigmas.clone(), 0
        self.lacks_x = run._rehearsal.subject.draws_x
        _restore(run._x, run._kept[0])
        _restore(run._sigmas, run._kept[1])
        stand_ins = {"callback": self._callback} | dict.fromkeys(("noise_sampler", "randn_like"), self._sample_noise)
        subject = run._rehearsal.subject
        others = {name: stand_ins[name] for name in subject.takes}
        self._mode, self._patches = DrawMode(self._draw), ExitStack()
        module = inspect.getmodule(subject.sample_fn)
        self._patches.enter_context(replaced([(module, BROWNIAN_TREE, lambda *args, **kwargs: self._sample_noise)]))
        self._mode.__enter__()
        self._in_mode = True
        try:
            result = subject.call(StandInModel(self._call, run._model), run._x, run._sigmas, others)
        finally:
            self._leave()
        return result

    def _next(self, kind: type) -> int:
        position, events = self.position, self.stepped._rehearsal.trial.events
        if position >= len(events) or not isinstance(events[position], kind):
            raise RuntimeError("a sampling function ran another way than before: it depends on what is no argument")
        self.position += 1
        return position

    def _leave(self) -> None:
        """End the contexts; not from within a draw, where the mode is in use."""
        if self._in_mode:
            self._in_mode = False
            self._mode.__exit__(None, None, None)
        self._patches.close()

    def _go_live(self) -> None:
        self.live = True
        _restore(self.stepped._sigmas, self._edited_levels)
        for ours, theirs in self.generators.values():
            if ours is not theirs:
                theirs.set_state(ours.get_state())

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self.live:
            self._leave()
            return self.stepped._model(*args, **kwargs)
        position, surprise = self._next(ModelCall), self.surprise
        form = self.stepped._rehearsal.trial.events[position].form  # type: ignore[union-attr]
        x = kwargs[form.x_name] if form.x_name else args[0]
        passed = self.stepped._rehearsal.trial.events[position].passed  # type: ignore[union-attr]
        last = position == surprise.position
        output, told = (surprise.value, surprise.told) if last else self.stepped._records[position]
        if "x" in surprise.edits and last:
            with torch.no_grad():
                x.copy_(surprise.edits["x"])
        if passed.hook is not None:
            for arguments in told:
                _own_hook(kwargs, passed)(arguments)
        if last:
            if output is _INPUT:
                output = x
            elif surprise.contents is not None:
                _restore(output, surprise.contents)
            self._go_live()
            self._leave()
        elif (live := self.stepped._alive[self._calls]()) is not None:
            # The very tensor that the callback was given, as it was when the model returned it.
            _restore(live, output)
            output = live
        self._calls += 1
        return (output, Unread()) if self.stepped._rehearsal.subject.tuples and not last else output

    def _draw(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.lacks_x:
            self.lacks_x = False
            return self.stepped._x
        if self.live:
            return like.normal_(generator=generator)
        position = self._next(Draw)
        ours = self.stepped._rehearsal.call.events[position].generator  # type: ignore[union-attr]
        if ours is not None and generator is not None:
            self.generators[id(generator)] = ours, generator
        value: Tensor = self.stepped._records[position]
        return like.copy_(value)

    def _sample_noise(self, *args: Any) -> Any:
        if self.live:
            return self.stepped._noise_sampler(*args)  # type: ignore[misc]
        position = self._next(Draw)
        if position == self.surprise.position:
            self._go_live()
            self._leave()
            return self.surprise.value
        return self.stepped._records[position]

    def _callback(self, info: Any) -> Any:
        if self.live:
            return self.stepped._callback(info)  # type: ignore[misc]
        position, surprise = self._next(CallbackCall), self.surprise
        self.told |= {(position, name): value for name, value in info.items() if isinstance(value, Tensor)}
        if position != surprise.position:
            return None
        with torch.no_grad():
            for key, value in surprise.edits.items():
                if not _identical(self.told[key], value):
                    self.told[key].copy_(value)
        self._go_live()
        self._leave()
        return surprise.value


def _restore(tensor: Tensor, contents: Tensor) -> None:
    if not _identical(tensor, contents):
        with torch.no_grad():
            tensor.copy_(contents)


def _identical(a: Tensor, b: Tensor) -> bool:
    """Whether contents are equal, NaN to NaN."""
    return torch.equal(a, b) or (
        torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(a.isnan(), b.isnan())
    )


def _own_hook(kwargs: dict[str, Any], passed: Any) -> Callable[[dict[str, Any]], Any]:
    """The hook that a function added to its model's arguments."""
    path = next(path for path, value in passed.changed.items() if isinstance(value, type))
    found: Any = kwargs
    for name in path:
        found = found[name]
    hook: Callable[[dict[str, Any]], Any] = found[-1]
    return hook


def _same_layout(tensor: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether a tensor has these strides, where they mean something."""
    return all(size == 1 or a == b for size, a, b in zip(tensor.shape, tensor.stride(), stride, strict=True))


def _broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    return len(shape) == len(full) and all(a in (1, b) for a, b in zip(shape, full, strict=True))


def _unlike(output: Any, x: Tensor, event: ModelCall, rehearsal: SamplerRehearsal) -> str:
    """Why an output cannot be used, empty if it can."""
    if not isinstance(output, Tensor):
        return f"its model returns a {type(output).__name__}"
    if output.shape != x.shape or output.dtype != x.dtype or output.device != x.device:
        got = f"{tuple(output.shape)} in {output.dtype} on {output.device}"
        return f"its model returns {got} for {tuple(x.shape)} in {x.dtype} on {x.device}"
    if not _same_layout(output, event.stride):
        return "its model's outputs are laid out unlike its inputs"
    if output.requires_grad and rehearsal.trial.uses_gradients:
        return "gradients are wanted: call it under torch.no_grad()"
    return ""


def _hook_unlike(told: list[dict[str, Any]], x: Tensor) -> str:
    if len(told) != 1:
        return f"its model called its hook {len(told)} times"
    other = told[0].get("uncond_denoised")
    if not isinstance(other, Tensor) or other.shape != x.shape or other.dtype != x.dtype:
        return "its model told its hook something unlike x"
    return ""


def _positions(device: torch.device) -> Any:
    """Where torch's global generators are."""
    if device.type == "cuda":
        default = torch.cuda.default_generators[device.index or 0]
        return default.initial_seed(), default.get_offset(), _host_state()
    return _host_state()


def _host_state() -> bytes:
    return torch.get_rng_state().numpy().tobytes()
