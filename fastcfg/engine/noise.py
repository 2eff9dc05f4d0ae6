"""Where a run's noise comes from: the step's own generator, torch, or a recording."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import initial_noise
from ..reference.philox import sample_seeds
from ..table import StepTable
from .config import SamplerConfig

Recording = Tensor | Callable[[int, tuple[int, ...]], Tensor]


@dataclass(frozen=True, eq=False)
class NoiseSource:
    """How to start a run and what to draw before each row.

    Attributes:
        start: () -> the starting noise, standard normal [B, C, ...].
        fill: (row, buffer) writes a row's noise to the buffer; None where the step draws it itself.
        seeds: int64 [B], the samples' seeds where the step draws; else None.
        always: whether fill is called (with None for the buffer) even where the solver adds no noise, so that a
            generator moves as the original moves it.
    """

    start: Callable[[], Tensor]
    fill: Callable[[int, Any], object] | None = None
    seeds: Tensor | None = None
    always: bool = False


def make_source(
    config: SamplerConfig,
    table: StepTable,
    shape: tuple[int, ...],
    noise: Recording | NoiseSource | None,
    seed: int | Sequence[int] | None,
    generator: torch.Generator | None,
    x_T: Tensor | None,
) -> NoiseSource:
    """The source of a call's noise; arguments as `Sampler.sample`, checked."""
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator: got {type(generator).__name__}, expected a torch.Generator or None")
    if generator is not None and seed is not None:
        raise ValueError(f"generator: got one beside seed={seed!r}, expected one of the two")
    if isinstance(noise, NoiseSource):
        return noise
    device: Any = config.device
    if x_T is not None and (noise is not None or not table.uses_noise):
        # Nothing is random: torch's generator must not move for a seed that is not used.
        source = NoiseSource(lambda: x_T)
    elif config.noise_source == "torch":
        source = torch_source(seed, shape, device, generator=generator)
    else:
        source = philox_source(seed, shape, device, config.backend, generator)
    return source if noise is None else recorded_source(noise, table.num_rows, shape, source.start)


def philox_source(
    seed: int | Sequence[int] | None,
    shape: tuple[int, ...],
    device: torch.device,
    backend: str,
    generator: torch.Generator | None = None,
) -> NoiseSource:
    """Noise that depends on each sample's seed alone (`fastcfg.reference.philox`). Without a seed, one is drawn from
    the generator, or from torch's global one."""
    if seed is None:
        where = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=where).item())
    seeds = sample_seeds(_integers(seed), shape[0]).to(device)
    return NoiseSource(lambda: initial_noise(torch.empty(shape, device=device), seeds, backend), seeds=seeds)


def torch_source(
    seed: int | Sequence[int] | None,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    generator: torch.Generator | None = None,
    drawn: int | None = None,
    dtype: torch.dtype = torch.float32,
    every_row: bool = False,
) -> NoiseSource:
    """`torch.randn` on the device: the start [B, C, ...], then one draw per row.

    Args:
        seed: one integer for the whole batch; None draws from `generator`, or from torch's global one.
        drawn: samples drawn each time, of which the first B are used: guided-diffusion's and GLIDE's loops draw for a
            doubled batch. The generator is left as if all had been drawn.
        dtype: of the steps' draws. The start is float32, as in the originals.
        every_row: draw also where the solver adds no noise, as the originals do.

    Raises:
        ValueError: several seeds, or a generator on another device.
    """
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator: got one on {generator.device}, expected one on {device}")
    generator = generator if seed is None else seeded_generator(seed, device)
    whole = (drawn or shape[0], *shape[1:])
    if whole == shape and not every_row:
        fill: Callable[[int, Any], object] = partial(_draw, generator)
    elif device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        threads = properties.max_threads_per_multi_processor
        skip = cuda_normal_offset(math.prod(whole), properties.multi_processor_count, threads)
        torch.cuda.init()  # makes the default generators
        default = torch.cuda.default_generators[device.index or 0]
        fill = partial(_fill_and_skip, skip=skip, generator=generator or default)
    else:
        fill = partial(_fill_from, torch.empty(whole, dtype=dtype, device=device), generator)
    start = partial(torch.randn, whole, generator=generator, device=device)
    return NoiseSource(lambda: start()[: shape[0]], fill, always=every_row)


def seeded_generator(seed: int | Sequence[int], device: torch.device) -> torch.Generator:
    """torch's generator on a device for one seed; ValueError for several."""
    value = _integers(seed)
    if isinstance(value, list):
        raise ValueError(f"seed: got {value!r}, expected one integer for the whole batch with noise_source='torch'")
    return torch.Generator(device).manual_seed(value)


def _draw(generator: torch.Generator | None, row: int, buffer: Tensor) -> None:
    buffer.normal_(generator=generator)


def _fill_from(scratch: Tensor, generator: torch.Generator | None, row: int, buffer: Tensor | None) -> None:
    """Draw all of the scratch; the buffer takes its first samples."""
    scratch.normal_(generator=generator)
    if buffer is not None:
        buffer.copy_(scratch[: len(buffer)])


def _fill_and_skip(row: int, buffer: Tensor | None, *, skip: int, generator: torch.Generator) -> None:
    """Draw the buffer, the beginning of a larger draw, and leave the generator where the larger draw would."""
    offset = generator.get_offset()
    if buffer is not None:
        buffer.normal_(generator=generator)
    generator.set_offset(offset + skip)


def cuda_normal_offset(numel: int, multiprocessors: int, threads: int = 2048) -> int:
    """How far `torch.randn` of `numel` float32 values moves a CUDA generator's offset, on a GPU of so many
    multiprocessors with `threads` each.

    torch (`aten/src/ATen/native/cuda/DistributionTemplates.h`) runs 256 threads a block, as many blocks as the elements
    need and fit on the GPU at once; a thread draws four values each time, and advances by four. Element i is the value
    that thread i draws first wherever the elements do not outnumber the threads, and else depends on a full grid:
    either way a larger draw begins with the elements of a smaller one.
    """
    grid = min(-(-numel // 256), multiprocessors * (threads // 256))
    return ((numel - 1) // (256 * grid * 4) + 1) * 4


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
