"""One-step methods in noise-level space (x = x0 + σz): k-diffusion's samplers.

With the slope d = (x - D(x, σ))/σ of Karras et al. 2022 (https://arxiv.org/abs/2206.00364) the probability-flow ODE is
dx/dσ = d. An Euler step from σ to σ' is (σ'/σ) x + (1 - σ'/σ) x0. Ancestral methods step down further, to σ_down, and
add noise of standard deviation σ_up, with σ_down² + σ_up² = σ'². x0 is the clipped one throughout.

Churn (algorithm 2 of Karras et al.) raises x from σ to σ̂ = (1+γ) σ by noise before the model sees it. A row adds noise
at its end, so the noise of a step's churn belongs to the last row of the step before, and that of the first step to the
start, whose standard deviation is then √(σ² + s_noise² (σ̂² - σ²)). The samples' distribution is the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..table import StepTable
from ..utils.checks import takes_numbers
from ._prediction import Array
from .denoiser import RAW, Denoiser, at_least_0, denoising_table, noise_levels

_Columns = dict[str, Any]


@takes_numbers
def euler(
    sigmas: ArrayLike,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = np.inf,
    s_noise: float = 1.0,
    denoiser: Denoiser = RAW,
) -> StepTable:
    """Euler's method on the probability-flow ODE: algorithm 2 of Karras et al. 2022 at first order; DDIM without churn.
    (diffusers' `EulerDiscreteScheduler` and `EDMEulerScheduler` add the noise of their churn after the model call.)

    Args:
        sigmas: noise levels [N + 1], see `fastcfg.sigmas`: finite, falling strictly, the last at least 0.
        s_churn: N γ, 0 for none; γ is at most √2 - 1.
        s_tmin, s_tmax: the levels between which there is churn.
        s_noise: factor of its noise, at least 0.
        denoiser: what the model predicts, by default D(x, σ).

    Result: a table of N rows. Its start is sigmas[0] times noise, and the first churn's.

    Raises:
        TypeError: denoiser not a Denoiser.
        ValueError: sigmas not as described, or a number of the churn out of its range.

    Example:
        >>> from fastcfg import sigmas
        >>> table = euler(sigmas.karras(10, 0.1, 10.0))
        >>> len(table), round(table.initial_scale, 6)
        (10, 10.0)
    """
    σ, σ_to, noise, start = _churned_levels(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    columns: _Columns = {"a_x": σ_to / σ, "a_0": 1 - σ_to / σ, "s": noise}
    return denoising_table(denoiser, σ, start[0], **columns, noise=start, end=σ_to[-1], name="euler")


@takes_numbers
def euler_ancestral(
    sigmas: ArrayLike, *, eta: float = 1.0, s_noise: float = 1.0, denoiser: Denoiser = RAW
) -> StepTable:
    """Euler steps to σ_down, then noise: DDPM with the small variance at eta 1 (Ho et al. 2020,
    https://arxiv.org/abs/2006.11239).

    Args, errors, result: as `euler`, and eta: 0 for the ODE to 1; s_noise: factor of the noise, at least 0.
    """
    σ, σ_to, σ_down, σ_up = ancestral_levels(sigmas, eta, s_noise)
    columns: _Columns = {"a_x": σ_down / σ, "a_0": 1 - σ_down / σ, "s": σ_up}
    return denoising_table(denoiser, σ, σ[0], **columns, end=σ_to[-1], name="euler_ancestral")


@takes_numbers
def heun(
    sigmas: ArrayLike,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = np.inf,
    s_noise: float = 1.0,
    denoiser: Denoiser = RAW,
) -> StepTable:
    """Heun's method of second order: algorithm 2 of Karras et al. 2022, their stochastic sampler, which without churn
    is algorithm 1; a step to σ' = 0 is Euler's.

    Args, errors: as `euler`. Result: two rows a step, one for a step to 0, with one saved tensor.
    """
    σ, σ_to, noise, start = _churned_levels(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    # h0 <- d. At the second stage x is X + dt d, so X + dt (d + d_2)/2 is x + dt (d_2 - d)/2.
    half = (σ_to - σ) / 2
    slope = half / _or_1(σ_to)
    saved, second = {"k_x": 1 / σ, "k_0": -1 / σ}, {"a_x": 1 + slope, "a_0": -slope, "a_h0": -half, "s": noise}
    return _two_stages(denoiser, σ, σ_to, σ_to, start, saved, second, "heun")


@takes_numbers
def dpm2(
    sigmas: ArrayLike,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = np.inf,
    s_noise: float = 1.0,
    denoiser: Denoiser = RAW,
) -> StepTable:
    """DPM-Solver-2 (Lu et al. 2022, https://arxiv.org/abs/2206.00927, algorithm 1) as k-diffusion has it: the midpoint
    method in σ, with the midpoint of log σ. Args, errors, result: as `heun`.
    """
    σ, σ_to, noise, start = _churned_levels(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    return _dpm2(denoiser, σ, σ_to, σ_to, noise, start, "dpm2")


@takes_numbers
def dpm2_ancestral(sigmas: ArrayLike, *, eta: float = 1.0, s_noise: float = 1.0, denoiser: Denoiser = RAW) -> StepTable:
    """`dpm2` steps to σ_down, then noise. Args, errors: as `euler_ancestral`. Result: as `heun`."""
    σ, σ_to, σ_down, σ_up = ancestral_levels(sigmas, eta, s_noise)
    return _dpm2(denoiser, σ, σ_to, σ_down, σ_up, σ, "dpm2_ancestral")


@takes_numbers
def dpmpp_2s_ancestral(
    sigmas: ArrayLike, *, eta: float = 1.0, s_noise: float = 1.0, denoiser: Denoiser = RAW
) -> StepTable:
    """DPM-Solver++(2S) (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 1, r = 1/2) to σ_down, then noise.
    Args, errors: as `euler_ancestral`. Result: as `heun`.
    """
    σ, σ_to, σ_down, σ_up = ancestral_levels(sigmas, eta, s_noise)
    # h0 <- X: the second stage moves the step's start along the x0 seen halfway.
    second = {"a_0": 1 - σ_down / σ, "a_h0": σ_down / σ, "s": σ_up}
    return _two_stages(denoiser, σ, np.sqrt(σ * σ_down), σ_to, σ, {"k_x": 1.0}, second, "dpmpp_2s_ancestral")


def _dpm2(denoiser: Denoiser, σ: Array, σ_to: Array, σ_down: Array, noise: Array, start: Array, name: str) -> StepTable:
    σ_mid = np.sqrt(σ * σ_down)
    # h0 <- X, and X + (σ_down - σ) d_2.
    slope = (σ_down - σ) / _or_1(σ_mid)
    second = {"a_x": slope, "a_0": -slope, "a_h0": 1.0, "s": noise}
    return _two_stages(denoiser, σ, σ_mid, σ_to, start, {"k_x": 1.0}, second, name)


def ancestral_levels(sigmas: ArrayLike, eta: float, s_noise: float) -> tuple[Array, Array, Array, Array]:
    """(σ, σ', σ_down, s_noise σ_up) of every step, each [N]."""
    at_least_0(eta=eta, s_noise=s_noise)
    if eta > 1:
        raise ValueError(f"eta: got {eta}, expected 0 to 1")
    σ = noise_levels(sigmas)
    σ, σ_to = σ[:-1], σ[1:]
    σ_up = eta * σ_to * np.sqrt(1 - (σ_to / σ) ** 2)
    # √(σ'² - σ_up²), without the difference.
    return σ, σ_to, σ_to * np.sqrt(1 - eta**2 + (eta * σ_to / σ) ** 2), s_noise * σ_up


def _churned_levels(
    sigmas: ArrayLike, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> tuple[Array, Array, Array, Array]:
    """(σ̂, σ', the standard deviation of the next step's churn, the noise's deviation in the state after its own churn)
    of every step, each [N]."""
    at_least_0(s_churn=s_churn, s_tmin=s_tmin, s_noise=s_noise)
    if not s_tmax >= s_tmin:
        raise ValueError(f"s_tmax: got {s_tmax}, expected at least s_tmin {s_tmin}")
    σ = noise_levels(sigmas)
    σ, σ_to = σ[:-1], σ[1:]
    γ = np.where((σ >= s_tmin) & (σ <= s_tmax), min(s_churn / len(σ), np.sqrt(2) - 1), 0.0)
    added = s_noise * σ * np.sqrt(γ * (2 + γ))
    return (1 + γ) * σ, σ_to, np.append(added[1:], 0.0), np.hypot(σ, added)


def _two_stages(
    denoiser: Denoiser, σ: Array, σ_mid: Array, σ_to: Array, start: Array, saved: _Columns, second: _Columns, name: str
) -> StepTable:
    """Rows of steps from σ to σ_to, each [N]: an Euler step to σ_mid that saves a tensor, and the columns of the second
    stage there; a step to 0 has no second stage. `start` is the noise's deviation in the state before each step."""
    first = {"a_x": σ_mid / σ, "a_0": 1 - σ_mid / σ, **saved}
    rows = 2 * len(σ) - (σ_to[-1] == 0)

    def interleaved(one: Array | float, two: Array | float) -> Array:
        return np.stack(np.broadcast_arrays(one, two, σ)[:2], axis=1).ravel()[:rows]

    columns: _Columns = {
        column: interleaved(first.get(column, 0.0), second.get(column, 0.0)) for column in {*first, *second}
    }
    columns["slot"] = interleaved(np.where(σ_to > 0, 0.0, -1.0), -1.0)
    columns |= {"noise": interleaved(start, σ_mid), "steps": np.arange(rows) // 2, "name": name}
    return denoising_table(denoiser, interleaved(σ, σ_mid), start[0], end=σ_to[-1], **columns)


def _or_1(σ: Array) -> Array:
    """σ, with 1 in place of 0, at the end of a step that has no second stage."""
    return np.where(σ > 0, σ, 1.0)
