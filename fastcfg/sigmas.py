"""Noise levels sigma of the variance-exploding form x = x0 + sigma*z, noisiest first, in float64 numpy.

All but `from_schedule` are k-diffusion's `get_sigmas_*`: n levels from sigma_max to sigma_min, and a 0 after them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .schedule import Schedule

__all__ = ["SPACINGS", "discrete_sigmas", "exponential", "from_schedule", "karras", "polyexponential"]

Array = NDArray[np.float64]

SPACINGS = ("linspace", "leading", "trailing")


def karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Array:
    """Evenly spaced in sigma^(1/rho): equation 5 of Karras et al. 2022 (https://arxiv.org/abs/2206.00364).

    Args:
        n: number of levels above 0, at least 1.
        sigma_min: the last of them, above 0.
        sigma_max: the first, at least sigma_min.
        rho: above 0; larger values make steps at low noise shorter.

    Returns:
        float64 [n + 1].

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> karras(3, 0.1, 10.0).round(2).tolist()
        [10.0, 1.45, 0.1, 0.0]
    """
    _check(n, sigma_min, sigma_max, rho)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.append((high + np.linspace(0, 1, n) * (low - high)) ** rho, 0.0)


def exponential(n: int, sigma_min: float, sigma_max: float) -> Array:
    """Evenly spaced in log sigma; arguments, result and errors as `karras`."""
    return polyexponential(n, sigma_min, sigma_max)


def polyexponential(n: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Array:
    """A power rho of an even ramp in log sigma; arguments, result and errors as `karras`."""
    _check(n, sigma_min, sigma_max, rho)
    low, high = np.log(sigma_min), np.log(sigma_max)
    return np.append(np.exp(np.linspace(1, 0, n) ** rho * (high - low) + low), 0.0)


def from_schedule(schedule: Schedule, n: int, spacing: str = "linspace") -> tuple[Array, Array]:
    """The noise levels of n timesteps of a discrete process.

    Args:
        schedule: the process, of T timesteps; its last ᾱ must be above 0.
        n: how many of them, 1 to T.
        spacing: "linspace" spreads them from T-1 to 0 (k-diffusion's `DiscreteSchedule.get_sigmas`: levels between two
            timesteps are interpolated in log sigma); "leading" takes multiples of T // n from 0 on, and "trailing"
            steps of T / n down from T-1, rounded (both as diffusers' schedulers).

    Returns:
        (sigmas, timesteps): float64 [n + 1] with the 0 at the end, and float64 [n], the times that a model is given.

    Raises:
        ValueError: n out of its range, an unknown spacing, or a process that ends in pure noise.
    """
    T = schedule.num_timesteps
    if not 1 <= n <= T:
        raise ValueError(f"n: got {n}, expected 1 to {T}, the timesteps of the schedule")
    if spacing == "linspace":
        steps = np.linspace(T - 1, 0, n)
    elif spacing == "leading":
        steps = np.arange(n, dtype=np.float64)[::-1] * (T // n)
    elif spacing == "trailing":
        steps = np.round(T - np.arange(n, dtype=np.float64) * (T / n)) - 1
    else:
        raise ValueError(f"spacing: got {spacing!r}, expected one of {', '.join(SPACINGS)}")
    indices = np.arange(T)
    sigmas = np.exp(np.interp(steps, indices, np.log(discrete_sigmas(schedule))))
    return np.append(sigmas, 0.0), np.interp(steps, indices, schedule.model_timesteps())


def discrete_sigmas(schedule: Schedule) -> Array:
    """float64 [T]: √((1-ᾱ)/ᾱ) at every timestep, the least noisy first.

    Raises:
        ValueError: ᾱ reaches 0, where sigma is infinite.
    """
    if not schedule.alphas_cumprod[-1] > 0:
        raise ValueError("schedule: alphas_cumprod reaches 0, expected a process whose last noise level is finite")
    return schedule.sqrt_recipm1_alphas_cumprod


def _check(n: int, sigma_min: float, sigma_max: float, rho: float) -> None:
    if n < 1:
        raise ValueError(f"n: got {n}, expected at least 1")
    if not 0 < sigma_min <= sigma_max < np.inf:
        raise ValueError(
            f"sigma_min, sigma_max: got {sigma_min}, {sigma_max}, expected 0 < sigma_min <= sigma_max, both finite"
        )
    if not 0 < rho < np.inf:
        raise ValueError(f"rho: got {rho}, expected a finite value above 0")
