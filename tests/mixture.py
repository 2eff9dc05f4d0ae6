"""A mixture of Gaussians on the line and what diffusion makes of it, in closed form: the truth that samplers are held
to. Every element of a tensor is a sample of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcfg import Schedule

# The label of no class: the whole mixture.
NULL = -1


@dataclass(frozen=True)
class Mixture:
    """The density sum_k weights[k] N(means[k], stds[k]²), component k belonging to the class classes[k].

    At noise level ᾱ component k is N(√ᾱ means[k], ᾱ stds[k]² + 1 - ᾱ) with the same weight. In the methods x is
    [B, ...] of any floating dtype, ᾱ a number or [B], and y [B] or a number: class labels, NULL for all components.
    """

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]
    classes: tuple[int, ...]

    def log_density(self, x: Tensor, ᾱ: float | Tensor = 1.0, y: int | Tensor = NULL) -> Tensor:
        """log p(x_t | y), like x."""
        joint, prior = self._log_joint(x, ᾱ, y), self._log_joint(x, ᾱ, y, data=False)
        return joint.logsumexp(0) - prior.logsumexp(0)

    def cdf(self, x: Tensor, ᾱ: float | Tensor = 1.0, y: int | Tensor = NULL) -> Tensor:
        """P(x_t <= x | y), like x."""
        mean, variance = self._components(x, ᾱ)
        weights = self._log_joint(x, ᾱ, y, data=False).softmax(0)
        return (weights * torch.special.ndtr((x - mean) / variance**0.5)).sum(0)

    def score(self, x: Tensor, ᾱ: float | Tensor, y: int | Tensor = NULL) -> Tensor:
        """∇ log p(x_t | y), like x."""
        mean, variance = self._components(x, ᾱ)
        return (self._log_joint(x, ᾱ, y).softmax(0) * (mean - x) / variance).sum(0)

    def eps(self, x: Tensor, ᾱ: float | Tensor, y: int | Tensor = NULL) -> Tensor:
        """E[ε | x_t, y], what a perfect model predicts, like x."""
        return -((1 - _per_sample(ᾱ, x)) ** 0.5) * self.score(x, ᾱ, y)

    def log_posterior(self, x: Tensor, ᾱ: float | Tensor, y: int | Tensor) -> Tensor:
        """log p(y | x_t), what a perfect classifier of noisy samples returns, like x."""
        return self._log_joint(x, ᾱ, y).logsumexp(0) - self._log_joint(x, ᾱ, NULL).logsumexp(0)

    def log_posterior_gradient(self, x: Tensor, ᾱ: float | Tensor, y: int | Tensor) -> Tensor:
        """∇ log p(y | x_t), what a cond_fn returns, like x."""
        return self.score(x, ᾱ, y) - self.score(x, ᾱ, NULL)

    def model(self, schedule: Schedule, prediction: str = "epsilon") -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The perfect model(x, t, y) of a process, t being timesteps of the original one; "epsilon", "x0" or "v"."""
        alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)

        def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            ᾱ = alphas_cumprod[t.long()].to(x.dtype)
            eps, ᾱ_x = self.eps(x, ᾱ, y), _per_sample(ᾱ, x)
            x0 = (x - (1 - ᾱ_x) ** 0.5 * eps) / ᾱ_x**0.5
            return {"epsilon": eps, "x0": x0, "v": ᾱ_x**0.5 * eps - (1 - ᾱ_x) ** 0.5 * x0}[prediction]

        return predict

    def _components(self, x: Tensor, ᾱ: float | Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of the components at ᾱ, [K, B or 1, 1, ...]."""
        means, stds = (torch.tensor(v, dtype=x.dtype).view(-1, *[1] * x.ndim) for v in (self.means, self.stds))
        ᾱ = _per_sample(ᾱ, x)
        return ᾱ**0.5 * means, ᾱ * stds**2 + 1 - ᾱ

    def _log_joint(self, x: Tensor, ᾱ: float | Tensor, y: int | Tensor, data: bool = True) -> Tensor:
        """log (weights[k] p(x_t | k)) for every component k, [K, *x.shape] (log weights[k] alone without `data`), with
        -inf for those of other classes than y."""
        weights, classes = (torch.tensor(v).view(-1, *[1] * x.ndim) for v in (self.weights, self.classes))
        log_joint = weights.to(x.dtype).log()
        if data:
            mean, variance = self._components(x, ᾱ)
            log_joint = log_joint - 0.5 * ((x - mean) ** 2 / variance + (2 * torch.pi * variance).log())
        y = _per_sample(y, x, torch.int64)
        return log_joint.masked_fill((classes != y) & (y != NULL), -torch.inf)


def _per_sample(values: float | Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.as_tensor(values, dtype=dtype or x.dtype).view(-1, *[1] * (x.ndim - 1))
