"""The native kernels that work on a run's buffers between its rows. Nothing is checked. `instructions` is one of
`instruction_sets`, by default the widest."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ..reference.philox import STEP_STREAM
from ..state_change import KnownBuffers, StateSpec
from ..step import StepBuffers
from .extension import native_module
from .native import LARGE, set_number, threads_for
from .native_pieces import address

# The bits of an exponent.
EXPONENTS = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}


def native_finite_check(
    output: Tensor, x: Tensor, counter: Tensor, sources: Tensor, record: Tensor, every: int
) -> None:
    """What `ReferenceFiniteCheck` does, for a dense output and state in dtypes of `EXPONENTS`."""
    branches, batch = len(sources) - 1, len(x)
    addresses = map(address, (output, x, counter, sources, record))
    sizes = output.numel() // len(output), x.numel() // batch
    exponents = EXPONENTS[output.dtype], EXPONENTS[x.dtype]
    native_module().finite_check(struct.pack("=10q2i", *addresses, branches, batch, every, *sizes, *exponents))


def native_noise_sums(
    output: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    counter: Tensor,
    sums: Tensor,
    channels: int,
    conditional: int,
    learned: bool,
    instructions: str | None = None,
) -> None:
    """Write a row of `sums`, float64 [R, 2, B, 1], as `ReferenceNoiseSums` does, added in another order. Noise is
    float32, contiguous [B, C, ...], or None to draw it from `seeds`."""
    batch, stride = sums.shape[2], output[0].numel()
    size = output[0, 0].numel() * channels
    variance = None
    if learned:
        variance = output[conditional * batch : (conditional + 1) * batch, channels:]
        if variance.dtype != torch.float32 or not output.is_contiguous():
            variance, stride = variance.float().contiguous(), size
    addresses = map(address, (noise, variance, seeds, counter, sums))
    packed = struct.pack("=9q", *addresses, batch, size, stride, STEP_STREAM)
    native_module().noise_sums(set_number(instructions), threads_for(batch * size >= LARGE), packed)


def has_native_state_change(buffers: StepBuffers) -> bool:
    """Whether the native kernel changes this run's state; the reference changes others, with the same bits."""
    model_input, time = buffers.model_input, buffers.time
    if model_input is None or time is None or time.dtype not in (torch.int64, torch.float32):
        return False
    return buffers.x.dtype == model_input.dtype == torch.float32 and model_input.is_contiguous()


def native_state_change(
    new: Tensor, spec: StateSpec, buffers: StepBuffers, known: KnownBuffers | None, instructions: str | None = None
) -> None:
    """What `ReferenceStateChange` does, for what `has_native_state_change`."""
    x, model_input, time = buffers.x, buffers.model_input, buffers.time
    run = map(address, (new, x, model_input, buffers.table, buffers.counter, buffers.seeds, time))
    pixels: tuple[Tensor | None, ...] = (None,) * 5
    if known is not None:
        pixels = known.image, known.hold, known.rows, known.noise, known.renoise
    options = spec.before, spec.known, spec.hard, spec.noise, spec.renoise
    slots = len(model_input) // len(x)  # type: ignore[arg-type]
    sizes = len(x), x.numel() // len(x), slots, time.dtype == torch.int64  # type: ignore[union-attr]
    packed = struct.pack("=21q", *run, *map(address, pixels), *options, *sizes)
    native_module().state_change(set_number(instructions), threads_for(x.numel() >= LARGE), packed)
