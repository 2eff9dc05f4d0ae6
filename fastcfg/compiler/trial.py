"""One run of a sampling function on stand-ins, and what it did."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .model_call import read_call
from .outcome import Outcome, read_outcome
from .patching import BROWNIAN_TREE, Talk, replaced
from .provenance import Provenance
from .stand_ins import DrawMode, FormError, ReadDict, StandInModel, copied, is_passive, is_plain, passed, tensors_in
from .subject import CallbackCall, Draw, Form, ModelCall, Subject
from .tape import Tape

__all__ = ["CallbackCall", "Draw", "Form", "ModelCall", "Subject", "Trial", "Unread"]


class Unread:
    """What the stand-in callback returns: a function that uses it cannot be examined."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return Unread
        raise FormError("sample_fn: got one that uses what its callback returns, expected one that does not")

    def __bool__(self) -> bool:
        raise FormError("sample_fn: got one that uses what its callback returns, expected one that does not")


@dataclass(eq=False)
class Trial:
    """A run of a subject. The tensors it keeps are copies.

    Args:
        output: called with the number of an output (a call has one for each of its branches), returns it.
        noise: called with the number of a draw and a tensor like it, returns its value.
        wide: whether float64 stays float64.
        follow: whether what the function computes from its samples is followed.
        unbounded: whether what the function clamps stays as it is, and is listed.

    Attributes:
        events: calls of the model, draws and callbacks, in the function's order.
        inputs, outputs: the model's, an output for each branch; `result` is the function's samples, and `outcome` all
            that it returns.
        told: tensors like x that its callback is given, by event and name; `sums` are the names of those that are no
            input, output or x.
        left: what a method sets on its object.
        tape: what it makes of the caller's tensors.
        bounded: what it clamps: the model calls before, the bound, and the tensor.
        others, latest: what a run on basis vectors told beside its samples, as vectors, and the last rows they are of.
        talk: what it prints, and whether it shows a progress bar.
        drawn: values, those before the first model call and after every one.
        callbacks: the number of model calls before every callback.
        tree: the arguments, after x, of the function's own Brownian tree; None if it makes none.
        in_place: whether the function changes tensors that its model, its callback or the caller may hold.
        changes_x: whether it works in place on x, and returns it; `scales_x` if it leaves x multiplied by a number.
        reads: whether it reads items of `extra_args`; `names_read` are the attributes of its model that it reads.
        uses_gradients: whether its result has a gradient if the model's outputs have one.
    """

    subject: Subject
    output: Callable[[int], Tensor]
    noise: Callable[[int, Tensor], Tensor]
    wide: bool = False
    follow: bool = False
    unbounded: bool = False
    events: list[ModelCall | Draw | CallbackCall] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)
    drawn: list[list[Tensor]] = field(default_factory=lambda: [[]])
    callbacks: list[int] = field(default_factory=list)
    tree: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    result: Any = None
    in_place: bool = False
    changes_x: bool = False
    uses_gradients: bool = False
    reads: bool = False
    scales_x: float = 1.0
    names_read: set[str] = field(default_factory=set)
    talk: Talk = field(default_factory=Talk)
    others: list[Tensor] = field(default_factory=list)
    latest: list[int] = field(default_factory=list)
    bounded: list[tuple[int, float, Tensor]] = field(default_factory=list)
    left: dict[str, Any] = field(default_factory=dict)
    tape: Tape = field(default_factory=lambda: Tape(()))
    told: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    sums: list[tuple[int, str]] = field(default_factory=list)

    def run(self, x: Tensor, sigmas: Tensor) -> Trial:
        """Run; raises what the function raises."""
        subject, self._x, self._sigmas, self._start = self.subject, x, sigmas, x.clone()
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # inputs, what was returned for them, and copies of this
        self._told: list[tuple[Any, ...]] = []
        self._has_x = not subject.draws_x
        self._provenance = Provenance(subject.tensors, self.follow, subject.own_tensors)
        self.tape = self._provenance.tape
        self._provenance.mark(x)
        others: dict[str, Any] = {name: copied(value) for name, value in subject.arguments.items()}
        stand_ins = {
            "callback": self._callback,
            "noise_sampler": lambda *args: self._draw_for(args),
            "randn_like": lambda like: self._draw(torch.empty_like(like), None, asked=True),
        }
        others |= {name: stand_ins[name] for name in subject.takes}
        if type(others.get("extra_args")) is dict:
            others["extra_args"] = ReadDict(others["extra_args"])
        if "disable" in inspect.signature(subject.sample_fn).parameters:
            others["disable"] = True
        with ExitStack() as stack:
            module = inspect.getmodule(subject.sample_fn)
            stack.enter_context(replaced([(module, BROWNIAN_TREE, self._make_tree)]))
            stack.enter_context(self.talk.heard())
            if self.follow:
                stack.enter_context(replaced(_reading(self._note_number)))
            bound = self._bound if self.unbounded else None
            stack.enter_context(DrawMode(self._draw, x.ndim if self.wide else None, self._provenance, bound))
            returned = subject.call(StandInModel(self._model, subject.model, self.names_read.add), x, sigmas, others)
        self.reads = self.reads or getattr(others.get("extra_args"), "was_read", False)
        self.left = dict(getattr(subject.sample_fn, "left", ()))
        for tensor in tensors_in(self.left):
            self.tape.reads |= self.tape.concerns(tensor)
            if self._provenance.is_of_run(tensor):
                raise FormError("sample_fn: got one that keeps what it computes from its samples, expected none")
        self.outcome: Outcome = read_outcome(returned, x, subject.free)
        result = self.outcome.main
        self.result, self.returned = result.detach().clone(), result
        self.uses_gradients = result.requires_grad
        self._settle()
        return self

    @property
    def calls(self) -> list[ModelCall]:
        """The model's."""
        return [event for event in self.events if isinstance(event, ModelCall)]

    @property
    def draws(self) -> list[Draw]:
        """The draws of noise."""
        return [event for event in self.events if isinstance(event, Draw)]

    def _note_number(self, values: Tensor) -> None:
        self.tape.reads |= self.tape.concerns(values)

    def _model(self, *args: Any, **kwargs: Any) -> Any:
        start, subject = self._start, self.subject
        x, time, further, kwargs, form = read_call(args, kwargs, start, subject, self._provenance)
        for value in further:
            if not (is_passive(value) if subject.free else is_plain(value)):
                raise FormError(
                    f"sample_fn: got one that calls its model as model(x, sigma, {_kind(value)}), expected numbers"
                )
        for tensor in tensors_in((further, kwargs)):
            if self._provenance.is_of_run(tensor):
                raise FormError(
                    "sample_fn: got one whose model is given what it computed from its samples, beside them, expected "
                    "x alone"
                )
        x = x[: len(start)] if form.branches > 1 else x
        differing = passed(subject.extra_args, kwargs, subject.free)
        if isinstance(time, Tensor):
            self.tape.reads |= self.tape.concerns(time)
            time = time.detach().clone()
        self.events.append(
            ModelCall(
                time,
                tuple(further),
                differing,
                x.dtype,
                x.stride(),
                x.requires_grad and x.is_leaf,
                torch.is_grad_enabled(),
                form,
            )
        )
        self.inputs.append(x.detach().clone())
        self.drawn.append([])
        done = sum(map(len, self.outputs))
        branches = [self.output(done + i).to(device=x.device, dtype=x.dtype) for i in range(form.branches)]
        self.outputs.append(branches)
        main = branches[0]
        given = torch.cat(branches) if form.branches > 1 else main.clone()
        if differing.hook is not None:
            other = self._noise(main)
            given, told = (other.clone(), given) if self.subject.uncond_first else (given, other.clone())
            if differing.hook({"denoised": given, "uncond_denoised": told}) is not given:
                raise FormError("sample_fn: got one whose hook changes the prediction, expected one that reads it")
        copy = given.clone()
        if torch.is_grad_enabled():
            given = given.requires_grad_() * 1
        self._provenance.mark(given)
        self._seen.append((x, given, copy))
        return (given, Unread()) if subject.tuples else given

    def _bound(self, values: Tensor, bound: float) -> None:
        self.bounded.append((len(self.inputs), bound, values.detach().clone()))

    def _noise(self, like: Tensor) -> Tensor:
        value = self.noise(sum(map(len, self.drawn)), like)
        self._provenance.mark(value)
        self.drawn[-1].append(value)
        return value

    def _given_noise(self, like: Tensor) -> Tensor:
        given = self._noise(like).clone()
        self._provenance.mark(given)
        return given

    def _draw(self, like: Tensor, generator: torch.Generator | None, asked: bool = False) -> Tensor:
        if not self._has_x:
            self._has_x = True
            return self._x
        shape = tuple(like.shape)
        fits = len(shape) == self._start.ndim and all(
            size in (1, full) for size, full in zip(shape, self._start.shape, strict=True)
        )
        if not fits:
            raise FormError(f"sample_fn: got one that draws noise of shape {shape}, expected x's, or 1 in its place")
        self.events.append(Draw(None, shape, like.stride(), like.dtype, like.device, generator, asked))
        return self._given_noise(like)

    def _draw_for(self, arguments: tuple[Any, ...]) -> Tensor:
        like = self._start
        copies = tuple(value.clone() if isinstance(value, Tensor) else value for value in arguments)
        self.events.append(Draw(copies, tuple(like.shape), like.stride(), like.dtype, like.device))
        return self._given_noise(like)

    def _make_tree(self, x: Tensor, *args: Any, **kwargs: Any) -> Callable[..., Tensor]:
        if self.tree is not None or x is not self._x or self.events:
            raise FormError("sample_fn: got one with several Brownian trees, expected one like x")
        self.tree = args, kwargs
        return lambda *sigmas: self._draw_for(sigmas)

    def _callback(self, *args: Any) -> Any:
        self.callbacks.append(len(self.inputs))
        info = args[0] if len(args) == 1 and isinstance(args[0], dict) else None
        if info is None:
            raise FormError("sample_fn: got one whose callback is not given a dictionary, expected one")
        kept = {}
        for name, value in info.items():
            kept[name] = value, value.detach().clone() if isinstance(value, Tensor) else value
        self.events.append(CallbackCall({}))
        self._told.append((len(self.events) - 1, kept))
        return Unread()

    def _settle(self) -> None:
        """Find where the callbacks' values come from, and whether inputs and outputs were changed later."""
        pairs = [(x, copy) for (x, _, _), copy in zip(self._seen, self.inputs, strict=True)]
        pairs += [(given, copy) for _, given, copy in self._seen]
        self.in_place = not all(torch.equal(tensor, copy) for tensor, copy in pairs)
        for position, info in self._told:
            found = {name: self._source(position, *value) for name, value in info.items()}
            for name, (_, copy) in info.items():
                if isinstance(copy, Tensor) and copy.shape == self._start.shape and self.subject.free:
                    self.told[position, name] = copy
                    if found[name][0] == "unknown":
                        found[name] = "sum", copy.dtype
                        self.sums.append((position, name))
            self.events[position] = CallbackCall(found)

    def row_told(self, position: int) -> int:
        """The row before an event."""
        return max(sum(isinstance(event, ModelCall) for event in self.events[:position]) - 1, 0)

    def _source(self, position: int, value: Any, copy: Any) -> tuple[str, Any]:
        if not isinstance(value, Tensor):
            return ("value", value) if is_plain(value) else ("unknown", None)
        done = sum(isinstance(event, ModelCall) for event in self.events[:position])
        for call in (done - 1, done):  # the input before the callback, and the one after it
            if 0 <= call < len(self._seen) and value is self._seen[call][0] and torch.equal(copy, self.inputs[call]):
                return "input", call
        for call in range(done - 1, -1, -1):
            if value is self._seen[call][1]:
                return "output", call
        if value is self._x and torch.equal(copy, self._start):
            return "start", None
        if value is self.returned and torch.equal(copy, self.result):
            return "input", len(self._seen)
        if value.untyped_storage().data_ptr() == self._sigmas.untyped_storage().data_ptr() and value.ndim == 0:
            return "level", (value.storage_offset() - self._sigmas.storage_offset()) // max(self._sigmas.stride(0), 1)
        return ("value", copy) if value.numel() <= max(len(self._start), 1) else ("unknown", None)


def _kind(value: Any) -> str:
    return type(value).__name__


def _reading(note: Callable[[Tensor], object]) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Replacements for what reads tensors where no operation shows it."""

    def noted(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def read(values: Tensor, *args: Any, **kwargs: Any) -> Any:
            note(values)
            return original(values, *args, **kwargs)

        return read

    return [(Tensor, name, noted(name)) for name in ("numpy", "tolist")]
