"""The hybrid loss of Improved DDPM (Nichol & Dhariwal 2021) for a model that predicts noise and a learned variance.

The noise is learned by mean squared error, the variance by the variational bound with the predicted noise detached, so
that the bound does not change the mean (guided-diffusion: `RESCALED_MSE` with `LEARNED_RANGE`).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from ..schedule import Schedule

_SCHEDULE_TABLES = (
    *("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod"),
    *("sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "posterior_mean_coef2"),
)
_HALF_BIN = 1.0 / 255.0
_SMALLEST_PROBABILITY = 1e-12


@dataclasses.dataclass(frozen=True)
class LossTerms:
    """Losses of each sample, float [B]: `loss` is `mse_weight * mse + vlb`, `mse` the mean squared error of the noise.

    `vlb` is the term of the variational bound at t in bits per dimension, times T / 1000.
    """

    loss: Tensor
    mse: Tensor
    vlb: Tensor


class HybridLoss:
    """Loss of a model with output [B, 2C, ...]: the noise, then the variance's position between its bounds.

    The squared error has the weight `min(1 / alphas_cumprod, mse_weight_cap)`: a cap of 1 is the plain loss, infinity
    the squared error of v; values between favour the noisy steps, where the layout is decided. ValueError below 1.
    `dtype` is that of tables and result.

    Example:
        >>> loss = HybridLoss(Schedule.named("squaredcos_cap_v2", 1000))
        >>> x_start, noise, t = torch.zeros(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.randint(1000, (4,))
        >>> x_t, model = loss.q_sample(x_start, t, noise), torch.nn.Conv2d(3, 6, 1)
        >>> loss(model(x_t), x_start, x_t, t, noise).loss.mean().backward()
    """

    def __init__(self, schedule: Schedule, mse_weight_cap: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        if not mse_weight_cap >= 1.0:
            raise ValueError(f"mse_weight_cap: got {mse_weight_cap}, expected at least 1")
        self.num_timesteps = schedule.num_timesteps
        arrays = {name: getattr(schedule, name) for name in _SCHEDULE_TABLES} | {
            "min_log_variance": schedule.posterior_log_variance_clipped,
            "max_log_variance": np.log(schedule.betas),
            "mse_weight": np.minimum(1.0 / schedule.alphas_cumprod, mse_weight_cap),
        }
        self._tables = {name: torch.from_numpy(np.array(values)).to(dtype) for name, values in arrays.items()}

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Diffuse samples [B, C, ...] to the timesteps `t`, int64 [B], with noise of the same shape."""
        signal = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        return signal + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def __call__(self, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> LossTerms:
        """The loss of every sample from the model's output [B, 2C, ...] for `x_t`; ValueError for another shape.

        `x_start` [B, C, ...] in [-1, 1], `t` int64 [B] and `noise` are what `q_sample` made `x_t` of.
        """
        expected = (x_start.shape[0], 2 * x_start.shape[1], *x_start.shape[2:])
        if tuple(model_output.shape) != expected:
            raise ValueError(f"model_output: got shape {tuple(model_output.shape)}, expected {expected}")
        epsilon, fraction = model_output.chunk(2, dim=1)
        mse = ((epsilon - noise) ** 2).flatten(1).mean(dim=1)
        vlb = self._vlb(epsilon.detach(), (fraction + 1) / 2, x_start, x_t, t) * (self.num_timesteps / 1000)
        weight = self._tables["mse_weight"].to(t.device)[t]
        return LossTerms(loss=weight * mse + vlb, mse=mse, vlb=vlb)

    def _vlb(self, epsilon: Tensor, fraction: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The bound's term in bits per dimension: a KL divergence, or at t = 0 the likelihood of 8-bit values."""
        recip, recipm1 = (self._at(f"sqrt_{name}_alphas_cumprod", t, x_t) for name in ("recip", "recipm1"))
        predicted_start = recip * x_t - recipm1 * epsilon
        low, high = self._at("min_log_variance", t, x_t), self._at("max_log_variance", t, x_t)
        log_variance = fraction * high + (1 - fraction) * low
        # Means of q(x_{t-1} | x_t, x_0).
        of_start, of_x_t = (self._at(f"posterior_mean_coef{k}", t, x_t) for k in (1, 2))
        true_mean, mean = (of_start * start + of_x_t * x_t for start in (x_start, predicted_start))
        difference = low - log_variance
        divergence = 0.5 * (difference.exp() - 1 - difference + (true_mean - mean) ** 2 * torch.exp(-log_variance))
        likelihood = -_discretized_log_likelihood(x_start, mean, log_variance)
        first = (t == 0).view(-1, *[1] * (x_t.ndim - 1))
        return torch.where(first, likelihood, divergence).flatten(1).mean(dim=1) / math.log(2.0)

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Entries of a table at t, shaped to multiply `like`."""
        return self._tables[name].to(t.device)[t].view(-1, *[1] * (like.ndim - 1))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability in nats of the 8-bit value nearest to x in [-1, 1]; the outermost bins reach to infinity."""
    # Exact normal CDF; guided-diffusion uses a tanh approximation of it (difference below 4e-4).
    centred, inverse = x - mean, torch.exp(-0.5 * log_variance)
    above = torch.special.ndtr((centred + _HALF_BIN) * inverse)
    below = torch.special.ndtr((centred - _HALF_BIN) * inverse)
    above = torch.where(x > 1 - _HALF_BIN, 1.0, above)
    below = torch.where(x < -1 + _HALF_BIN, 0.0, below)
    return (above - below).clamp(min=_SMALLEST_PROBABILITY).log()
