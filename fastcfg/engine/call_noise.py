"""Which source a call's noise comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..table import StepTable
from .config import SamplerConfig
from .noise import (
    Generators,
    NoiseSource,
    Recording,
    brownian_source,
    philox_source,
    recorded_source,
    torch_source,
)
from .run_state import RunState
from .span import Span


def make_source(
    config: SamplerConfig,
    span: Span,
    shape: tuple[int, ...],
    noise: Recording | NoiseSource | None,
    seed: int | Sequence[int] | None,
    generator: Generators | None,
    draws: bool = False,
) -> NoiseSource:
    """The source of a call's noise; arguments as `Sampler.sample`, checked, and whether a state_fn draws from it."""
    table, state, generator = span.table, span.state, checked_generators(generator, shape[0])
    if generator is not None and seed is not None:
        raise ValueError(f"generator: got one beside seed={seed!r}, expected one of the two")
    if state is not None and (generator is not None or seed is not None):
        raise ValueError("state: got one beside a seed or generator, expected it alone: it has those of its run")
    if state is not None and noise is not None and state.noise not in ("recorded", "none"):
        raise ValueError(f"noise: got some beside a state with {state.noise} noise, expected None: it has its run's")
    if state is not None and state.x.dtype != config.state_dtype:
        raise ValueError(f"state: got {state.x.dtype}, expected {config.state_dtype}, the sampler's state_dtype")
    if isinstance(noise, NoiseSource):
        return noise
    device: Any = config.device
    if span.x is not None and (noise is not None or not (table.uses_noise or draws)):
        # Nothing is random: torch's generator must not move for a seed that is not used.
        source = NoiseSource(lambda: span.x)  # type: ignore[arg-type,return-value]
    elif state is not None:
        source = _resumed_source(config, state, table, shape)
    elif config.noise_source == "torch":
        source = torch_source(seed, shape, device, generator=generator)
    elif config.noise_source == "brownian":
        source = brownian_source(seed, table, shape, device, config.backend, generator)
    else:
        source = philox_source(seed, shape, device, config.backend, generator)
    return source if noise is None else recorded_source(noise, table.num_rows, shape, source.start)


def _resumed_source(config: SamplerConfig, state: RunState, table: StepTable, shape: tuple[int, ...]) -> NoiseSource:
    """The noise of a run's later rows."""
    device: Any = config.device
    if state.noise == "none":  # no row added any; a state_fn of this part alone draws
        if state.seeds is None:
            expected = "one with seeds, or normals given to the state_fn: it draws from seeds"
            raise ValueError(f"state: got one of a run without seeds, expected {expected}")
        return philox_source(state.seeds.tolist(), shape, device, config.backend)
    if state.noise != config.noise_source:
        expected = "noise=, as recorded for the whole run" if state.noise == "recorded" else f"{state.noise!r}"
        raise ValueError(f"state: got noise_source {config.noise_source!r}, expected {expected}: the run's noise")
    if state.seeds is not None:
        seeds = state.seeds.tolist()
        if state.noise == "brownian":
            return brownian_source(seeds, table, shape, device, config.backend)
        return philox_source(seeds, shape, device, config.backend)
    generators = []
    for saved in state.generators.cpu():  # type: ignore[union-attr]
        generators.append(torch.Generator(device))
        try:
            generators[-1].set_state(saved.clone())
        except RuntimeError as error:
            raise ValueError(f"state: got one of a generator on another device than {device} ({error})") from error
    return torch_source(None, shape, device, generator=generators if len(generators) > 1 else generators[0])


def checked_generators(generator: Any, batch: int) -> torch.Generator | list[torch.Generator] | None:
    """One generator, or a list with one for each sample."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, Sequence) or not all(isinstance(one, torch.Generator) for one in generator):
        raise TypeError(
            f"generator: got {type(generator).__name__}, expected a torch.Generator, a list of them or None"
        )
    if len(generator) != batch:
        raise ValueError(f"generator: got {len(generator)} generators, expected one, or one per sample ({batch})")
    return list(generator)
