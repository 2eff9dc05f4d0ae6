"""Noise levels sigma of the variance-exploding form x = x0 + sigma*z, noisiest first, in float64 numpy.

`karras`, `exponential` and `polyexponential` are k-diffusion's `get_sigmas_*`: n levels from sigma_max to sigma_min,
and a 0 after them; so does `beta`. `flow` gives the times of flow matching, where x is (1-sigma)*x0 + sigma*z.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .schedule import Schedule
from .utils.checks import check_count, check_finite, check_one_of, takes_numbers

__all__ = ["ALIGN_YOUR_STEPS", "SPACINGS", "align_your_steps", "beta", "discrete_sigmas", "exponential", "flow"]
__all__ += ["flow_mu", "from_schedule", "karras", "polyexponential"]

Array = NDArray[np.float64]

SPACINGS = ("linspace", "leading", "trailing", "sgm_uniform", "simple", "beta")

# Optimised for ten steps of a model:
# https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html
ALIGN_YOUR_STEPS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


@takes_numbers
def karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Array:
    """Evenly spaced in sigma^(1/rho): equation 5 of Karras et al. 2022 (https://arxiv.org/abs/2206.00364).

    Args:
        n: number of levels above 0, at least 1.
        sigma_min, sigma_max: the last of them, above 0, and the first.
        rho: above 0; larger values make steps at low noise shorter.

    Returns:
        float64 [n + 1]. ValueError for an argument out of its range.

    Example:
        >>> karras(3, 0.1, 10.0).round(2).tolist()
        [10.0, 1.45, 0.1, 0.0]
    """
    _check(n, sigma_min, sigma_max, rho)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.append((high + np.linspace(0, 1, n) * (low - high)) ** rho, 0.0)


@takes_numbers
def exponential(n: int, sigma_min: float, sigma_max: float) -> Array:
    """Evenly spaced in log sigma; arguments, result and errors as `karras`."""
    return polyexponential(n, sigma_min, sigma_max)


@takes_numbers
def polyexponential(n: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Array:
    """A power rho of an even ramp in log sigma; arguments, result and errors as `karras`."""
    _check(n, sigma_min, sigma_max, rho)
    low, high = np.log(sigma_min), np.log(sigma_max)
    return np.append(np.exp(np.linspace(1, 0, n) ** rho * (high - low) + low), 0.0)


@takes_numbers
def beta(n: int, sigma_min: float, sigma_max: float, alpha: float = 0.6, beta: float = 0.6) -> Array:
    """At even quantiles of a Beta distribution over [sigma_min, sigma_max]: with the defaults close together at both
    ends (Lee et al. 2024, https://arxiv.org/abs/2407.12173; diffusers' `use_beta_sigmas`).

    ComfyUI's scheduler of that name, and the paper, take timesteps in place of levels: spacing "beta" of
    `from_schedule`.

    Args, result, errors: as `karras`, and alpha, beta: of the distribution, in (0, 10].

    Example:
        >>> beta(3, 0.1, 10.0).round(2).tolist()
        [10.0, 5.05, 0.1, 0.0]
    """
    _check(n, sigma_min, sigma_max)
    return np.append(sigma_min + _beta_quantiles(1 - np.linspace(0, 1, n), alpha, beta) * (sigma_max - sigma_min), 0.0)


@takes_numbers
def align_your_steps(n: int, model: str = "sd15") -> Array:
    """Levels optimised for a model (Sabour et al. 2024, https://arxiv.org/abs/2404.14507): the ten published ones,
    interpolated in their logarithm for another n.

    Args, result, errors: as `karras`, and model: "sd15" (Stable Diffusion 1.5), "sdxl" or "svd" (Stable Video
    Diffusion).
    """
    check_count("n", n)
    check_one_of("model", model, ALIGN_YOUR_STEPS)
    known = np.log(ALIGN_YOUR_STEPS[model])
    return np.append(np.exp(np.interp(np.linspace(0, 1, n + 1)[:-1], np.linspace(0, 1, len(known)), known)), 0.0)


@takes_numbers
def flow(n: int, shift: float = 1.0) -> Array:
    """Times of flow matching: even ones t, shifted towards noise to s t/(1 + (s-1) t) (Esser et al. 2024,
    https://arxiv.org/abs/2403.03206, equation 23).

    Args:
        n: number of steps, at least 1.
        shift: s, above 0: 3 for Stable Diffusion 3. diffusers' dynamic shifts are s = e^mu ("exponential", with
            `flow_mu`) and s = mu ("linear").

    Returns:
        float64 [n + 1], from 1 to 0.

    Raises:
        ValueError: n or shift out of its range.

    Example:
        >>> flow(4, shift=3.0).tolist()
        [1.0, 0.9, 0.75, 0.5, 0.0]
    """
    check_count("n", n)
    check_finite("shift", shift, above=0)
    t = np.arange(n, -1, -1) / n
    return shift * t / (1 + (shift - 1) * t)


@takes_numbers
def flow_mu(tokens: int, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)) -> float:
    """mu of a dynamic shift, for `flow(n, shift=math.exp(mu))`: on the line through two pairs (tokens, mu), by default
    FLUX's (diffusers' `calculate_shift`). Tokens are the image's: (height/16) (width/16) for FLUX."""
    return low[1] + (tokens - low[0]) * (high[1] - low[1]) / (high[0] - low[0])


@takes_numbers
def from_schedule(schedule: Schedule, n: int, spacing: str = "linspace") -> tuple[Array, Array]:
    """The noise levels of n timesteps of a discrete process.

    Args:
        schedule: the process, of T timesteps; its last ᾱ must be above 0.
        n: how many of them, 1 to T.
        spacing: "linspace" spreads them from T-1 to 0 (k-diffusion's `DiscreteSchedule.get_sigmas`: levels between two
            timesteps are interpolated in log sigma); "leading" takes multiples of T // n from 0 on, and "trailing"
            steps of T / n down from T-1, rounded (both as diffusers' schedulers). As ComfyUI's: "sgm_uniform" spreads
            n + 1 of them and leaves 0 out, "simple" takes steps of T / n down from T-1, truncated, "beta" the quantiles
            of Beta(0.6, 0.6), rounded, those that coincide once (Lee et al. 2024, https://arxiv.org/abs/2407.12173).

    Returns:
        (sigmas, timesteps): float64 [n + 1] with the 0 at the end, and float64 [n], the times that a model is given;
        fewer where some coincide.

    Raises:
        ValueError: n out of its range, an unknown spacing, or a process that ends in pure noise.
    """
    T = schedule.num_timesteps
    check_count("n", n, T)
    steps = spaced_timesteps(T, n, spacing)
    indices = np.arange(T)
    sigmas = np.exp(np.interp(steps, indices, np.log(discrete_sigmas(schedule))))
    return np.append(sigmas, 0.0), np.interp(steps, indices, schedule.model_timesteps())


def discrete_sigmas(schedule: Schedule) -> Array:
    """float64 [T]: √((1-ᾱ)/ᾱ) at every timestep, the least noisy first; ValueError where ᾱ reaches 0."""
    if not schedule.alphas_cumprod[-1] > 0:
        raise ValueError("schedule: alphas_cumprod reaches 0, expected a process whose last noise level is finite")
    return schedule.sqrt_recipm1_alphas_cumprod


def spaced_timesteps(T: int, n: int, spacing: str) -> Array:
    """n of T timesteps, the noisiest first, in one of the spacings of `from_schedule`; "linspace" gives fractions."""
    if spacing == "linspace":
        return np.linspace(T - 1, 0, n)
    if spacing == "leading":
        return np.arange(n, dtype=np.float64)[::-1] * (T // n)
    if spacing == "trailing":
        return np.round(T - np.arange(n, dtype=np.float64) * (T / n)) - 1
    if spacing == "sgm_uniform":
        return np.linspace(T - 1, 0, n + 1)[:-1]
    if spacing == "simple":
        return T - 1 - np.floor(np.arange(n) * (T / n))
    if spacing == "beta":
        # The median is halfway between two timesteps if T is even, up to its rounding.
        steps = np.round(_beta_quantiles(1 - np.arange(n) / n, 0.6, 0.6) * (T - 1), 9)
        return np.unique(np.rint(steps))[::-1]
    raise ValueError(f"spacing: got {spacing!r}, expected one of {', '.join(SPACINGS)}")


def _beta_quantiles(p: Array, alpha: float, beta: float) -> Array:
    """x with I_x(alpha, beta) = p, the inverse of the regularised incomplete beta function, by bisection."""
    if not (0 < alpha <= 10 and 0 < beta <= 10):
        raise ValueError(f"alpha, beta: got {alpha}, {beta}, expected values in (0, 10]")
    # Each from its end of [0, 1]: the series converges up to 1/2.
    upper = p > _incomplete_beta(np.array(0.5), alpha, beta)
    low, high = np.zeros_like(p), np.full_like(p, 0.5)
    for _ in range(60):
        x = (low + high) / 2
        below = np.where(upper, 1 - _incomplete_beta(x, beta, alpha) > p, _incomplete_beta(x, alpha, beta) < p)
        low, high = np.where(below, x, low), np.where(below, high, x)
    return np.where(upper, 1 - low, high)


def _incomplete_beta(x: Array, alpha: float, beta: float) -> Array:
    """I_x(alpha, beta) for x up to 1/2, by its power series: x^a/B(a, b) sum_k (1-b)_k x^k/(k! (a+k))."""
    term, total = np.ones_like(x), np.zeros_like(x)
    for k in range(60):
        total = total + term / (alpha + k)
        term = term * x * (k + 1 - beta) / (k + 1)
    return total * x**alpha * math.gamma(alpha + beta) / (math.gamma(alpha) * math.gamma(beta))


def _check(n: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> None:
    check_count("n", n)
    if not 0 < sigma_min <= sigma_max < np.inf:
        expected = "0 < sigma_min <= sigma_max, both finite"
        raise ValueError(f"sigma_min, sigma_max: got {sigma_min}, {sigma_max}, expected {expected}")
    check_finite("rho", rho, above=0)
