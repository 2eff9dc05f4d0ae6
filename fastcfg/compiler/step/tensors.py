"""The tensors that a step is run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..probe import Array
from .parts import OUTPUT, SAMPLE, Source, UntraceableError, is_plain

__all__ = ["CONFIG", "MAX_DRAWS", "OURS", "RANDOM", "SHORT", "BasisVectors", "Examples", "Inputs", "Saturated"]
__all__ += ["Tensors", "laid_out", "order_of"]

MAX_DRAWS = 4
# Sizes of the random inputs in the last positions of basis vectors: bounds of all sizes show.
_SIZES = (1.0, 1.0, 1.0, 1.0, 10.0, 10.0, 1e2, 1e2, 1e3, 1e3, 1e4, 1e4)
RANDOM = len(_SIZES)
SHORT = 0.3  # the other length of basis vectors
CONFIG = "_internal_dict"  # the attribute with a diffusers config
OURS = "_fastcfg"  # how our own attributes begin
_SATURATED = 1e4
_MAX_CHANNELS = 16


@dataclass(eq=False)
class Inputs:
    """The tensors of a step: dtypes by source, in order, without draws; and the attributes that a step must not read,
    with the reason."""

    dtypes: dict[Source, torch.dtype]
    shape: tuple[int, ...]
    wide: bool
    orders: dict[Source, tuple[int, ...]]  # of the dimensions in memory
    refused: dict[str, str] = field(default_factory=dict)
    _copies: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, scheduler: Any, output: Tensor, sample: Tensor, options: Mapping[str, Any]) -> Inputs:
        shape = tuple(sample.shape)
        if sample.ndim < 2:
            raise UntraceableError("its samples have less than two dimensions")
        wide = sample.ndim > 2 and tuple(output.shape) == (shape[0], 2 * shape[1], *shape[2:])
        if output.shape != sample.shape and not wide:
            raise UntraceableError("the model output has another shape than the sample")
        if wide and shape[1] > _MAX_CHANNELS:
            raise UntraceableError(f"its samples have more than {_MAX_CHANNELS} channels and learned variances")
        orders = {SAMPLE: order_of(sample), OUTPUT: order_of(output)}
        inputs = cls({SAMPLE: sample.dtype, OUTPUT: output.dtype}, shape, wide, orders)
        for name, value in vars(scheduler).items():
            if name != CONFIG and not name.startswith(OURS):
                try:
                    inputs.dtypes |= inputs._kept(value, ("state", name))
                except UntraceableError as error:
                    inputs.refused[name] = f"its attribute {name} {error}"
        if not isinstance(vars(scheduler).get(CONFIG, {}), Mapping):
            inputs.refused[CONFIG] = "its config is no mapping"
        for name, value in options.items():
            if isinstance(value, Tensor) and value.ndim > 1:
                inputs.dtypes |= inputs._kept(value, ("option", name))
        return inputs

    def _kept(self, value: Any, source: Source) -> dict[Source, torch.dtype]:
        """The tensors like the sample in a value."""
        if isinstance(value, Tensor):
            if value.requires_grad and torch.is_grad_enabled():
                raise UntraceableError("needs gradients")
            if value.ndim < 2:
                return {}
            if tuple(value.shape) != self.shape:
                raise UntraceableError(f"has shape {tuple(value.shape)}, the sample {self.shape}")
            if not value.is_floating_point():
                raise UntraceableError(f"is a tensor of {value.dtype}")
            self.orders[source] = order_of(value)
            return {source: value.dtype}
        if type(value) in (list, tuple, dict):
            items = value.items() if type(value) is dict else enumerate(value)
            found: dict[Source, torch.dtype] = {}
            for key, item in items:
                found |= self._kept(item, (*source, key))
            return found
        if not is_plain(value) and not (isinstance(value, np.ndarray) and not value.dtype.hasobject):
            raise UntraceableError(f"is a {type(value).__name__}")
        return {}

    @cached_property
    def names(self) -> list[Source]:
        """All inputs, the draws last."""
        return [*self.dtypes, *(("draw", number) for number in range(MAX_DRAWS))]

    @cached_property
    def _indices(self) -> dict[Source, int]:
        return {name: index for index, name in enumerate(self.names)}

    def index(self, source: Source) -> int:
        """The number of an input."""
        return self._indices[source]

    def copy_of(self, value: Tensor) -> Tensor:
        """A copy of a small tensor in the host's memory, the same for all runs."""
        if id(value) not in self._copies:
            self._copies[id(value)] = value.detach().cpu().clone()
        return self._copies[id(value)]

    def example_shape(self, batch: int, *rest: int) -> tuple[int, ...]:
        """A shape of as many dimensions as the sample's, with its channels up to a limit, and a last dimension."""
        *middle, last = rest
        if len(self.shape) == 2:
            return batch, last
        return batch, min(self.shape[1], _MAX_CHANNELS), *(middle or [1]) * (len(self.shape) - 3), last


class Tensors:
    """The input tensors of a run, by source: `shape`, without a wide output's channels, and the draws' dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # of all tensors; None for the caller's

    def tensor(self, source: Source, dtype: torch.dtype | None = None) -> Tensor:
        raise NotImplementedError


class BasisVectors(Tensors):
    """Float64 vectors along the last dimension: 0, then 1 for each input in turn, then a shorter one for each; with a
    wide output, each draw again where the variance channels are -1 and 1, not 0; then NaN for each input, from
    `first_nan` on; last random positions."""

    dtype = torch.float64

    def __init__(self, inputs: Inputs) -> None:
        self._inputs, names = inputs, inputs.names
        self._wide = 2 * MAX_DRAWS if inputs.wide else 0
        self.first_nan = 1 + 2 * len(names) + self._wide
        # In the last of these the variance channels are.
        self.end_nan = self.first_nan + len(names) + inputs.wide
        self.shape = inputs.example_shape(1, self.end_nan + RANDOM)

    def tensor(self, source: Source, dtype: torch.dtype | None = None) -> Tensor:
        """The values of an input; a wide output's are [1, 2C, ...]."""
        index, count = self._inputs.index(source), len(self._inputs.names)
        draw = source[1] if source[0] == "draw" and self._wide else None
        value = _basis_vector(self.shape, index, count, draw, self.first_nan + index)
        if source == OUTPUT and self._wide:
            return torch.cat([value, _variances(self.shape, 1 + 2 * count, self.end_nan - 1)], dim=1)
        return value.clone()

    def random(self) -> Array:
        """The values of all inputs in the random positions, as `prove` takes them."""
        tensors = [self.tensor(source)[..., -RANDOM:] for source in self._inputs.names]
        if self._wide:
            tensors[1], variances = tensors[1].chunk(2, dim=1)
            tensors.append(variances)
        stacked: Array = np.array([tensor.numpy() for tensor in tensors])
        return stacked.reshape(len(tensors), self.shape[0], -1)


@lru_cache(maxsize=256)
def _basis_vector(shape: tuple[int, ...], index: int, count: int, draw: int | None, nan: int) -> Tensor:
    value = torch.zeros(shape, dtype=torch.float64)
    value[..., 1 + index], value[..., 1 + count + index] = 1.0, SHORT
    if draw is not None:
        value[..., 1 + 2 * count + 2 * draw : 3 + 2 * count + 2 * draw] = 1.0
    value[..., nan] = torch.nan
    value[..., -RANDOM:].normal_(generator=torch.Generator().manual_seed(index))
    value[..., -RANDOM:] *= torch.tensor(_SIZES, dtype=torch.float64)
    return value


@lru_cache(maxsize=64)
def _variances(shape: tuple[int, ...], first: int, nan: int) -> Tensor:
    value = torch.zeros(shape, dtype=torch.float64)
    value[..., first : first + 2 * MAX_DRAWS] = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(MAX_DRAWS)
    value[..., nan] = torch.nan
    value[..., -RANDOM:].uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    return value


class Examples(Tensors):
    """Random tensors of a shape, float64 of a size if that is given, else of the caller's dtypes."""

    def __init__(self, inputs: Inputs, shape: tuple[int, ...], size: float | None = None) -> None:
        self._inputs, self._size = inputs, 1.0 if size is None else size
        self.dtype = None if size is None else torch.float64
        self.shape = shape

    def tensor(self, source: Source, dtype: torch.dtype | None = None) -> Tensor:
        """The values of an input, always the same; `dtype` is that of a draw."""
        inputs, wide = self._inputs, source == OUTPUT and self._inputs.wide
        value = _normals(self.shape, inputs.index(source))
        if self._size != 1.0:
            value = value * self._size
        if wide:
            value = torch.cat([value, _normals(self.shape, -1).clamp(-1, 1)], dim=1)
        value = value.to(self.dtype or dtype or inputs.dtypes.get(source, torch.float32), copy=True)
        return laid_out(value, inputs.orders.get(source))

    def exact(self) -> Array:
        """The values of all inputs, as `prove` takes them."""
        inputs = self._inputs
        dtypes = tuple(self.dtype or inputs.dtypes.get(source, torch.float32) for source in inputs.names)
        values = _exact_normals(self.shape, dtypes, inputs.wide)
        if self._size == 1.0:
            return values
        return np.concatenate([values[: len(dtypes)] * self._size, values[len(dtypes) :]])


@lru_cache(maxsize=64)
def _exact_normals(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], wide: bool) -> Array:
    values = [_normals(shape, index).to(dtype) for index, dtype in enumerate(dtypes)]
    if wide:
        values.append(_normals(shape, -1).clamp(-1, 1).to(dtypes[1]))
    stacked: Array = np.array([value.double().numpy() for value in values])
    return stacked.reshape(len(values), shape[0], -1)


@lru_cache(maxsize=64)
def _normals(shape: tuple[int, ...], index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index + 1)
    return torch.empty(shape, dtype=torch.float64).normal_(generator=generator)


class Saturated(Tensors):
    """Float64 vectors with which x0, of coefficients p, is far above every bound: first a common point, then for each
    input one with a larger value of it."""

    dtype = torch.float64

    def __init__(self, inputs: Inputs, p: Array) -> None:
        self._inputs = inputs
        self.base = _SATURATED * np.sign(p)
        self.added = np.where(p >= 0, _SATURATED, -_SATURATED)
        self.shape = inputs.example_shape(1, 1 + len(inputs.names))

    def tensor(self, source: Source, dtype: torch.dtype | None = None) -> Tensor:
        """The values of an input; the variance channels of a wide output are 0."""
        index = self._inputs.index(source)
        value = torch.full(self.shape, self.base[index], dtype=torch.float64)
        value[..., 1 + index] += self.added[index]
        return torch.cat([value, 0 * value], dim=1) if source == OUTPUT and self._inputs.wide else value


def order_of(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions of a tensor by their strides, the largest first. UntraceableError for a tensor with gaps in memory
    and another than the usual order: what torch makes of it differs by operation."""
    strides, sizes = tensor.stride(), tensor.shape
    order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
    step, dense = 1, True
    for dim in reversed(order):
        if sizes[dim] > 1:
            dense = dense and strides[dim] == step
            step *= sizes[dim]
    if not dense and order != list(range(tensor.ndim)):
        raise UntraceableError(
            "sample, output or a kept tensor has gaps in memory, and its dimensions in another order"
        )
    return tuple(order)


def laid_out(tensor: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """The tensor with its dimensions in an order in memory; None for as it is."""
    if order is None:
        return tensor
    inverse = sorted(range(tensor.ndim), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(inverse)
