"""The same samplers by k-diffusion: DDIM is `sample_euler`, DDPM of fixed small variance `sample_euler_ancestral`.

Its state explodes: x / sqrt(alpha_bar), with sigma = sqrt((1 - alpha_bar) / alpha_bar). Guidance is that of its users'
`CFGDenoiser`, on the denoised halves, around `OpenAIDenoiser`; state and sigmas are float32 on the device. Like those
users' loops, `sample_euler` draws noise for a churn of 0 and does not use it, whether noise is given or not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.suite.cases import LoopCase, Provider, StepCase
from benchmarks.suite.foreign import full_process, load_k_diffusion

Model = Callable[[Tensor, Tensor], Tensor]


def problem(solver: str) -> str:
    """Why k-diffusion cannot run a solver here; empty if it can."""
    if load_k_diffusion() is None:
        return "k-diffusion cannot be imported"
    return "k-diffusion has no learned variances" if solver == "ddpm" else ""


def step(case: StepCase) -> Provider:
    """A sampler's run over two sigmas; raises as `loop`."""
    noise, channels = case.noise[None, : len(case.x)], case.x.shape[1]
    return _provider(case, lambda x, t: case.output[:, :channels], case.x, noise, slice(case.row, case.row + 2), 1.0)


def loop(case: LoopCase) -> Provider:
    """A sampler's run over all sigmas and 0.

    Raises:
        NotImplementedError: solver "ddpm".
        ValueError: a schedule that is no named process, re-spaced.
    """
    conditioning, channels = case.doubled(), case.start.shape[1]

    def model(x: Tensor, t: Tensor) -> Tensor:
        return case.model(x.to(case.dtype), t, **conditioning)[:, :channels]

    return _provider(case, model, case.start, case.noise, slice(None), case.clip)


def _provider(
    case: StepCase | LoopCase, model: Model, start: Tensor, noise: Tensor, levels: slice, clip: float | None
) -> Provider:
    """Runs over some noise levels, of which 0 is the last; noise [R, B, C, ...] is for these."""
    if case.solver == "ddpm":
        raise NotImplementedError(f"solver: {problem(case.solver)}")
    sampling, external = load_k_diffusion()  # type: ignore[misc]
    schedule = case.schedule
    # The model's variance channels are cut off already, as has_learned_sigmas would.
    denoiser = external.OpenAIDenoiser(model, full_process(schedule), True, False, start.device)
    timesteps = torch.from_numpy(schedule.timestep_map[::-1].copy()).to(start.device)
    sigmas = sampling.append_zero(denoiser.sigmas[timesteps])
    if not torch.equal(denoiser.sigma_to_t(sigmas[:-1]), timesteps):
        raise ValueError(f"schedule: got timesteps {schedule.timestep_map}, of which k-diffusion's sigmas give others")
    sigmas, scales = sigmas[levels], np.append(schedule.sqrt_alphas_cumprod[::-1], 1.0)[levels]
    begin = start / scales[0]

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        cond, uncond = denoiser(torch.cat([x] * 2), torch.cat([sigma] * 2)).chunk(2)
        denoised = uncond + (cond - uncond) * case.scale
        return denoised if clip is None else denoised.clamp(-clip, clip)

    def run(draw: bool) -> Tensor:
        sample, extra, rows = sampling.sample_euler, {}, iter(noise)
        if case.solver == "ddpm-fixed":
            sample = sampling.sample_euler_ancestral
            extra = {} if draw else {"noise_sampler": lambda sigma, sigma_next: next(rows)}
        return sample(guided, begin, sigmas, disable=True, **extra)

    return Provider.returning(run, lambda x: x * scales[-1])
