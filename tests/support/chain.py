"""How a Markov chain on the line spreads, computed without drawing a sample, and whether samples agree with that.

A comparison fails for right samples with probability 1e-6: exactly so for the distribution function (Dvoretzky, Kiefer,
Wolfowitz and Massart), by the normal approximation for moments and bins.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcfg import Schedule
from support.mixture import NULL, Mixture

Array = NDArray[np.float64]

GRID = np.linspace(-6.5, 6.5, 401)
SPACING = float(GRID[1] - GRID[0])
# A deterministic chain keeps its points: it gets more of them.
FINER = 20
FALSE_ALARM = 1e-6
# Two-sided normal quantiles of the false alarm rate, for one comparison and for one of 20.
ONE, ONE_OF_20 = 4.89, 5.45


def normal_density(x: Array) -> Array:
    return np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)


class Chain:
    """The distribution of the state, at first standard normal: points `x` [n] with weights `w` [n]."""

    def __init__(self) -> None:
        self.x = np.linspace(GRID[0], GRID[-1], (len(GRID) - 1) * FINER + 1)
        self.w = normal_density(self.x) * (self.x[1] - self.x[0])

    def move(
        self, mean: Callable[[Array], Array], std: float | Callable[[Array], Array] = 0.0, repeat: int = 1
    ) -> None:
        """x' = mean(x) + std(x) z, `repeat` times."""
        if not callable(std) and std == 0:
            for _ in range(repeat):
                self.x = mean(self.x)
            return
        if len(self.x) > len(GRID):
            # What is still the normal density, or a smooth image of it, needs no finer points than the grid's.
            self.x, self.w = self.x[::FINER], self.w[::FINER] * FINER
        for _ in range(min(repeat, 2)):
            spread = np.broadcast_to(std(self.x) if callable(std) else std, self.x.shape)
            # Sums over points no farther apart than a normal density's std are integrals of it to 1e-8.
            assert spread.min() > SPACING
            kernel = normal_density((GRID[:, None] - mean(self.x)) / spread) / spread * SPACING
            self.x, self.w = GRID, kernel @ self.w
        for _ in range(repeat - 2):
            self.w = kernel @ self.w
        # Some mass leaves the grid.
        assert abs(self.w.sum() - 1) < 1e-5

    def cdf(self, x: Tensor) -> Tensor:
        """P(state <= x), like x."""
        order = np.argsort(self.x)
        below = np.cumsum(self.w[order]) - self.w[order] / 2
        return torch.from_numpy(np.interp(x.numpy(), self.x[order], below))

    def moment(self, power: int, center: float = 0.0) -> float:
        """The mean of (state - center)^power."""
        return float((self.w * (self.x - center) ** power).sum())

    def distance(self, cdf: Callable[[Tensor], Tensor]) -> float:
        """The largest difference from another distribution function."""
        x = torch.from_numpy(GRID)
        return float((self.cdf(x) - cdf(x)).abs().max())

    def assert_drew(self, samples: Tensor) -> None:
        """The samples' distribution function, mean, variance and histogram are this one's."""
        x = samples.double().flatten()
        assert_distribution(x, self.cdf)
        mean = self.moment(1)
        variance, fourth = self.moment(2, mean), self.moment(4, mean)
        assert abs(x.mean() - mean) < ONE * (variance / len(x)) ** 0.5
        assert abs(((x - mean) ** 2).mean() - variance) < ONE * ((fourth - variance**2) / len(x)) ** 0.5
        share = torch.histc(self.cdf(x), 20, 0, 1) / len(x)
        assert ((share - 0.05).abs() < ONE_OF_20 * (0.05 * 0.95 / len(x)) ** 0.5).all()


def assert_distribution(samples: Tensor, cdf: Callable[[Tensor], Tensor], bias: float = 0.0) -> None:
    """The samples' distribution function is within `bias` of `cdf`, but for chance."""
    x = samples.double().flatten().sort().values
    n, below = len(x), torch.arange(len(x)) / len(x)
    distance = max((below + 1 / n - cdf(x)).max(), (cdf(x) - below).max())
    assert distance < bias + (np.log(2 / FALSE_ALARM) / (2 * n)) ** 0.5


class Guided:
    """The means of samplers' steps under guidance, from the papers' formulas: float64 arrays x [n] to [n].

    Args:
        mixture: the data, whose exact ε the steps use.
        schedule: its ᾱ are all that is used.
        label: the class.
        scale: γ of ε = ε(x) + γ (ε(x | y) - ε(x)).
    """

    def __init__(self, mixture: Mixture, schedule: Schedule, label: int, scale: float = 1.0) -> None:
        self.mixture, self.label, self.scale = mixture, label, scale
        self.ᾱ = np.append(schedule.alphas_cumprod, 1.0)

    def eps(self, x: Array, t: int) -> Array:
        cond, uncond = (self.mixture.eps(torch.from_numpy(x), self.ᾱ[t], y).numpy() for y in (self.label, NULL))
        return uncond + self.scale * (cond - uncond)

    def x0(self, x: Array, t: int) -> Array:
        return (x - np.sqrt(1 - self.ᾱ[t]) * self.eps(x, t)) / np.sqrt(self.ᾱ[t])

    def ddim(self, x: Array, t: int) -> Array:
        """Equation 12 of Song et al. 2020 with σ = 0."""
        return np.sqrt(self.ᾱ[t - 1]) * self.x0(x, t) + np.sqrt(1 - self.ᾱ[t - 1]) * self.eps(x, t)

    def posterior_mean(self, x: Array, t: int) -> Array:
        """Equation 7 of Ho et al. 2020."""
        α = self.ᾱ[t] / self.ᾱ[t - 1]
        from_x0 = np.sqrt(self.ᾱ[t - 1]) * (1 - α) / (1 - self.ᾱ[t]) * self.x0(x, t)
        return from_x0 + np.sqrt(α) * (1 - self.ᾱ[t - 1]) / (1 - self.ᾱ[t]) * x

    def langevin(self, x: Array, t: int, δ: float) -> Array:
        """Equation 4 of Song & Ermon 2019."""
        return x - δ / 2 * self.eps(x, t) / np.sqrt(1 - self.ᾱ[t])
