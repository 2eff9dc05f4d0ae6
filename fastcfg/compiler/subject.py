"""A sampling function and how it is called, and the events of a run of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .stand_ins import Passed, is_passive, is_stateless, is_torchs, tensors_in


@dataclass(frozen=True, eq=False)
class Subject:
    """A sampling function and how it is called.

    Attributes:
        sample_fn: the function.
        arguments: by name, but for model, x and sigmas.
        names: of the parameters that take model, x and sigmas; None if they are the first three. "" for x if the
            function draws it, and for sigmas if it takes none.
        model: whose attributes the function may read; None if there is none.
        takes: the stand-ins that it is given, of "callback", "noise_sampler" and "randn_like".
        uncond_first: whether the model's main output is the unconditional prediction that a hook is told, and the
            output it returns the further one.
        free: whether its model may be called in any form: by keyword, with tensors of the function's own, with several
            branches side by side.
        tuples: whether its model returns a tuple, of which the function takes the first.
    """

    sample_fn: Callable[..., Any]
    arguments: Mapping[str, Any]
    names: tuple[str, str, str] | None = None
    model: Any = None
    takes: tuple[str, ...] = ()
    uncond_first: bool = False
    free: bool = False
    tuples: bool = False

    @property
    def draws_x(self) -> bool:
        """Whether the first draw is x."""
        return self.names is not None and not self.names[1]

    @property
    def tensors(self) -> Iterator[Tensor]:
        """The caller's, among the arguments."""
        return tensors_in(self.arguments)

    @property
    def own_tensors(self) -> Iterator[Tensor]:
        """The caller's, but for those of `extra_args`."""
        return tensors_in({name: value for name, value in self.arguments.items() if name != "extra_args"})

    @property
    def is_described(self) -> bool:
        """Whether its arguments but for the model's and observers are plain, tensors, or draw noise in known ways."""
        known = ("extra_args", *self.takes)
        own = [value for name, value in self.arguments.items() if name not in known]
        draws = [isinstance(value, torch.Generator) or is_torchs(value) or is_stateless(value) for value in own]
        return all(draws or is_passive(value) for value, draws in zip(own, draws, strict=True))

    def call(self, model: Any, x: Tensor, sigmas: Tensor, others: Mapping[str, Any]) -> Any:
        """Call the function, with its own arguments replaced by others."""
        arguments = {**self.arguments, **others}
        if self.names is None:
            return self.sample_fn(model, x, sigmas, **arguments)
        arguments |= {name: value for name, value in zip(self.names, (model, x, sigmas), strict=True) if name}
        parameters = inspect.signature(self.sample_fn).parameters.values()
        first = [arguments.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in arguments]
        return self.sample_fn(*first, **arguments)

    @property
    def extra_args(self) -> dict[str, Any]:
        """The model's keyword arguments."""
        return self.arguments.get("extra_args") or {}


@dataclass(frozen=True)
class Form:
    """How a model is given x and its time.

    Attributes:
        x_name: the keyword of x; "" by position.
        timed: whether the second argument by position is its time; if not, it is one of the others.
        branches: how often x is in the batch, one after the other.
    """

    x_name: str = ""
    timed: bool = True
    branches: int = 1


@dataclass(frozen=True, eq=False)
class ModelCall:
    """A call of the model: its time (a copy) and further arguments, the dtype and strides of its input, and how
    gradients were switched.

    Attributes:
        form: of the call.
    """

    time: Any
    further: tuple[Any, ...]
    passed: Passed
    dtype: torch.dtype
    stride: tuple[int, ...]
    requires_grad: bool
    grad_enabled: bool
    form: Form = Form()

    @property
    def has_tensors(self) -> bool:
        """Whether it is given tensors beside x and its time that are not the `extra_args`."""
        return any(True for _ in tensors_in((self.further, dict(self.passed.changed))))

    def replaced(self, change: Callable[[Any], Any]) -> ModelCall:
        """The same with what it is given beside x and its time changed."""
        changed = {path: change(value) for path, value in self.passed.changed.items()}
        passed = replace(self.passed, changed=changed)
        return replace(self, further=tuple(map(change, self.further)), passed=passed)

    def without_tensors(self) -> ModelCall:
        """The same with the tensors left out, and a hook's place kept: what it holds may be large."""
        changed = {
            path: None if any(True for _ in tensors_in(value)) else value for path, value in self.passed.changed.items()
        }
        hook = None if self.passed.hook is None else dict
        further = tuple(None if any(True for _ in tensors_in(value)) else value for value in self.further)
        return replace(self, further=further, passed=replace(self.passed, changed=changed, hook=hook))


@dataclass(frozen=True, eq=False)
class Draw:
    """A draw of noise: the arguments of the noise sampler or None for torch's own, and an uninitialised tensor's shape,
    strides, dtype and device, with the generator or None for torch's. `asked` if the caller's `randn_like` draws."""

    arguments: tuple[Any, ...] | None
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    device: Any = None
    generator: torch.Generator | None = None
    asked: bool = False


@dataclass(frozen=True, eq=False)
class CallbackCall:
    """A call of the callback: where every value of its dictionary comes from, as (kind, value).

    Kinds: "input" and "output" (of a model call, by number), "start" (x as given), "level" (of sigmas, by index),
    "sum" (of a row's x and output, with its dtype), "value" (a small tensor, or anything plain), and "unknown".
    """

    info: Mapping[str, tuple[str, Any]]
