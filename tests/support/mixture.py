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

    def model(
        self, schedule: Schedule, prediction: str = "epsilon", rescale: bool = False
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The perfect model(x, t, y) of a (re-spaced) process, called at its times. "previous_x" is the
        mean of x_{t-1}."""
        times = torch.from_numpy(schedule.model_timesteps(rescale))
        arrays = (schedule.alphas_cumprod, schedule.posterior_mean_coef1, schedule.posterior_mean_coef2)
        tables = [torch.from_numpy(array) for array in arrays]

        def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            level = torch.searchsorted(times, t.double())
            ᾱ, c_0, c_x = (_per_sample(table[level], x) for table in tables)
            eps = self.eps(x, ᾱ, y)
            x0 = (x - (1 - ᾱ) ** 0.5 * eps) / ᾱ**0.5
            v = ᾱ**0.5 * eps - (1 - ᾱ) ** 0.5 * x0
            return {"epsilon": eps, "x0": x0, "v": v, "previous_x": c_0 * x0 + c_x * x}[prediction]

        return predict

    def _components(self, x: Tensor, ᾱ: float | Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of the components at ᾱ, [K, B or 1, 1, ...]."""
        means, stds, ᾱ = _per_component(self.means, x), _per_component(self.stds, x), _per_sample(ᾱ, x)
        return ᾱ**0.5 * means, ᾱ * stds**2 + 1 - ᾱ

    def _log_joint(self, x: Tensor, ᾱ: float | Tensor, y: int | Tensor, data: bool = True) -> Tensor:
        """log (weights[k] p(x_t | k)) for every component k, [K, *x.shape] (log weights[k] alone without `data`), with
        -inf for those of other classes than y."""
        log_joint = _per_component(self.weights, x).log()
        if data:
            mean, variance = self._components(x, ᾱ)
            log_joint = log_joint - 0.5 * ((x - mean) ** 2 / variance + (2 * torch.pi * variance).log())
        classes, y = _per_component(self.classes, x), _per_sample(y, x)
        return log_joint.masked_fill((classes != y) & (y != NULL), -torch.inf)


def _per_component(values: tuple[float, ...], x: Tensor) -> Tensor:
    """[K, 1, ...], one more dimension than x."""
    return torch.tensor(values, dtype=x.dtype).view(-1, *[1] * x.ndim)


def _per_sample(values: float | Tensor, x: Tensor) -> Tensor:
    """[B or 1, 1, ...], the dimensions of x."""
    return torch.as_tensor(values, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))
