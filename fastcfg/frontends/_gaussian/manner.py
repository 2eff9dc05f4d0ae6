"""How a step calls its model: where it puts the state and the time, and what else it gives.

guided-diffusion's steps call model(x, t, **model_kwargs), and so does the engine. Others name x or the time, give times
in another dtype or of shape [B, 1], leave some of model_kwargs out, or add flags.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

_FLAGS = bool | int | float | str | None


@dataclass(frozen=True)
class Manner:
    """How a model is called.

    Attributes:
        x, time: their positions or names.
        dtype: of the times; None: as the engine gives them.
        inner: dimensions of the times after the first.
        flags: further arguments by name.
        left_out: names of model_kwargs that it is not given.
    """

    x: int | str = 0
    time: int | str = 1
    dtype: torch.dtype | None = None
    inner: int = 0
    flags: tuple[tuple[str, Any], ...] = ()
    left_out: frozenset[str] = frozenset()

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The state and the times [B] of a call; ValueError for a call of another manner."""
        places: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        x, times = places.get(self.x), places.get(self.time)
        if not isinstance(times, Tensor) or not isinstance(x, Tensor) or len(args) != self._positional:
            raise ValueError("its model is called with something else than x and its time")
        if times.shape != (len(x), *[1] * self.inner):
            raise ValueError("its model is called with times of another shape")
        return x, times.flatten()

    @property
    def _positional(self) -> int:
        return sum(isinstance(place, int) for place in (self.x, self.time))


USUAL = Manner()


def manner_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Mapping[str, Any], x: Tensor) -> Manner:
    """How a model was called for a state x; `given` are the caller's model_kwargs. `USUAL` where that is not known, and
    the comparison of steps then says what differs."""
    places: dict[Any, Any] = {**dict(enumerate(args)), **{n: v for n, v in kwargs.items() if n not in given}}
    tensors = {place: value for place, value in places.items() if isinstance(value, Tensor)}
    flags = {place: value for place, value in places.items() if isinstance(value, _FLAGS)}
    states = [place for place, value in tensors.items() if value.shape == x.shape and torch.equal(value, x)]
    times = [place for place, value in tensors.items() if place not in states and _is_time(value, len(x))]
    if len(states) != 1 or len(times) != 1 or len(tensors) + len(flags) != len(places) or set(flags) & {0, 1, 2}:
        return USUAL
    time = tensors[times[0]]
    dtype = None if time.dtype == torch.int64 else time.dtype
    left_out = frozenset(set(given) - set(kwargs))
    return Manner(states[0], times[0], dtype, time.ndim - 1, tuple(flags.items()), left_out)


def _is_time(value: Tensor, batch: int) -> bool:
    alike = bool(value.numel()) and bool((value == value.flatten()[0]).all())
    return alike and value.ndim > 0 and value.shape == (batch, *[1] * (value.ndim - 1))


def called(model: Callable[..., Any], manner: Manner) -> Callable[..., Any]:
    """A model called in a manner, for who calls model(x, t, **model_kwargs). Equal for the same model."""
    return model if manner == USUAL else partial(_call, model, manner)


def _call(model: Callable[..., Any], manner: Manner, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
    times = t.reshape(len(t), *[1] * manner.inner)
    places: dict[Any, Any] = {manner.x: x, manner.time: times if manner.dtype is None else times.to(manner.dtype)}
    args = [places.pop(place) for place in sorted(place for place in places if isinstance(place, int))]
    kept = {name: value for name, value in kwargs.items() if name not in manner.left_out}
    return model(*args, **{**kept, **dict(manner.flags), **places})
