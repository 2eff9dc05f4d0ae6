"""The tensors that a step is run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..probe import Array
from .parts import OUTPUT, SAMPLE, Source, UntraceableError, is_plain

__all__ = ["MAX_DRAWS", "RANDOM", "SHORT", "BasisVectors", "Examples", "Inputs", "Saturated", "Tensors"]

MAX_DRAWS = 4
RANDOM = 4  # positions of basis vectors with random inputs
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
    refused: dict[str, str] = field(default_factory=dict)

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
        inputs = cls({SAMPLE: sample.dtype, OUTPUT: output.dtype}, shape, wide)
        for name, value in vars(scheduler).items():
            if name != CONFIG and not name.startswith(OURS):
                try:
                    inputs.dtypes |= inputs._kept(value, ("state", name))
                except UntraceableError as error:
                    inputs.refused[name] = f"its attribute {name} {error}"
        for name, value in options.items():
            if isinstance(value, Tensor) and value.ndim > 1:
                inputs.dtypes |= inputs._kept(value, ("option", name))
        return inputs

    def _kept(self, value: Any, source: Source) -> dict[Source, torch.dtype]:
        """The tensors like the sample in a value."""
        if isinstance(value, Tensor):
            if value.ndim < 2:
                return {}
            if tuple(value.shape) != self.shape:
                raise UntraceableError(f"has shape {tuple(value.shape)}, the sample {self.shape}")
            if not value.is_floating_point() or (value.requires_grad and torch.is_grad_enabled()):
                raise UntraceableError(f"is a tensor of {value.dtype}, or needs gradients")
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

    @property
    def names(self) -> list[Source]:
        """All inputs, the draws last."""
        return [*self.dtypes, *(("draw", number) for number in range(MAX_DRAWS))]

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
    wide output, each draw again where the variance channels are -1 and 1, not 0; last random positions."""

    dtype = torch.float64

    def __init__(self, inputs: Inputs) -> None:
        self._inputs, names = inputs, inputs.names
        self._wide = 2 * MAX_DRAWS if inputs.wide else 0
        self.shape = inputs.example_shape(1, 1 + 2 * len(names) + self._wide + RANDOM)

    def tensor(self, source: Source, dtype: torch.dtype | None = None) -> Tensor:
        """The values of an input; a wide output's are [1, 2C, ...]."""
        names = self._inputs.names
        index, count = names.index(source), len(names)
        value = torch.zeros(self.shape, dtype=torch.float64)
        value[..., 1 + index], value[..., 1 + count + index] = 1.0, SHORT
        if source[0] == "draw" and self._wide:
            value[..., 1 + 2 * count + 2 * source[1] + torch.tensor([0, 1])] = 1.0
        generator = torch.Generator().manual_seed(index)
        value[..., -RANDOM:].normal_(generator=generator)
        if source != OUTPUT or not self._inputs.wide:
            return value
        variance = torch.zeros_like(value)
        variance[..., 1 + 2 * count : 1 + 2 * count + self._wide] = torch.tensor([-1.0, 1.0]).repeat(MAX_DRAWS)
        variance[..., -RANDOM:].uniform_(-1, 1, generator=generator)
        return torch.cat([value, variance], dim=1)


class Examples(Tensors):
    """Random tensors of a shape, float64 of a size if that is given, else of the caller's dtypes."""

    def __init__(self, inputs: Inputs, shape: tuple[int, ...], size: float | None = None) -> None:
        self._inputs, self._size = inputs, 1.0 if size is None else size
        self.dtype = None if size is None else torch.float64
        self.shape = shape

    def tensor(self, source: Source, dtype: torch.dtype | None = None) -> Tensor:
        """The values of an input, always the same; `dtype` is that of a draw."""
        inputs, wide = self._inputs, source == OUTPUT and self._inputs.wide
        generator = torch.Generator().manual_seed(inputs.names.index(source))
        batch, channels, *rest = self.shape
        value = torch.empty(batch, channels * (1 + wide), *rest, dtype=torch.float64).normal_(generator=generator)
        value *= self._size
        if wide:
            value[:, channels:].clamp_(-1, 1)
        return value.to(self.dtype or dtype or inputs.dtypes.get(source, torch.float32))

    def exact(self, source: Source) -> Tensor:
        """The values of an input as float64."""
        return self.tensor(source).double()


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
        index = self._inputs.names.index(source)
        value = torch.full(self.shape, self.base[index], dtype=torch.float64)
        value[..., 1 + index] += self.added[index]
        return torch.cat([value, 0 * value], dim=1) if source == OUTPUT and self._inputs.wide else value
