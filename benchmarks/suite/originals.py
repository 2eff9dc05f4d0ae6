"""One step and the loop of guided-diffusion's and GLIDE's samplers as those do it, everything but the network.

`fastcfg.reference.originals` has the originals' arithmetic but leaner look-ups. Here they are the originals' own: a
whole float64 table is taken from numpy to the device, indexed, and rounded, at every use; guided-diffusion expands the
result, GLIDE adds it to a full tensor of zeros. Look-ups whose results are thrown away are made, as theirs are.

Guidance is the function of GLIDE's notebooks, which doubles the batch; the samplers keep the doubled batch as their
state. Their networks return float32 whatever they compute in. Where the originals themselves can be imported,
`upstream` runs those.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.suite.cases import LoopCase, Provider, StepCase
from benchmarks.suite.foreign import full_process
from fastcfg import Schedule

STYLES = ("guided-diffusion", "GLIDE")


class Original:
    """A process whose steps are the originals', operation for operation.

    Args:
        schedule: the respaced process.
        style: whose look-ups: "guided-diffusion" or "GLIDE".
        learned: learned-range variances, else fixed small ones.
        clip: whether x0 is clipped to [-1, 1].
    """

    def __init__(self, schedule: Schedule, style: str, learned: bool = True, clip: bool = True) -> None:
        if style not in STYLES:
            raise ValueError(f"style: got {style!r}, expected one of {', '.join(STYLES)}")
        self._schedule, self._style, self._learned, self._clip = schedule, style, learned, clip
        self._timestep_map = schedule.timestep_map.tolist()

    def p_sample(self, model: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
        """x_{t-1} of DDPM; `noise` None draws it."""
        p = self._p_mean_variance(model, x, t)
        noise = torch.randn_like(x) if noise is None else noise
        not_last = (t != 0).float().view(-1, *[1] * (x.ndim - 1))
        return p["mean"] + not_last * torch.exp(0.5 * p["log_variance"]) * noise

    def ddim_sample(
        self, model: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, noise: Tensor | None, eta: float = 0.0
    ) -> Tensor:
        """x_{t-1} of DDIM; noise is drawn even for eta = 0."""
        p = self._p_mean_variance(model, x, t)
        schedule = self._schedule
        eps = (self._look_up(schedule.sqrt_recip_alphas_cumprod, t, x) * x - p["pred_xstart"]) / self._look_up(
            schedule.sqrt_recipm1_alphas_cumprod, t, x
        )
        alpha_bar = self._look_up(schedule.alphas_cumprod, t, x)
        alpha_bar_prev = self._look_up(schedule.alphas_cumprod_prev, t, x)
        sigma = eta * torch.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * torch.sqrt(1 - alpha_bar / alpha_bar_prev)
        noise = torch.randn_like(x) if noise is None else noise
        mean = p["pred_xstart"] * torch.sqrt(alpha_bar_prev) + torch.sqrt(1 - alpha_bar_prev - sigma**2) * eps
        not_last = (t != 0).float().view(-1, *[1] * (x.ndim - 1))
        return mean + not_last * sigma * noise

    def _p_mean_variance(self, model: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> dict[str, Tensor]:
        schedule = self._schedule
        timesteps = torch.tensor(self._timestep_map, device=t.device, dtype=t.dtype)[t]
        output = model(x, timesteps)
        if self._learned:
            output, values = torch.split(output, x.shape[1], dim=1)
            low = self._look_up(schedule.posterior_log_variance_clipped, t, x)
            high = self._look_up(np.log(schedule.betas), t, x)
            fraction = (values + 1) / 2
            log_variance = fraction * high + (1 - fraction) * low
            variance = torch.exp(log_variance)
        else:
            variance = self._look_up(schedule.posterior_variance, t, x)
            log_variance = self._look_up(schedule.posterior_log_variance_clipped, t, x)
        x_start = self._look_up(schedule.sqrt_recip_alphas_cumprod, t, x) * x
        x_start = x_start - self._look_up(schedule.sqrt_recipm1_alphas_cumprod, t, x) * output
        if self._clip:
            x_start = x_start.clamp(-1, 1)
        mean = self._look_up(schedule.posterior_mean_coef1, t, x) * x_start
        mean = mean + self._look_up(schedule.posterior_mean_coef2, t, x) * x
        # q_posterior_mean_variance returns these too; its caller drops them.
        self._look_up(schedule.posterior_variance, t, x)
        self._look_up(schedule.posterior_log_variance_clipped, t, x)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x_start}

    def _look_up(self, table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
        values = torch.from_numpy(table).to(device=t.device)[t].float()
        while values.ndim < like.ndim:
            values = values[..., None]
        if self._style == "GLIDE":
            return values + torch.zeros(like.shape, device=t.device)
        return values.expand(like.shape)


def guided(network: Callable[..., Tensor], scale: float, channels: int) -> Callable[..., Tensor]:
    """GLIDE's notebook's model function around a network (x [2B, C, ...], t [2B]) -> [2B, C or 2C, ...]."""

    def model(x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        half = x[: len(x) // 2]
        output = network(torch.cat([half, half], dim=0), t, **conditioning)
        eps, rest = output[:, :channels], output[:, channels:]
        cond, uncond = torch.split(eps, len(eps) // 2, dim=0)
        blended = uncond + scale * (cond - uncond)
        return torch.cat([torch.cat([blended, blended], dim=0), rest], dim=1)

    return model


def step(case: StepCase, process: Any) -> Provider:
    """A process's step on the doubled batch."""
    doubled, output = torch.cat([case.x, case.x]), case.output.float()
    x, model = doubled.clone(), guided(lambda x, t: output, case.scale, case.x.shape[1])

    def run(draw: bool) -> Tensor:
        t = torch.tensor([case.timestep] * len(x), device=x.device)
        return _method(process, case.solver)(model, x, t, None if draw else case.noise)

    return Provider.returning(run, lambda made: made[: len(case.x)], prepare=lambda: x.copy_(doubled))


def loop(case: LoopCase, process: Any, network: Callable[..., Any] | None = None) -> Provider:
    """A process's loop on the doubled batch.

    Args:
        case: what to sample.
        process: an `Original`, or what `upstream` returns.
        network: instead of the case's model: that one compiled.
    """
    network, conditioning = network or case.model, case.doubled()
    start = torch.cat([case.start, case.start])
    noise = torch.cat([case.noise, case.noise], dim=1)
    model = guided(lambda x, t: network(x.to(case.dtype), t, **conditioning).float(), case.scale, start.shape[1])

    def run(draw: bool) -> Tensor:
        x, rows = start, case.schedule.num_timesteps
        for row in range(rows):
            t = torch.tensor([rows - 1 - row] * len(x), device=x.device)
            x = _method(process, case.solver)(model, x, t, None if draw else noise[row])
        return x

    return Provider.returning(run, lambda made: made[: len(case.start)])


def _method(process: Any, solver: str) -> Callable[..., Tensor]:
    return process.ddim_sample if solver == "ddim" else process.p_sample


def upstream(style: str, schedule: Schedule, learned: bool) -> Any | None:
    """The original itself, as an object like `Original`, with its clip of x0; None if it cannot be imported."""
    betas, kept = full_process(schedule).betas, set(schedule.timestep_map.tolist())
    try:
        if style == "GLIDE":
            from glide_text2im.respace import SpacedDiffusion

            process = SpacedDiffusion(kept, betas=betas)
        else:
            from guided_diffusion import gaussian_diffusion as gd
            from guided_diffusion.respace import SpacedDiffusion

            variance = gd.ModelVarType.LEARNED_RANGE if learned else gd.ModelVarType.FIXED_SMALL
            types = {"model_mean_type": gd.ModelMeanType.EPSILON, "model_var_type": variance}
            process = SpacedDiffusion(kept, betas=betas, **types, loss_type=gd.LossType.MSE)
    except ImportError:
        return None
    return _Upstream(process)


class _Upstream:
    """Runs the original's methods; the noise it is given replaces what torch.randn_like returns to them."""

    def __init__(self, process: Any) -> None:
        self.p_sample, self.ddim_sample = (partial(self._run, m) for m in (process.p_sample, process.ddim_sample))

    def _run(self, method: Callable[..., Any], model: Any, x: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            return method(model, x, t)["sample"]
        draw = torch.randn_like
        torch.randn_like = lambda _: noise  # type: ignore[assignment]
        try:
            return method(model, x, t)["sample"]
        finally:
            torch.randn_like = draw
