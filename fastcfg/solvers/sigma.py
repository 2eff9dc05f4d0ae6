"""One-step methods in noise-level space (x = x0 + σz): k-diffusion's samplers, without churn.

With the slope d = (x - D(x, σ))/σ of Karras et al. 2022 (https://arxiv.org/abs/2206.00364) the probability-flow ODE is
dx/dσ = d. An Euler step from σ to σ' is (σ'/σ) x + (1 - σ'/σ) x0. Ancestral methods step down further, to σ_down, and
add noise of standard deviation σ_up, with σ_down² + σ_up² = σ'². x0 is the clipped one throughout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..table import StepTable
from ._prediction import Array
from .denoiser import RAW, Denoiser, at_least_0, denoising_table, noise_levels


def euler(sigmas: ArrayLike, *, denoiser: Denoiser = RAW) -> StepTable:
    """Euler's method on the probability-flow ODE: algorithm 1 of Karras et al. 2022 at first order. It is DDIM.

    Args:
        sigmas: noise levels [N + 1], see `fastcfg.sigmas`: finite, falling strictly, the last at least 0.
        denoiser: what the model predicts, by default D(x, σ).

    Returns:
        A table of N rows. Its start is sigmas[0] times noise.

    Raises:
        TypeError: denoiser not a Denoiser.
        ValueError: sigmas not as described.

    Example:
        >>> from fastcfg import sigmas
        >>> table = euler(sigmas.karras(10, 0.1, 10.0))
        >>> len(table), round(table.initial_scale, 6)
        (10, 10.0)
    """
    return _euler(sigmas, denoiser, 0.0, 1.0, "euler")


def euler_ancestral(
    sigmas: ArrayLike, *, eta: float = 1.0, s_noise: float = 1.0, denoiser: Denoiser = RAW
) -> StepTable:
    """Euler steps to σ_down, then noise: DDPM with the small variance at eta 1 (Ho et al. 2020,
    https://arxiv.org/abs/2006.11239).

    Args:
        sigmas, denoiser: as `euler`, with its errors.
        eta: 0 for the ODE to 1.
        s_noise: factor of the noise, at least 0.

    Raises:
        ValueError: eta or s_noise out of its range.
    """
    return _euler(sigmas, denoiser, eta, s_noise, "euler_ancestral")


def heun(sigmas: ArrayLike, *, denoiser: Denoiser = RAW) -> StepTable:
    """Heun's method of second order: algorithm 1 of Karras et al. 2022; a step to σ' = 0 is Euler's.

    Args, errors: as `euler`.

    Returns:
        A table of two rows a step, one for a step to 0, with one saved tensor.
    """
    σ = noise_levels(sigmas)
    σ, σ_to = σ[:-1], σ[1:]
    # h0 <- d. At the second stage x is X + dt d, so X + dt (d + d_2)/2 is x + dt (d_2 - d)/2.
    half = (σ_to - σ) / 2
    slope = half / _or_1(σ_to)
    saved, second = {"k_x": 1 / σ, "k_0": -1 / σ}, {"a_x": 1 + slope, "a_0": -slope, "a_h0": -half}
    return _two_stages(denoiser, σ, σ_to, σ_to, saved, second, "heun")


def dpm2(sigmas: ArrayLike, *, denoiser: Denoiser = RAW) -> StepTable:
    """DPM-Solver-2 (Lu et al. 2022, https://arxiv.org/abs/2206.00927, algorithm 1) as k-diffusion takes it: the
    midpoint method in σ, whose midpoint is that of log σ.

    Args, errors, result: as `heun`.
    """
    return _dpm2(sigmas, denoiser, 0.0, 1.0, "dpm2")


def dpm2_ancestral(sigmas: ArrayLike, *, eta: float = 1.0, s_noise: float = 1.0, denoiser: Denoiser = RAW) -> StepTable:
    """`dpm2` steps to σ_down, then noise.

    Args, errors: as `euler_ancestral`. Result: as `heun`.
    """
    return _dpm2(sigmas, denoiser, eta, s_noise, "dpm2_ancestral")


def dpmpp_2s_ancestral(
    sigmas: ArrayLike, *, eta: float = 1.0, s_noise: float = 1.0, denoiser: Denoiser = RAW
) -> StepTable:
    """DPM-Solver++(2S) (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 1, r = 1/2) to σ_down, then noise.

    Args, errors: as `euler_ancestral`. Result: as `heun`.
    """
    σ, σ_to, σ_down, σ_up = _ancestral_levels(sigmas, eta, s_noise)
    # h0 <- X: the second stage moves the step's start along the x0 seen halfway.
    second = {"a_0": 1 - σ_down / σ, "a_h0": σ_down / σ, "s": σ_up}
    return _two_stages(denoiser, σ, np.sqrt(σ * σ_down), σ_to, {"k_x": 1.0}, second, "dpmpp_2s_ancestral")


def _euler(sigmas: ArrayLike, denoiser: Denoiser, eta: float, s_noise: float, name: str) -> StepTable:
    σ, _, σ_down, σ_up = _ancestral_levels(sigmas, eta, s_noise)
    return denoising_table(denoiser, σ, σ[0], a_x=σ_down / σ, a_0=1 - σ_down / σ, s=σ_up, name=name)


def _dpm2(sigmas: ArrayLike, denoiser: Denoiser, eta: float, s_noise: float, name: str) -> StepTable:
    σ, σ_to, σ_down, σ_up = _ancestral_levels(sigmas, eta, s_noise)
    σ_mid = np.sqrt(σ * σ_down)
    # h0 <- X, and X + (σ_down - σ) d_2.
    slope = (σ_down - σ) / _or_1(σ_mid)
    second = {"a_x": slope, "a_0": -slope, "a_h0": 1.0, "s": σ_up}
    return _two_stages(denoiser, σ, σ_mid, σ_to, {"k_x": 1.0}, second, name)


def _ancestral_levels(sigmas: ArrayLike, eta: float, s_noise: float) -> tuple[Array, Array, Array, Array]:
    """(σ, σ', σ_down, s_noise σ_up) of every step, each [N]."""
    at_least_0(eta=eta, s_noise=s_noise)
    if eta > 1:
        raise ValueError(f"eta: got {eta}, expected 0 to 1")
    σ = noise_levels(sigmas)
    σ, σ_to = σ[:-1], σ[1:]
    σ_up = eta * σ_to * np.sqrt(1 - (σ_to / σ) ** 2)
    # √(σ'² - σ_up²), without the difference.
    return σ, σ_to, σ_to * np.sqrt(1 - eta**2 + (eta * σ_to / σ) ** 2), s_noise * σ_up


def _two_stages(
    denoiser: Denoiser,
    σ: Array,
    σ_mid: Array,
    σ_to: Array,
    saved: dict[str, Any],
    second: dict[str, Any],
    name: str,
) -> StepTable:
    """Rows of steps from σ to σ_to, each [N]: an Euler step to σ_mid that saves a tensor, and the columns of the second
    stage there, which a step to 0 has not."""
    first = {"a_x": σ_mid / σ, "a_0": 1 - σ_mid / σ, **saved}
    rows = 2 * len(σ) - (σ_to[-1] == 0)

    def interleaved(one: Array | float, two: Array | float) -> Array:
        return np.stack(np.broadcast_arrays(one, two, σ)[:2], axis=1).ravel()[:rows]

    columns = {column: interleaved(first.get(column, 0.0), second.get(column, 0.0)) for column in {*first, *second}}
    return denoising_table(
        denoiser,
        interleaved(σ, σ_mid),
        σ[0],
        **columns,
        slot=interleaved(np.where(σ_to > 0, 0.0, -1.0), -1.0),
        steps=np.arange(rows) // 2,
        name=name,
    )


def _or_1(σ: Array) -> Array:
    """σ, and 1 in place of the 0 of a stage that is not taken."""
    return np.where(σ > 0, σ, 1.0)
