"""Loops that begin from an image and skip the first steps, as in forks of guided-diffusion."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ...engine.noise import philox_source
from ...utils.checks import check_count
from .loops import LoopCall


def begins_from_image(call: LoopCall) -> bool:
    """Whether a call skips steps, or has an image."""
    return bool(call.skip_timesteps) or call.init_image is not None


def from_image(call: LoopCall, num_timesteps: int, q_sample: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LoopCall:
    """The call whose `noise` is the image, noised as the first step that is not skipped has it, and which begins there.
    Skipped steps without an image begin from zeros."""
    skipped = check_count("skip_timesteps", call.skip_timesteps, num_timesteps - 1, least=0)
    image = call.init_image
    shape = tuple(call.shape)
    if image is not None and tuple(image.shape) != shape:
        raise ValueError(f"init_image: got shape {tuple(image.shape)}, expected {shape}")
    noise = _start(call) if call.noise is None else call.noise
    t = torch.full(shape[:1], num_timesteps - 1 - skipped, device=call.device)
    begun = copy.copy(call)
    begun.noise = q_sample(torch.zeros_like(noise) if image is None else image, t, noise)
    begun.first, begun.skip_timesteps, begun.init_image = skipped, 0, None
    # Both draw from one generator.
    begun.generator = call.generator
    return begun


def _start(call: LoopCall) -> Tensor:
    """The starting noise, of the call's shape."""
    if call.noise_source != "philox":
        return torch.randn(tuple(call.shape), generator=call.generator, device=call.device)
    pairs = 1 if call.guidance is None else 2
    shape = (call.shape[0] // pairs, *call.shape[1:])
    return torch.cat([philox_source(call.seed, shape, call.device, call.backend).start()] * pairs)
