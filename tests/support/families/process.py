"""The process of guided-diffusion: its tables, and what its steps are made of."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Mean(enum.Enum):
    """What a network predicts."""

    PREVIOUS_X, START_X, EPSILON = range(3)


class Var(enum.Enum):
    """Where the variance comes from."""

    LEARNED, FIXED_SMALL, FIXED_LARGE, LEARNED_RANGE = range(4)


class Loss(enum.Enum):
    """What training minimises."""

    MSE, RESCALED_MSE, KL, RESCALED_KL = range(4)


def betas(steps: int = 24) -> np.ndarray:
    """Levels mild enough that a rounding stays a rounding from the first step to the last."""
    return np.linspace(0.004, 0.3, steps, dtype=np.float64)


def extract(table: np.ndarray, t: Tensor, shape: Any) -> Tensor:
    """A table's entries at t, for every sample of a batch of this shape."""
    values = torch.from_numpy(np.asarray(table)).to(t.device)[t].float()
    return values.reshape(len(t), *[1] * (len(shape) - 1)).expand(shape)


class Process:
    """Tables, moments and losses."""

    def __init__(
        self, *, betas: Any, model_mean_type: Any, model_var_type: Any, loss_type: Any, rescale_timesteps: bool = False
    ) -> None:
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self.rescale_timesteps = rescale_timesteps
        self._make_tables(np.array(betas, dtype=np.float64))

    def _make_tables(self, betas: np.ndarray) -> None:
        self.betas, self.num_timesteps = betas, len(betas)
        kept = 1.0 - betas
        share = np.cumprod(kept)
        self.alphas_cumprod = share
        self.alphas_cumprod_prev = np.append(1.0, share[:-1])
        self.alphas_cumprod_next = np.append(share[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(share)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - share)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - share)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / share)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / share - 1)
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - share)
        self.posterior_log_variance_clipped = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - share)
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(kept) / (1.0 - share)

    # q.

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> Any:
        mean = extract(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        return mean, extract(1.0 - self.alphas_cumprod, t, x_start.shape), self._log_variance(x_start, t)

    def _log_variance(self, x: Tensor, t: Tensor) -> Tensor:
        return extract(self.log_one_minus_alphas_cumprod, t, x.shape)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        noise = torch.randn_like(x_start) if noise is None else noise
        signal = extract(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        return signal + extract(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Any:
        first, second = (
            extract(table, t, x_t.shape) for table in (self.posterior_mean_coef1, self.posterior_mean_coef2)
        )
        variances = self.posterior_variance, self.posterior_log_variance_clipped
        return first * x_start + second * x_t, *(extract(table, t, x_t.shape) for table in variances)

    # One step.

    def p_mean_variance(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
    ) -> dict[str, Any]:
        output = model(x, self._scale_timesteps(t), **({} if model_kwargs is None else model_kwargs))
        output, variance, log_variance = self._variances(output, x, t)

        def limited(x0: Tensor) -> Tensor:
            x0 = x0 if denoised_fn is None else denoised_fn(x0)
            return x0.clamp(-1, 1) if clip_denoised else x0

        if self.model_mean_type.name == "PREVIOUS_X":
            return self._p(output, variance, log_variance, limited(self._predict_xstart_from_xprev(x, t, output)))
        x0 = limited(self._x0(output, x, t))
        mean, _, _ = self.q_posterior_mean_variance(x_start=x0, x_t=x, t=t)
        return self._p(mean, variance, log_variance, x0)

    def _x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return output if self.model_mean_type.name == "START_X" else self._predict_xstart_from_eps(x, t, output)

    def _p(self, mean: Tensor, variance: Tensor, log_variance: Tensor, x0: Tensor) -> dict[str, Any]:
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0}

    def _variances(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kind = self.model_var_type.name
        if kind in ("LEARNED", "LEARNED_RANGE"):
            assert output.shape == (len(x), 2 * x.shape[1], *x.shape[2:])
            output, share = torch.split(output, x.shape[1], dim=1)
            if kind == "LEARNED":
                return output, torch.exp(share), share
            least = extract(self.posterior_log_variance_clipped, t, x.shape)
            most, share = extract(np.log(self.betas), t, x.shape), (share + 1) / 2
            log_variance = share * most + (1 - share) * least
            return output, torch.exp(log_variance), log_variance
        assert output.shape == x.shape
        if kind == "FIXED_LARGE":
            variances = np.append(self.posterior_variance[1], self.betas[1:])
            tables = variances, np.log(variances)
        else:
            tables = self.posterior_variance, self.posterior_log_variance_clipped
        return output, extract(tables[0], t, x.shape), extract(tables[1], t, x.shape)

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        scaled = extract(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
        return scaled - extract(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * eps

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        ratio = extract(self.posterior_mean_coef2 / self.posterior_mean_coef1, t, x_t.shape)
        return extract(1.0 / self.posterior_mean_coef1, t, x_t.shape) * xprev - ratio * x_t

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        scaled = extract(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
        return (scaled - pred_xstart) / extract(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t.float() * (1000.0 / self.num_timesteps) if getattr(self, "rescale_timesteps", False) else t

    def condition_mean(self, cond_fn: Any, p_mean_var: Any, x: Tensor, t: Tensor, model_kwargs: Any = None) -> Tensor:
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(self, cond_fn: Any, p_mean_var: Any, x: Tensor, t: Tensor, model_kwargs: Any = None) -> Any:
        share = extract(self.alphas_cumprod, t, x.shape)
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - (1 - share).sqrt() * cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        out = dict(p_mean_var)
        out["pred_xstart"] = self._predict_xstart_from_eps(x, t, eps)
        out["mean"], _, _ = self.q_posterior_mean_variance(x_start=out["pred_xstart"], x_t=x, t=t)
        return out

    def _std(self, out: Any) -> Tensor:
        return torch.exp(0.5 * out["log_variance"])

    def _not_last(self, t: Tensor, x: Tensor) -> Tensor:
        return (t != 0).float().view(-1, *[1] * (x.ndim - 1))

    def training_losses(
        self, model: Any, x_start: Tensor, t: Tensor, model_kwargs: Any = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))[:, : x_start.shape[1]]
        target = {"EPSILON": noise, "START_X": x_start, "VELOCITY": noise}.get(self.model_mean_type.name, noise)
        loss = ((target - output) ** 2).flatten(1).mean(1)
        return {"loss": loss, "mse": loss}
