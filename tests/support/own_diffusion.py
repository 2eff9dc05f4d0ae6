"""A diffusion object with guided-diffusion's interface, written for these tests, as another project might have it."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class Mean(enum.Enum):
    """What its model predicts."""

    EPSILON = 1
    START_X = 2


class Variance(enum.Enum):
    """Which variances its steps have."""

    FIXED_SMALL = 1


class OwnDiffusion:
    """Fixed variances; DDPM alone."""

    def __init__(self, steps: int = 6, mean: Mean = Mean.EPSILON) -> None:
        self.model_mean_type, self.model_var_type, self.loss_type = mean, Variance.FIXED_SMALL, None
        self.betas = np.linspace(0.01, 0.3, steps)
        self.num_timesteps = steps
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        before = np.append(1.0, self.alphas_cumprod[:-1])
        rest = 1 - self.alphas_cumprod
        self.alphas_cumprod_prev = before
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)
        self.posterior_mean_coef1 = self.betas * np.sqrt(before) / rest
        self.posterior_mean_coef2 = (1 - before) * np.sqrt(1 - self.betas) / rest
        self.posterior_variance = self.betas * (1 - before) / rest
        clipped = np.append(self.posterior_variance[1], self.posterior_variance[1:])
        self.posterior_log_variance_clipped = np.log(clipped)

    def at(self, table: Any, t: Any, x: Any) -> Any:
        """A table's values at times [B], for samples like x."""
        return torch.from_numpy(table)[t].float().reshape(-1, *[1] * (x.ndim - 1)).expand(x.shape)

    def asked(self, model: Any, x: Any, t: Any, model_kwargs: Any) -> Any:
        """What the model returns."""
        return model(x, t, **model_kwargs)

    def predicted(self, x: Any, t: Any, output: Any) -> Any:
        """The image that an output predicts."""
        if self.model_mean_type is Mean.START_X:
            return output
        return (
            self.at(self.sqrt_recip_alphas_cumprod, t, x) * x - self.at(self.sqrt_recipm1_alphas_cumprod, t, x) * output
        )

    def p_mean_variance(
        self, model: Any, x: Any, t: Any, clip_denoised: bool = True, denoised_fn: Any = None, model_kwargs: Any = None
    ) -> dict[str, Any]:
        """The step's mean, log-variance and prediction."""
        x0 = self.predicted(x, t, self.asked(model, x, t, model_kwargs or {}))
        x0 = x0 if denoised_fn is None else denoised_fn(x0)
        x0 = x0.clamp(-1, 1) if clip_denoised else x0
        mean = self.at(self.posterior_mean_coef1, t, x) * x0 + self.at(self.posterior_mean_coef2, t, x) * x
        return {"mean": mean, "log_variance": self.at(self.posterior_log_variance_clipped, t, x), "pred_xstart": x0}

    def p_sample(
        self,
        model: Any,
        x: Any,
        t: Any,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
    ) -> dict[str, Any]:
        """A step."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x)
        more = (t != 0).float().reshape(-1, *[1] * (x.ndim - 1))
        sample = out["mean"] + more * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(self, model: Any, shape: Any, **options: Any) -> Any:
        """The last sample."""
        for out in self.p_sample_loop_progressive(model, shape, **options):
            final = out
        return final["sample"]

    def p_sample_loop_progressive(
        self,
        model: Any,
        shape: Any,
        noise: Any = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
        device: Any = None,
        progress: bool = False,
    ) -> Iterator[Any]:
        """Every step's result."""
        img = torch.randn(*shape, device=device) if noise is None else noise
        for i in reversed(range(self.num_timesteps)):
            t = torch.tensor([i] * shape[0], device=device)
            with torch.no_grad():
                out = self.p_sample(model, img, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
                yield out
                img = out["sample"]
