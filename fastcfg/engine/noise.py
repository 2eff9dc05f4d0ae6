"""Where a run's noise comes from: the step's own generator, torch, or a recording."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import brownian_noise, initial_noise
from ..reference.brownian import brownian_terms
from ..reference.philox import sample_seeds
from ..table import StepTable
from ..utils.checks import check_seed

Recording = Tensor | Callable[[int, tuple[int, ...]], Tensor]
Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True, eq=False)
class NoiseSource:
    """How to start a run and what to draw before each row.

    Attributes:
        start: () -> the starting noise, standard normal [B, C, ...].
        fill: (row, buffer) writes a row's noise to the buffer; None where the step draws it itself.
        seeds: int64 [B], the samples' seeds where the step draws; else None.
        always: whether fill is called (with None for the buffer) even where the solver adds no noise, so that a
            generator moves as the original moves it.
        kind: what the noise is, as `RunState.noise`.
        generators: torch's generators that it is drawn from, None being torch's global one.
    """

    start: Callable[[], Tensor]
    fill: Callable[[int, Any], object] | None = None
    seeds: Tensor | None = None
    always: bool = False
    kind: str = "recorded"
    generators: tuple[torch.Generator | None, ...] = ()

    def generator_states(self, device: torch.device) -> Tensor | None:
        """uint8 [G, bytes]: where the generators are now, on the CPU; None if there are none."""
        states = [global_state(device) if one is None else one.get_state() for one in self.generators]
        return torch.stack(states) if states else None


def philox_source(
    seed: int | Sequence[int] | None,
    shape: tuple[int, ...],
    device: torch.device,
    backend: str,
    generator: Generators | None = None,
) -> NoiseSource:
    """Noise that depends on each sample's seed alone (`fastcfg.reference.philox`). Without a seed, one is drawn from
    the generator, or from torch's global one; of a list of generators, each sample's from its own."""
    if seed is None:
        seed = [drawn_seed(one) for one in generator] if isinstance(generator, Sequence) else drawn_seed(generator)
    seeds = sample_seeds(_integers(seed), shape[0]).to(device)

    def start() -> Tensor:
        return initial_noise(torch.empty(shape, device=device), seeds, backend)

    return NoiseSource(start, seeds=seeds, kind="philox")


def brownian_source(
    seed: int | Sequence[int] | None,
    table: StepTable,
    shape: tuple[int, ...],
    device: torch.device,
    backend: str,
    generator: Generators | None = None,
) -> NoiseSource:
    """Start and seeds of `philox_source`; the noise of rows is that of `fastcfg.reference.brownian`, between the levels
    of the table. ValueError for a table that it does not fit."""
    source = philox_source(seed, shape, device, backend, generator)
    if not table.uses_noise:
        return replace(source, kind="brownian")  # the seeds may serve a state_fn
    nodes, factors, counts = brownian_terms(table)
    # On the device beforehand: a row takes no copy.
    by_row = (torch.from_numpy(values).to(device).unbind() for values in (nodes, factors))
    rows = list(zip(*by_row, counts, strict=True))

    def fill(row: int, buffer: Tensor) -> None:
        if rows[row][2]:
            narrow = buffer if buffer.dtype == torch.float32 else torch.empty_like(buffer, dtype=torch.float32)
            nodes, factors, terms = rows[row]
            brownian_noise(narrow, source.seeds, nodes, factors, terms, backend)  # type: ignore[arg-type]
            if narrow is not buffer:
                buffer.copy_(narrow)

    return replace(source, fill=fill, kind="brownian")


def drawn_seed(generator: torch.Generator | None) -> int:
    """A seed from a generator, or from torch's global one."""
    where = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=where).item())


def torch_source(
    seed: int | Sequence[int] | None,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    generator: Generators | None = None,
    drawn: int | None = None,
    dtype: torch.dtype = torch.float32,
    every_row: bool = False,
) -> NoiseSource:
    """`torch.randn` on the device: the start [B, C, ...], then one draw per row.

    Args:
        seed: one integer for the whole batch, or one for each sample; None draws from `generator`, or from torch's
            global one.
        generator: one, or one for each sample, which is then drawn as if it were alone (as diffusers' are).
        drawn: samples drawn each time, of which the first B are used: guided-diffusion's and GLIDE's loops draw for a
            doubled batch. The generator is left as if all had been drawn.
        dtype: of the steps' draws. The start is float32, as in the originals.
        every_row: draw also where the solver adds no noise, as the originals do.

    Raises:
        ValueError: seeds or generators that do not fit the batch, or a generator on another device.
    """
    if isinstance(seeds := None if seed is None else _integers(seed), list):
        generator = [seeded_generator(one, device) for one in sample_seeds(seeds, shape[0]).tolist()]
    elif seeds is not None:
        generator = seeded_generator(seeds, device)
    for one in generator if isinstance(generator, Sequence) else [generator]:
        if one is not None and one.device.type != device.type:
            raise ValueError(f"generator: got one on {one.device}, expected one on {device}")
    if isinstance(generator, Sequence):
        return _source_by_sample(generator, shape, device)
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
        fill = partial(fill_from, torch.empty(whole, dtype=dtype, device=device), generator)
    start = partial(torch.randn, whole, generator=generator, device=device)
    return NoiseSource(lambda: start()[: shape[0]], fill, always=every_row, kind="torch", generators=(generator,))


def _source_by_sample(
    generators: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device
) -> NoiseSource:
    """torch's noise, each sample's from a generator of its own."""

    def start() -> Tensor:
        return torch.cat([torch.randn((1, *shape[1:]), generator=one, device=device) for one in generators])

    def fill(row: int, buffer: Tensor) -> None:
        for sample, generator in zip(buffer.unbind(), generators, strict=True):
            sample.normal_(generator=generator)

    return NoiseSource(start, fill, kind="torch", generators=tuple(generators))


def seeded_generator(seed: int | Sequence[int], device: torch.device) -> torch.Generator:
    """torch's generator on a device for one seed; ValueError for several, or one beyond 64 bits."""
    value = _integers(seed)
    if isinstance(value, list):
        raise ValueError(f"seed: got {value!r}, expected one integer")
    return torch.Generator(device).manual_seed(check_seed(value))


def global_state(device: torch.device) -> Tensor:
    """Where torch's global generator of a device is."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _draw(generator: torch.Generator | None, row: int, buffer: Tensor) -> None:
    buffer.normal_(generator=generator)


def fill_from(scratch: Tensor, generator: torch.Generator | None, row: int, buffer: Tensor | None) -> None:
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
