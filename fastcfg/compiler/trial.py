"""One run of a sampling function on stand-ins, and what it did."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .patching import BROWNIAN_TREE, replaced
from .stand_ins import DrawMode, FormError, Passed, ReadDict, StandInModel, copied, is_plain, passed


@dataclass(frozen=True, eq=False)
class Subject:
    """A sampling function and how it is called.

    Attributes:
        sample_fn: the function.
        arguments: by name, but for model, x and sigmas.
        names: of the parameters that take model, x and sigmas; None if they are the first three.
        model: whose attributes the function may read; None if there is none.
        takes: the stand-ins that it is given, of "callback" and "noise_sampler".
        uncond_first: whether the model's main output is the unconditional prediction that a hook is told, and the
            output it returns the further one.
    """

    sample_fn: Callable[..., Any]
    arguments: Mapping[str, Any]
    names: tuple[str, str, str] | None = None
    model: Any = None
    takes: tuple[str, ...] = ()
    uncond_first: bool = False

    def call(self, model: Any, x: Tensor, sigmas: Tensor, others: Mapping[str, Any]) -> Any:
        """Call the function, with its own arguments replaced by others."""
        arguments = {**self.arguments, **others}
        if self.names is None:
            return self.sample_fn(model, x, sigmas, **arguments)
        arguments |= zip(self.names, (model, x, sigmas), strict=True)
        parameters = inspect.signature(self.sample_fn).parameters.values()
        first = [arguments.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in arguments]
        return self.sample_fn(*first, **arguments)

    @property
    def extra_args(self) -> dict[str, Any]:
        """The model's keyword arguments."""
        return self.arguments.get("extra_args") or {}


@dataclass(frozen=True, eq=False)
class ModelCall:
    """A call of the model: its time (a copy) and further arguments, the dtype and strides of its input, and how
    gradients were switched."""

    time: Any
    further: tuple[Any, ...]
    passed: Passed
    dtype: torch.dtype
    stride: tuple[int, ...]
    requires_grad: bool
    grad_enabled: bool


@dataclass(frozen=True, eq=False)
class Draw:
    """A draw of noise: the arguments of the noise sampler or None for torch's own, and an uninitialised tensor's shape,
    strides, dtype and device, with the generator or None for torch's."""

    arguments: tuple[Any, ...] | None
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    device: Any = None
    generator: torch.Generator | None = None


@dataclass(frozen=True, eq=False)
class CallbackCall:
    """A call of the callback: where every value of its dictionary comes from, as (kind, value).

    Kinds: "input" and "output" (of a model call, by number), "start" (x as given), "level" (of sigmas, by index),
    "value" (a small tensor, or anything plain), and "unknown".
    """

    info: Mapping[str, tuple[str, Any]]


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
        output: called with the number of a model call, returns its main output.
        noise: called with the number of a draw and a tensor like it, returns its value.
        wide: whether float64 stays float64.

    Attributes:
        events: calls of the model, draws and callbacks, in the function's order.
        inputs, outputs: the model's; `result` is the function's.
        drawn: values, those before the first model call and after every one.
        callbacks: the number of model calls before every callback.
        tree: the arguments, after x, of the function's own Brownian tree; None if it makes none.
        in_place: whether the function changes tensors that its model, its callback or the caller may hold.
        changes_x: whether it works in place on x, and returns it.
        reads: whether it reads attributes of its model or items of `extra_args`.
        uses_gradients: whether its result has a gradient if the model's outputs have one.
    """

    subject: Subject
    output: Callable[[int], Tensor]
    noise: Callable[[int, Tensor], Tensor]
    wide: bool = False
    events: list[ModelCall | Draw | CallbackCall] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    drawn: list[list[Tensor]] = field(default_factory=lambda: [[]])
    callbacks: list[int] = field(default_factory=list)
    tree: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    result: Any = None
    in_place: bool = False
    changes_x: bool = False
    uses_gradients: bool = False
    reads: bool = False

    def run(self, x: Tensor, sigmas: Tensor) -> Trial:
        """Run; raises what the function raises."""
        subject, self._x, self._sigmas, self._start = self.subject, x, sigmas, x.clone()
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # inputs, what was returned for them, and copies of this
        self._told: list[tuple[Any, ...]] = []
        others: dict[str, Any] = {name: copied(value) for name, value in subject.arguments.items()}
        stand_ins = {"callback": self._callback, "noise_sampler": lambda *args: self._draw_for(args)}
        others |= {name: stand_ins[name] for name in subject.takes}
        if type(others.get("extra_args")) is dict:
            others["extra_args"] = ReadDict(others["extra_args"])
        if "disable" in inspect.signature(subject.sample_fn).parameters:
            others["disable"] = True
        with ExitStack() as stack:
            module = inspect.getmodule(subject.sample_fn)
            stack.enter_context(replaced([(module, BROWNIAN_TREE, self._make_tree)]))
            stack.enter_context(DrawMode(self._draw, x.ndim if self.wide else None))
            result = subject.call(StandInModel(self._model, subject.model, self._note_read), x, sigmas, others)
        self.reads = self.reads or getattr(others.get("extra_args"), "was_read", False)
        if not isinstance(result, Tensor):
            raise FormError(f"sample_fn: got one that returns {_kind(result)}, expected a tensor")
        if result.shape != x.shape:
            shape = tuple(result.shape)
            raise FormError(f"sample_fn: got one that returns shape {shape}, expected x's {tuple(x.shape)}")
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

    def _note_read(self) -> None:
        self.reads = True

    def _model(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) < 2 or not isinstance(args[0], Tensor):
            how = ", ".join([*(_kind(value) for value in args), *(f"{name}=" for name in kwargs)])
            raise FormError(f"sample_fn: got one that calls its model as model({how}), expected model(x, sigma, ...)")
        (x, time, *further), start = args, self._start
        if x.shape != start.shape:
            if x.shape[1:] == start.shape[1:]:
                raise FormError(
                    f"sample_fn: got one that calls its model with a batch of {len(x)} for {len(start)} samples, "
                    "expected one without guidance of its own: leave it to the Sampler, as guidance=CFG(scale)"
                )
            shape = tuple(x.shape)
            raise FormError(
                f"sample_fn: got one whose model input has shape {shape}, expected x's {tuple(start.shape)}"
            )
        if bad := [_kind(value) for value in further if not is_plain(value)]:
            raise FormError(f"sample_fn: got one that calls its model as model(x, sigma, {bad[0]}), expected numbers")
        differing = passed(self.subject.extra_args, kwargs)
        if isinstance(time, Tensor):
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
            )
        )
        self.inputs.append(x.detach().clone())
        self.drawn.append([])
        main = self.output(len(self.outputs)).to(device=x.device, dtype=x.dtype)
        self.outputs.append(main)
        given = main.clone()
        if differing.hook is not None:
            other = self._noise(main)
            given, told = (other.clone(), given) if self.subject.uncond_first else (given, other.clone())
            if differing.hook({"denoised": given, "uncond_denoised": told}) is not given:
                raise FormError("sample_fn: got one whose hook changes the prediction, expected one that reads it")
        copy = given.clone()
        if torch.is_grad_enabled():
            given = given.requires_grad_() * 1
        self._seen.append((x, given, copy))
        return given

    def _noise(self, like: Tensor) -> Tensor:
        value = self.noise(sum(map(len, self.drawn)), like)
        self.drawn[-1].append(value)
        return value

    def _draw(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        shape = tuple(like.shape)
        fits = len(shape) == self._start.ndim and all(
            size in (1, full) for size, full in zip(shape, self._start.shape, strict=True)
        )
        if not fits:
            raise FormError(f"sample_fn: got one that draws noise of shape {shape}, expected x's, or 1 in its place")
        self.events.append(Draw(None, shape, like.stride(), like.dtype, like.device, generator))
        return self._noise(like).clone()

    def _draw_for(self, arguments: tuple[Any, ...]) -> Tensor:
        like = self._start
        copies = tuple(value.clone() if isinstance(value, Tensor) else value for value in arguments)
        self.events.append(Draw(copies, tuple(like.shape), like.stride(), like.dtype, like.device))
        return self._noise(like).clone()

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
            self.events[position] = CallbackCall(found)

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
