"""The tensors that a step is run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..probe import Array
from .parts import OUTPUT, SAMPLE, Source, UntraceableError, are_numbers, is_plain

__all__ = [
    "CONFIG",
    "MAX_DRAWS",
    "OURS",
    "SHORT",
    "BasisVectors",
    "Examples",
    "Inputs",
    "Tensors",
    "Values",
    "laid_out",
    "order_of",
]

MAX_DRAWS = 4
SHORT = 0.3  # the other length of basis vectors
CONFIG = "_internal_dict"  # the attribute with a diffusers config
OURS = "_fastcfg"  # how our own attributes begin
# Of the random samples: bounds of all sizes show.
_SIZES = (1e-2, 1.0, 1.0, 1e1, 1e2, 1e3, 1e4)
_TINY = 1e-6  # basis vectors of which no x0 is limited
_SATURATED = 1e4  # with which every x0 is
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
            if type(value) is not dict and are_numbers(value):
                return {}
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


class Values(NamedTuple):
    """The values of all inputs in some samples, in float64, [inputs, B, C * ...], with a wide output's variance
    channels as a last row; and the largest of each in each sample, [inputs, B]."""

    tensors: Array
    largest: Array

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Values:
        """Of tensors of one shape."""
        stacked = np.array([tensor.double().numpy() for tensor in tensors])
        stacked = stacked.reshape(*stacked.shape[:2], -1)
        return cls(stacked, np.abs(stacked).max(axis=2))


class Tensors:
    """The input tensors of a run, by source: `shape`, without a wide output's channels, and the draws' dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # of all tensors; None for the caller's

    def tensor(self, source: Source, dtype: torch.dtype | None = None) -> Tensor:
        raise NotImplementedError


class BasisVectors(Tensors):
    """Float64 tensors that show a step's coefficients.

    Sample 0 has, along its last dimension, 0, then 1 for each input in turn, then a shorter one for each; with a wide
    output, each draw again where the variance channels are -1 and 1, not 0. In the following samples one input each is
    NaN. With `signs`, of an x0's coefficients, there are then samples in which one input each is infinite, and samples
    in which x0 is far beyond every limit: a common one, and one for each input with a larger value of it; in sample 0
    no limit shows, as all is tiny. The last samples are random.

    Attributes:
        size: of the vectors.
        nan, infinite, saturated, random: the samples.
        base, added: [inputs], the values of the saturated samples: in all, and added in turn.
    """

    dtype = torch.float64

    def __init__(self, inputs: Inputs, signs: Array | None = None) -> None:
        self._inputs, count = inputs, len(inputs.names)
        self.size = 1.0 if signs is None else _TINY
        self.nan = slice(1, 1 + count + inputs.wide)
        self.infinite = slice(self.nan.stop, self.nan.stop + (0 if signs is None else count))
        self.saturated = slice(self.infinite.stop, self.infinite.stop + (0 if signs is None else 1 + count))
        self.random = slice(self.saturated.stop, self.saturated.stop + len(_SIZES))
        self.shape = inputs.example_shape(self.random.stop, 1, 1 + 2 * count + 2 * MAX_DRAWS * inputs.wide)
        self.base = _SATURATED * (np.zeros(count) if signs is None else signs)
        self.added = np.where(self.base < 0, -_SATURATED, _SATURATED)
        self._key = (self.shape, count, inputs.wide, None if signs is None else tuple(signs.tolist()))

    def tensor(self, source: Source, dtype: torch.dtype | None = None) -> Tensor:
        """The values of an input; a wide output's are [B, 2C, ...]."""
        draw = source[1] if source[0] == "draw" else None
        value = _vectors(self._key, self._inputs.index(source), draw)
        if source == OUTPUT and self._inputs.wide:
            value = torch.cat([value, _variances(self._key)], dim=1)
        return value.clone()

    def values(self) -> Values:
        """The values of all inputs in the random samples."""
        return _random_values(self._key, len(self._inputs.dtypes))


_Key = tuple[tuple[int, ...], int, bool, tuple[float, ...] | None]


@lru_cache(maxsize=256)
def _vectors(key: _Key, index: int, draw: int | None) -> Tensor:
    shape, count, wide, signs = key
    value = torch.zeros(shape, dtype=torch.float64)
    size = 1.0 if signs is None else _TINY
    value[0, ..., 1 + index], value[0, ..., 1 + count + index] = size, size * SHORT
    if draw is not None and wide:
        value[0, ..., 1 + 2 * count + 2 * draw : 3 + 2 * count + 2 * draw] = 1.0
    value[1 + index, ..., 0] = torch.nan
    if signs is not None:
        value[1 + count + wide + index, ..., 0] = torch.inf
        first, base = 1 + 2 * count + wide, _SATURATED * signs[index]
        value[first : first + 1 + count] = base
        value[first + 1 + index] = base + (-_SATURATED if base < 0 else _SATURATED)
    for sample, of_sample in zip(value[-len(_SIZES) :], _SIZES, strict=True):
        sample.normal_(generator=torch.Generator().manual_seed(index)).mul_(of_sample)
    return value


@lru_cache(maxsize=64)
def _variances(key: _Key) -> Tensor:
    shape, count, _, _ = key
    value = torch.zeros(shape, dtype=torch.float64)
    value[0, ..., 1 + 2 * count :] = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(MAX_DRAWS)
    value[1 + count, ..., 0] = torch.nan
    value[-len(_SIZES) :].uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    return value


@lru_cache(maxsize=64)
def _random_values(key: _Key, kept: int) -> Values:
    _, count, wide, _ = key
    tensors = [_vectors(key, index, index - kept if index >= kept else None) for index in range(count)]
    tensors += [_variances(key)] if wide else []
    return Values.of([tensor[-len(_SIZES) :] for tensor in tensors])


class Examples(Tensors):
    """Random tensors of a shape, in the caller's dtypes and layouts."""

    dtype = None

    def __init__(self, inputs: Inputs, shape: tuple[int, ...]) -> None:
        self._inputs, self.shape = inputs, shape

    def tensor(self, source: Source, dtype: torch.dtype | None = None) -> Tensor:
        """The values of an input, always the same; `dtype` is that of a draw."""
        inputs = self._inputs
        wide = source == OUTPUT and inputs.wide
        dtype = dtype or inputs.dtypes.get(source, torch.float32)
        return _example(self.shape, inputs.index(source), dtype, inputs.orders.get(source), wide).clone()

    def values(self) -> Values:
        """The values of all inputs."""
        inputs = self._inputs
        dtypes = tuple(inputs.dtypes.get(source, torch.float32) for source in inputs.names)
        return _exact_normals(self.shape, dtypes, inputs.wide)


@lru_cache(maxsize=256)
def _example(
    shape: tuple[int, ...], index: int, dtype: torch.dtype, order: tuple[int, ...] | None, wide: bool
) -> Tensor:
    value = _normals(shape, index)
    if wide:
        value = torch.cat([value, _normals(shape, -1).clamp(-1, 1)], dim=1)
    return laid_out(value.to(dtype), order)


@lru_cache(maxsize=64)
def _exact_normals(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], wide: bool) -> Values:
    values = [_normals(shape, index).to(dtype) for index, dtype in enumerate(dtypes)]
    if wide:
        values.append(_normals(shape, -1).clamp(-1, 1).to(dtypes[1]))
    return Values.of(values)


@lru_cache(maxsize=64)
def _normals(shape: tuple[int, ...], index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index + 1)
    return torch.empty(shape, dtype=torch.float64).normal_(generator=generator)


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
