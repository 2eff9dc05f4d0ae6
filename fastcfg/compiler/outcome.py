"""What a sampling function returns: its samples, and what it returns beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .stand_ins import FormError, is_plain


@dataclass(frozen=True)
class _Place:
    """Stands for one of the tensors."""

    index: int


@dataclass(frozen=True)
class _Stack:
    """Stands for a stack of tensors."""

    places: tuple[_Place, ...]
    dim: int


_MAIN, _X = _Place(-1), _Place(-2)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a function returned.

    Attributes:
        main: the samples.
        others: the other tensors, each once.
        template: the whole, with places in place of tensors.
    """

    main: Tensor
    others: Sequence[Tensor]
    template: Any

    @property
    def alone(self) -> bool:
        """Whether the function returns its samples and nothing else."""
        return self.template == _MAIN

    def rebuilt(self, main: Tensor, others: Sequence[Tensor], x: Tensor) -> Any:
        """The whole with other tensors; x is what the function was given."""
        return _mapped(
            self.template, lambda place: {_MAIN: main, _X: x}.get(place) if place.index < 0 else others[place.index]
        )


def read_outcome(result: Any, x: Tensor, free: bool) -> Outcome:
    """Find the samples: the tensor itself, the first of a tuple, the last of a list, or the last of a stack of states.

    Raises:
        FormError: there are none, or it returns what is neither plain nor a tensor like them.
    """
    if isinstance(result, Tensor) and result.shape == x.shape:
        return Outcome(result, (), _MAIN)
    main = _samples(result, x) if free else None
    if main is None:
        if isinstance(result, Tensor):
            shape = tuple(result.shape)
            raise FormError(f"sample_fn: got one that returns shape {shape}, expected x's {tuple(x.shape)}")
        raise FormError(f"sample_fn: got one that returns {type(result).__name__}, expected a tensor")
    others: list[Tensor] = []
    places = {id(main): _MAIN, id(x): _X} if main is not x else {id(main): _MAIN}

    def place(tensor: Tensor) -> _Place:
        if tensor.shape != x.shape:
            raise FormError(f"sample_fn: got one that returns shape {tuple(tensor.shape)} too, expected x's alone")
        if id(tensor) not in places:
            places[id(tensor)] = _Place(len(others))
            others.append(tensor)
        return places[id(tensor)]

    def template(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.ndim == x.ndim + 1:
                dim = _stacked(value, x)
                parts = [
                    main if value is result and i == len(value.unbind(dim)) - 1 else part
                    for i, part in enumerate(value.unbind(dim))
                ]
                return _Stack(tuple(place(part) for part in parts), dim)
            return place(value)
        if type(value) in (list, tuple):
            return type(value)(map(template, value))
        if type(value) is dict:
            return {name: template(item) for name, item in value.items()}
        if not is_plain(value):
            raise FormError(f"sample_fn: got one that returns a {type(value).__name__} too, expected tensors")
        return value

    return Outcome(main, others, template(result))


def _samples(result: Any, x: Tensor) -> Tensor | None:
    if isinstance(result, Tensor):
        if result.shape == x.shape:
            return result
        stacked = result.ndim == x.ndim + 1 and _stacked(result, x) is not None
        return result.select(_stacked(result, x), -1) if stacked else None
    if type(result) in (list, tuple) and result:
        return _samples(result[0 if type(result) is tuple else -1], x)
    return None


def _stacked(tensor: Tensor, x: Tensor) -> Any:
    """The dimension along which a tensor is a stack of tensors like x: the first or the second."""
    if tensor.shape[1:] == x.shape:
        return 0
    return 1 if (tensor.shape[0], *tensor.shape[2:]) == tuple(x.shape) else None


def _mapped(template: Any, tensor: Callable[[_Place], Any]) -> Any:
    if isinstance(template, _Place):
        return tensor(template)
    if isinstance(template, _Stack):
        return torch.stack([tensor(place) for place in template.places], dim=template.dim)
    if isinstance(template, dict):
        return {name: _mapped(item, tensor) for name, item in template.items()}
    if isinstance(template, list | tuple):
        return type(template)(_mapped(item, tensor) for item in template)
    return template
