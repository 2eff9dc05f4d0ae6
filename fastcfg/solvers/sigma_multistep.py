"""Multistep methods in noise-level space (x = x0 + σz): k-diffusion's samplers.

One model evaluation a step; earlier x0 (or slopes) are the saved tensors. With λ = -log σ, h = λ' - λ is the step and
q = h_last/h; D_1, D_2 are the x0 of the last two steps. x0 is the clipped one throughout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..table import StepTable
from ..utils.checks import check_one_of, takes_numbers
from ._multistep import history, integrals
from ._prediction import Array
from ._rebuild import rebuilt
from .denoiser import RAW, Denoiser, at_least_0, denoising_table, noise_levels

SOLVER_TYPES = ("midpoint", "heun")


@rebuilt
@takes_numbers
def dpmpp_2m(sigmas: ArrayLike, *, denoiser: Denoiser = RAW) -> StepTable:
    """DPM-Solver++(2M) (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2): second order, but for the first
    step and one to 0.

    Args, errors, result: as `euler`, with one saved tensor.
    """
    return _dpmpp_2m(sigmas, denoiser, 0.0, 1.0, "midpoint", "dpmpp_2m")


@rebuilt
@takes_numbers
def dpmpp_2m_sde(
    sigmas: ArrayLike,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
    denoiser: Denoiser = RAW,
) -> StepTable:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, https://arxiv.org/abs/2211.01095, section 5), with k-diffusion's eta.

    Args, errors, result: as `euler`, with one saved tensor, and
        eta: 0 for the ODE (then `dpmpp_2m`, for "midpoint"), 1 for the paper's SDE, or more noise still.
        s_noise: factor of the noise, at least 0.
        solver_type: how x0 is extrapolated: "midpoint", or "heun".
    """
    check_one_of("solver_type", solver_type, SOLVER_TYPES)
    return _dpmpp_2m(sigmas, denoiser, eta, s_noise, solver_type, "dpmpp_2m_sde")


@rebuilt
@takes_numbers
def dpmpp_3m_sde(sigmas: ArrayLike, *, eta: float = 1.0, s_noise: float = 1.0, denoiser: Denoiser = RAW) -> StepTable:
    """k-diffusion's three-step relative of SDE-DPM-Solver++ (https://arxiv.org/abs/2211.01095); it is in no paper.

    As in k-diffusion, the curvature of x0 counts half of what third order takes (its second divided difference stands
    for its second derivative), so at eta 0 it is of second order with a small error. The first two steps have the order
    that the x0 before them allow.

    Args, errors, result: as `euler_ancestral`, with eta unbounded and two saved tensors.
    """
    σ, end, a_x, h, noise, taken = _sde_levels(sigmas, eta, s_noise)
    rows = np.arange(len(σ))
    φ_2 = 1 - (1 - a_x) / h
    φ_3 = φ_2 / h - 0.5
    # r0 = h_1/h, r1 = h_2/h: 1 where there is no such step.
    r0, r1 = _ratio(h, 1), _ratio(h, 2)
    third = taken & (rows >= 2)
    # x' = ... + on_first (x0 - D_1)/r0 + on_second (D_1 - D_2)/r1
    on_second = np.where(third, (φ_3 - φ_2 * r0) / (r0 + r1), 0.0)
    on_first = np.where(taken & (rows >= 1), φ_2 - on_second, 0.0)
    on_D_1, on_D_2 = on_second / r1 - on_first / r0, -on_second / r1
    # Row i's x0 replaces D_2, which it is the last to read.
    odd = rows % 2 == 1
    columns: dict[str, Any] = {"a_x": a_x, "a_0": 1 - a_x + on_first / r0, "s": noise, "k_0": 1.0, "slot": rows % 2}
    columns |= {"a_h0": np.where(odd, on_D_1, on_D_2), "a_h1": np.where(odd, on_D_2, on_D_1)}
    return denoising_table(denoiser, σ, σ[0], **columns, end=end, name="dpmpp_3m_sde")


@rebuilt
@takes_numbers
def lms(sigmas: ArrayLike, *, order: int = 4, denoiser: Denoiser = RAW) -> StepTable:
    """Linear multistep: Adams-Bashforth for uneven steps, on the ODE dx/dσ = d of Karras et al. 2022
    (https://arxiv.org/abs/2206.00364).

    Args, errors, result: as `euler`, with order - 1 saved tensors, and order: 1 (`euler`) to 4, the number of slopes d
    combined, less in the first steps.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order: got {order}, expected 1, 2, 3 or 4")
    levels = noise_levels(sigmas)
    σ = levels[:-1]
    # Two Gauss points integrate the cubics of order 4 exactly.
    rule, weights = np.polynomial.legendre.leggauss(2), np.zeros((4, len(σ)))
    for n in range(len(σ)):
        known = levels[n - np.arange(min(n + 1, order))]
        weights[: len(known), n] = integrals(np.ones_like, levels[n], levels[n + 1], known, rule)
    columns: dict[str, Any] = {"a_x": 1 + weights[0] / σ, "a_0": -weights[0] / σ, "k_x": 1 / σ, "k_0": -1 / σ}
    return denoising_table(denoiser, σ, σ[0], **columns, **history(weights[1:order]), end=levels[-1], name="lms")


def _dpmpp_2m(
    sigmas: ArrayLike, denoiser: Denoiser, eta: float, s_noise: float, solver_type: str, name: str
) -> StepTable:
    σ, end, a_x, h, noise, taken = _sde_levels(sigmas, eta, s_noise)
    extrapolated = (1 - a_x) / 2 if solver_type == "midpoint" else 1 - (1 - a_x) / h
    weight = np.where(taken & (np.arange(len(σ)) >= 1), extrapolated / _ratio(h, 1), 0.0)
    columns: dict[str, Any] = {"a_x": a_x, "a_0": 1 - a_x + weight, "a_h0": -weight, "s": noise, "k_0": 1.0, "slot": 0}
    return denoising_table(denoiser, σ, σ[0], **columns, end=end, name=name)


def _sde_levels(
    sigmas: ArrayLike, eta: float, s_noise: float
) -> tuple[Array, float, Array, Array, Array, NDArray[np.bool_]]:
    """σ, and the level at the end; e^-h with h = (1 + eta)(λ' - λ); h, 1 for a step to 0; the noise's standard
    deviation; and whether the step ends above 0. Each [N] but for the end."""
    at_least_0(eta=eta, s_noise=s_noise)
    levels = noise_levels(sigmas)
    σ, σ_to = levels[:-1], levels[1:]
    ratio, taken = σ_to / σ, σ_to > 0
    h = np.where(taken, -(1 + eta) * np.log(np.where(taken, ratio, np.exp(-1))), 1.0)
    return σ, levels[-1], ratio ** (1 + eta), h, s_noise * σ_to * np.sqrt(1 - ratio ** (2 * eta)), taken


def _ratio(h: Array, age: int) -> Array:
    """h of the step `age` steps before, over h; 1 where there is none."""
    return np.concatenate([h[:age], h[:-age]])[: len(h)] / h
