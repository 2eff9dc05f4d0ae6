"""SA-Solver (Xue et al. 2023, https://arxiv.org/abs/2305.19164) in noise-level space, predicting x0."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..table import StepTable
from ._multistep import data_weights, multistep_table, orders
from ._prediction import Array
from .denoiser import RAW, Denoiser, noise_levels


def sa_solver(
    sigmas: ArrayLike,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: ArrayLike = 1.0,
    lower_order_final: bool = True,
    denoiser: Denoiser = RAW,
) -> StepTable:
    """Stochastic Adams: a predictor and a corrector of the SDE with noise τ, one model evaluation a step.

    Equations 14 and 17 of the paper, with its authors' change of the weights where two x0 are combined; diffusers'
    `SASolverScheduler`. The corrector takes the predictor's noise again, so that it stays in x.

    Args:
        sigmas, denoiser: as `euler`, with its errors.
        predictor_order: the number of x0 that a step combines, 1 to 3, less in the first steps.
        corrector_order: the number it combines when taken again, the one at its end included, 1 to 4.
        tau: τ, one number or one for each of the N steps, at least 0: 0 is the ODE, 1 the noise of DDPM. diffusers'
            default is 1 at timesteps 200 to 800 and 0 elsewhere.
        lower_order_final: as `unipc`.

    Returns:
        A table of N rows with max(predictor_order, corrector_order - 1) saved tensors. Its start is sigmas[0] times
        noise.

    Raises:
        ValueError: tau not as described, or an unknown order.
    """
    if predictor_order not in (1, 2, 3) or corrector_order not in (1, 2, 3, 4):
        got = f"{predictor_order}, {corrector_order}"
        raise ValueError(f"predictor_order, corrector_order: got {got}, expected 1 to 3 and 1 to 4")
    levels = noise_levels(sigmas)
    σ, σ_to = levels[:-1], levels[1:]
    τ = np.asarray(tau, dtype=np.float64)
    if τ.shape not in ((), σ.shape) or not (np.isfinite(τ) & (τ >= 0)).all():
        raise ValueError(f"tau: got {τ}, expected one finite value of at least 0, or {len(σ)}")
    c = np.broadcast_to(1 + τ**2, σ.shape)
    with np.errstate(divide="ignore"):
        λ = -np.log(levels)
    predictor: list[Array] = []
    corrector: list[Array] = [np.zeros(0)]
    for n, p in enumerate(orders(levels, predictor_order, lower_order_final)):
        step = (λ[n], λ[n + 1])
        B = -c[n] * (λ[n + 1] - λ[n])
        predictor.append(data_weights(*step, λ[n - np.arange(p)], B, c[n]))
        if n + 1 < len(σ):
            q = min(corrector_order, n + 2, len(σ) - n + 1 if lower_order_final else corrector_order)
            corrector.append(data_weights(*step, λ[n + 1 - np.arange(q)], B, c[n]))
    ratio = σ_to / σ
    noise = σ_to * np.sqrt(1 - ratio ** (2 * (c - 1)))
    return multistep_table(denoiser, σ, ratio**c, predictor, corrector, s=noise, name="sa_solver")
