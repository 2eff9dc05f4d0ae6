"""One step of guided-diffusion's and GLIDE's samplers as those do it, everything but the network: what
`benchmarks.step` measures against.

`fastcfg.reference.gaussian` has the originals' arithmetic but leaner look-ups. Here they are the originals' own: a
whole float64 table is taken from numpy to the device, indexed, and rounded, at every use; guided-diffusion expands the
result, GLIDE adds it to a full tensor of zeros. Look-ups whose results are thrown away are made, as theirs are.

Guidance is the function of GLIDE's notebooks, which doubles the batch; the samplers keep the doubled batch as their
state. Where the originals themselves can be imported, `upstream` runs those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcfg import Schedule

STYLES = ("guided-diffusion", "GLIDE")


class Original:
    """A process whose steps are the originals', operation for operation.

    Args:
        schedule: the respaced process, learned-range variances.
        style: whose look-ups: "guided-diffusion" or "GLIDE".
    """

    def __init__(self, schedule: Schedule, style: str) -> None:
        if style not in STYLES:
            raise ValueError(f"style: got {style!r}, expected one of {', '.join(STYLES)}")
        self._schedule, self._style = schedule, style
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
        output, values = torch.split(model(x, timesteps), x.shape[1], dim=1)
        low = self._look_up(schedule.posterior_log_variance_clipped, t, x)
        high = self._look_up(np.log(schedule.betas), t, x)
        fraction = (values + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        variance = torch.exp(log_variance)
        x_start = self._look_up(schedule.sqrt_recip_alphas_cumprod, t, x) * x
        x_start = (x_start - self._look_up(schedule.sqrt_recipm1_alphas_cumprod, t, x) * output).clamp(-1, 1)
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


def guided(raw: Tensor, scale: float) -> Callable[..., Tensor]:
    """GLIDE's notebook's model function around a network that returns `raw` [2B, 2C, ...]."""
    channels = raw.shape[1] // 2

    def model(x: Tensor, t: Tensor, **_: Any) -> Tensor:
        half = x[: len(x) // 2]
        torch.cat([half, half], dim=0)  # the network's input
        eps, rest = raw[:, :channels], raw[:, channels:]
        cond, uncond = torch.split(eps, len(eps) // 2, dim=0)
        blended = uncond + scale * (cond - uncond)
        return torch.cat([torch.cat([blended, blended], dim=0), rest], dim=1)

    return model


def step_of(
    process: Any, name: str, model: Callable[..., Tensor], x: Tensor, row_t: int
) -> Callable[[Tensor | None], Tensor]:
    """One step of the loop with the noise given, or drawn where it is None; returns [2B, C, ...].

    Args:
        process: an `Original`.
        name: "ddpm" or "ddim".
        model: from `guided`.
        x: the doubled state.
        row_t: the respaced timestep.
    """
    sample = process.p_sample if name == "ddpm" else process.ddim_sample

    def step(noise: Tensor | None) -> Tensor:
        t = torch.tensor([row_t] * len(x), device=x.device)
        result: Tensor = sample(model, x, t, noise)
        return result

    return step


def upstream(style: str, betas: np.ndarray, steps: int) -> Any | None:
    """The original itself, respaced to so many steps, as an object like `Original`; None if it cannot be imported."""
    try:
        if style == "GLIDE":
            from glide_text2im.respace import SpacedDiffusion, space_timesteps

            process = SpacedDiffusion(space_timesteps(len(betas), str(steps)), betas=betas)
        else:
            from guided_diffusion import gaussian_diffusion as gd
            from guided_diffusion.respace import SpacedDiffusion, space_timesteps

            process = SpacedDiffusion(
                space_timesteps(len(betas), str(steps)),
                betas=betas,
                model_mean_type=gd.ModelMeanType.EPSILON,
                model_var_type=gd.ModelVarType.LEARNED_RANGE,
                loss_type=gd.LossType.MSE,
            )
    except ImportError:
        return None
    return _Upstream(process)


class _Upstream:
    """Runs the original's methods; the noise it is given replaces what torch.randn_like returns to them."""

    def __init__(self, process: Any) -> None:
        self._process = process

    def p_sample(self, *arguments: Any) -> Tensor:
        return self._run(self._process.p_sample, *arguments)

    def ddim_sample(self, *arguments: Any) -> Tensor:
        return self._run(self._process.ddim_sample, *arguments)

    def _run(self, method: Callable[..., Any], model: Any, x: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            return method(model, x, t)["sample"]
        draw = torch.randn_like
        torch.randn_like = lambda _: noise  # type: ignore[assignment]
        try:
            return method(model, x, t)["sample"]
        finally:
            torch.randn_like = draw
