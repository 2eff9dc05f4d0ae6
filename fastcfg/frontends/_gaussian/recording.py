"""Record what a step asks of its caller's functions (model, cond_fn, denoised_fn), and answer the same again."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class OwnStepError(BaseException):
    """An object's own step failed where the caller's functions did not. (Its loop may catch an Exception.)"""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class DifferentError(Exception):
    """A step does something else than the one it is compared with; the message says what."""


class RandomState:
    """The states of all generators a step may draw from, as they were: torch's, numpy's and Python's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        state: Any = np.random.get_state()  # noqa: NPY002
        kind, keys, *rest = state
        self.others: Any = (kind, keys.tobytes(), *rest), random.getstate()

    def put_back(self) -> None:
        """Make the generators go on from here."""
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self._device)
        kind, keys, *rest = self.others[0]
        np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))  # noqa: NPY002
        random.setstate(self.others[1])

    def moved(self) -> str:
        """Which generators have moved since: "", "torch's", or "numpy's or Python's"."""
        now = RandomState(self._device)
        if self.others != now.others:
            return "numpy's or Python's"
        return "" if torch.equal(self.torch, now.torch) and same(self.cuda, now.cuda) else "torch's"


@dataclass(frozen=True, eq=False)
class Asked:
    """A call of a function: its arguments (tensors are copies), what it returned, and the generators after it."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    returned: Any
    state: RandomState


class Recorder:
    """Records the calls of a caller's function.

    Args:
        function: the function; None records nothing.
        answer: called in its place, if given.

    Attributes:
        calls, entered: what it was asked and returned, and how often it was called.
        draws: whether it has drawn random numbers.
    """

    def __init__(self, function: Any, device: torch.device, answer: Callable[..., Any] | None = None) -> None:
        self.function, self.calls, self.entered, self.draws = function, list[Asked](), 0, False
        self._device, self._answer = device, answer

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Context that gives what to call in the function's place: a module itself, or something with the function's
        attributes."""
        if self.function is None:
            yield None
        elif isinstance(self.function, nn.Module) and self._answer is None:
            # Steps may ask a module for more than its output.
            handles = [self.function.register_forward_pre_hook(self._enter)]
            handles += [self.function.register_forward_hook(self._seen, with_kwargs=True)]
            try:
                yield self.function
            finally:
                for handle in handles:
                    handle.remove()
        else:
            yield Stand(self._called, self.function)

    @property
    def failed(self) -> bool:
        """Whether a call of the function has not returned."""
        return self.entered > len(self.calls)

    def _enter(self, *_: Any) -> None:
        self.entered += 1
        self._before = RandomState(self._device)

    def _seen(self, module: Any, args: Any, kwargs: Any, returned: Any) -> None:
        self._note(kept(args), kept(kwargs), returned)

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        self._enter()
        before = kept(args), kept(kwargs)
        returned = (self._answer or self.function)(*args, **kwargs)
        self._note(*before, returned)
        return returned

    def _note(self, args: Any, kwargs: Any, returned: Any) -> None:
        self.draws = self.draws or (self._answer is None and bool(self._before.moved()))
        self.calls.append(Asked(args, kwargs, with_tensors(returned, _copy), RandomState(self._device)))

    def replay(self, what: str, read: Callable[[Any], Any] = lambda value: value) -> Any:
        """A function that returns the same again, as `read` reads it, where it is asked the same; DifferentError where
        it is not. None if there is no function."""
        if self.function is None:
            return None
        asked = iter(self.calls)

        def answer(*args: Any, **kwargs: Any) -> Any:
            call = next(asked, None)
            if call is None:
                raise DifferentError(f"its step calls {what} {_times(len(self.calls))}")
            if not same(call.args, args) or not same(dict(call.kwargs), kwargs):
                raise DifferentError(f"its step gives {what} other arguments")
            call.state.put_back()
            return read(call.returned)

        return answer


class Stand:
    """Called in place of a function, with its attributes and its class."""

    def __init__(self, call: Callable[..., Any], function: Any) -> None:
        object.__setattr__(self, "_stands_for", (call, function))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return object.__getattribute__(self, "_stands_for")[0](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_stands_for")[1], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(object.__getattribute__(self, "_stands_for")[1], name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(object.__getattribute__(self, "_stands_for")[1])


def kept(value: Any) -> Any:
    """A value with its tensors copied, and the containers that hold them; objects stay the same."""
    return with_tensors(value, _copy, objects=False)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def with_tensors(value: Any, function: Callable[[Tensor], Tensor], objects: bool = True) -> Any:
    """A value with another tensor for every one of its tensors: alone, in containers, or attributes of an object."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [with_tensors(item, function, objects) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [with_tensors(item, function, objects) for item in value]
    if isinstance(value, dict):
        return _refilled(value, {name: with_tensors(item, function, objects) for name, item in value.items()})
    attributes = getattr(value, "__dict__", {})
    tensors = objects and any(isinstance(item, Tensor) for item in attributes.values())
    if tensors and not isinstance(value, nn.Module):
        twin = copy.copy(value)
        vars(twin).update({name: with_tensors(item, function, objects) for name, item in attributes.items()})
        return twin
    return value


def _refilled(value: dict[Any, Any], items: dict[Any, Any]) -> Any:
    if type(value) is dict:
        return items
    twin = copy.copy(value)  # a ModelOutput's items are its attributes too
    for name, item in items.items():
        twin[name] = item
    return twin


def same(a: Any, b: Any) -> bool:
    """Whether two values are the same object, or equal tensors, arrays, numbers or containers of these."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and _equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, bool | int | float | str) and a == b


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _times(count: int) -> str:
    return {0: "not at all", 1: "once only"}.get(count, f"{count} times only")
