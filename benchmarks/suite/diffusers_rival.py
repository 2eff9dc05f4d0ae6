"""What a stock pipeline of diffusers does at every step beside and around the model.

As in its denoising loops: the batch is doubled, the model called, guidance is `uncond + scale * (cond - uncond)`, and
the scheduler makes the step. Learned variances are treated as in IFPipeline: split off, and the conditional half's put
back. Latents are of the model's dtype. The conditional half comes first, as everywhere here; the work is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.suite.cases import LoopCase, Provider, StepCase
from benchmarks.suite.foreign import full_process, load_diffusers


def problem() -> str:
    """Why diffusers cannot take part here; empty if it can."""
    return "" if load_diffusers() else "diffusers is not installed"


def step(case: StepCase) -> Provider:
    """One `scheduler.step` and what is around it; ValueError as `loop`."""
    row, noise = slice(case.row, case.row + 1), case.noise[None, : len(case.x)]
    return _provider(case, lambda x, t: case.output, case.x, noise, case.output.dtype, row, 1.0)


def loop(case: LoopCase) -> Provider:
    """The denoising loop.

    Raises:
        ValueError: a schedule that is no named process at diffusers' "leading" timesteps: 0, and on at a stride.
    """
    conditioning = case.doubled()

    def model(x: Tensor, t: Tensor) -> Tensor:
        return case.model(x, t.expand(len(x)), **conditioning)

    return _provider(case, model, case.start, case.noise, case.dtype, slice(None), case.clip)


def _provider(
    case: StepCase | LoopCase,
    model: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    noise: Tensor,
    dtype: torch.dtype,
    rows: slice,
    clip: float | None,
) -> Provider:
    """Runs some rows; noise [R, B, C, ...] is for these."""
    scheduler = _scheduler(case, start.device, clip)
    timesteps, given = scheduler.timesteps[rows], noise.to(dtype)
    # guided-diffusion's DDIM takes epsilon from the clipped x0.
    extra = {"eta": 0.0, "use_clipped_model_output": True} if case.solver == "ddim" else {}
    module: Any = import_module(type(scheduler).__module__)
    randn_tensor, begin = module.randn_tensor, start.to(dtype)

    @torch.no_grad()
    def denoise() -> Tensor:
        latents = begin
        for t in timesteps:
            model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            noise_pred = _guided(model(model_input, t), latents.shape[1], case.scale, case.solver == "ddpm")
            latents = scheduler.step(noise_pred, t, latents, **extra).prev_sample
        return latents

    def run(draw: bool) -> Tensor:
        if not draw:
            left = iter(given)
            module.randn_tensor = lambda *_, **__: next(left)
        try:
            return denoise()
        finally:
            module.randn_tensor = randn_tensor

    return Provider.returning(run)


def _scheduler(case: StepCase | LoopCase, device: torch.device, clip: float | None) -> Any:
    diffusers: Any = load_diffusers()
    full = full_process(case.schedule)
    common = {"num_train_timesteps": full.num_timesteps, "trained_betas": full.betas, "timestep_spacing": "leading"}
    common |= {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    if case.solver == "ddim":
        scheduler = diffusers.DDIMScheduler(**common, set_alpha_to_one=True)
    else:
        variance = "learned_range" if case.solver == "ddpm" else "fixed_small"
        scheduler = diffusers.DDPMScheduler(**common, variance_type=variance)
    scheduler.set_timesteps(case.schedule.num_timesteps, device=device)
    leading = scheduler.timesteps.cpu().numpy()[::-1]
    if not np.array_equal(leading, case.schedule.timestep_map):
        raise ValueError(f"schedule: got timesteps {case.schedule.timestep_map}, expected {leading}")
    return scheduler


def _guided(output: Tensor, channels: int, scale: float, learned: bool) -> Tensor:
    """[2B, C or 2C, ...] to [B, C, ...], or to [B, 2C, ...] for a scheduler that wants the variance."""
    cond, uncond = output.chunk(2)
    if output.shape[1] == channels:
        return uncond + scale * (cond - uncond)
    uncond, _ = uncond.split(channels, dim=1)
    cond, variance = cond.split(channels, dim=1)
    noise_pred = uncond + scale * (cond - uncond)
    return torch.cat([noise_pred, variance], dim=1) if learned else noise_pred
