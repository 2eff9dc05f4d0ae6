"""Samples whose channels are not their second dimension, as videos [B, F, C, ...]: the engine takes [B * F, C, ...]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ...engine.model_output import output_tensor


def leading_dims(x: Tensor, output: Tensor) -> int:
    """How many dimensions after the first come before the channels, of which a model's output has twice as many; 0
    where the channels are the second dimension, or there are as many."""
    if output.ndim != x.ndim:
        return 0
    differing = [dim for dim in range(x.ndim) if output.shape[dim] != x.shape[dim]]
    twice = len(differing) == 1 and output.shape[differing[0]] == 2 * x.shape[differing[0]]
    return differing[0] - 1 if twice and differing[0] > 1 else 0


def folded(x: Tensor, dims: int) -> Tensor:
    """A tensor with some dimensions after the first made part of it."""
    return x.flatten(0, dims) if dims else x


def folded_model(model: Callable[..., Any], leading: tuple[int, ...]) -> Callable[..., Tensor]:
    """A model of folded samples, whose unfolded ones begin with some dimensions. Equal for the same model."""
    return partial(_call, model, leading)


def _call(model: Callable[..., Any], leading: tuple[int, ...], x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
    times = t.view(leading[0], -1)[:, 0]
    output = output_tensor(model(x.view(*leading, *x.shape[1:]), times, **kwargs))
    return output.flatten(0, len(leading) - 1)


def unfolded_steps(steps: Iterator[dict[str, Tensor]], shape: tuple[int, ...], dims: int) -> Iterator[Any]:
    """Steps of unfolded samples; edits of these are heard."""
    for out in steps:
        told = {name: value.view(shape) for name, value in out.items()}
        yield told
        out["sample"] = folded(told["sample"], dims)


def folded_result(result: Mapping[str, Tensor], dims: int) -> dict[str, Tensor]:
    """What a step returned, folded."""
    return {name: folded(value, dims) for name, value in result.items()}
