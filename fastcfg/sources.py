"""Where a run's noise comes from: the step's own generator, torch, or a recording."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .noise import sample_seeds
from .ops import initial_noise

__all__ = ["NoiseSource", "philox_source", "recorded_source", "torch_source"]

Recording = Tensor | Callable[[int, tuple[int, ...]], Tensor]


@dataclass(frozen=True, eq=False)
class NoiseSource:
    """How to start and what to draw before each row.

    Attributes:
        start: the starting noise, standard normal [B, C, ...].
        fill: writes a row's noise to a buffer, fill(row, buffer); None where the step draws it itself.
        seeds: int64 [B], the samples' seeds where the step draws; else None.
        always: whether fill is called (with None for the buffer) where the solver adds no noise: a generator may have
            to move all the same.
    """

    start: Callable[[], Tensor]
    fill: Callable[[int, Any], object] | None = None
    seeds: Tensor | None = None
    always: bool = False


def philox_source(
    seed: int | Sequence[int] | None, shape: tuple[int, ...], device: torch.device, backend: str
) -> NoiseSource:
    """Noise that depends on each sample's seed alone (`fastcfg.noise`); without a seed, one is taken from torch's
    global generator."""
    if seed is None:
        seed = int(torch.randint(2**62, ()).item())
    seeds = sample_seeds(_integers(seed), shape[0]).to(device)
    return NoiseSource(lambda: initial_noise(torch.empty(shape, device=device), seeds, backend), seeds=seeds)


def torch_source(seed: int | Sequence[int] | None, shape: tuple[int, ...], device: torch.device) -> NoiseSource:
    """`torch.randn` on the device: the start, then one draw per row, from the global generator where no seed is
    given."""
    seed = None if seed is None else _integers(seed)
    if isinstance(seed, list):
        raise ValueError(f"seed: got {seed!r}, expected one integer for the whole batch with noise='torch'")
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    return NoiseSource(
        lambda: torch.randn(shape, generator=generator, device=device),
        lambda row, buffer: buffer.normal_(generator=generator),
    )


def recorded_source(noise: Recording, rows: int, shape: tuple[int, ...], start: Callable[[], Tensor]) -> NoiseSource:
    """Given normals: a tensor [R, B, C, ...], or a function (row, shape) -> tensor."""
    if isinstance(noise, Tensor):
        if tuple(noise.shape) != (rows, *shape):
            raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected {(rows, *shape)}")
        return NoiseSource(start, lambda row, buffer: buffer.copy_(noise[row]))
    if not callable(noise):
        raise TypeError(f"noise: got {type(noise).__name__}, expected a tensor or a function (row, shape) -> tensor")

    def fill(row: int, buffer: Tensor) -> None:
        drawn = noise(row, shape)
        if tuple(drawn.shape) != shape:
            raise ValueError(f"noise({row}): got shape {tuple(drawn.shape)}, expected {shape}")
        buffer.copy_(drawn)

    return NoiseSource(start, fill)


def _integers(seed: Any) -> int | list[int]:
    """One seed or several, of whatever integer type."""
    values = seed.tolist() if isinstance(seed, Tensor | np.ndarray) else seed
    try:
        return [index(value) for value in values] if isinstance(values, Iterable) else index(values)
    except TypeError:
        raise TypeError(f"seed: got {seed!r}, expected an integer or a sequence of integers") from None
