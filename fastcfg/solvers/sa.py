"""SA-Solver (Xue et al. 2023, https://arxiv.org/abs/2305.19164) in noise-level space, predicting x0."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..table import StepTable
from ..utils.checks import takes_numbers
from ._multistep import data_table
from ._rebuild import rebuilt
from .denoiser import RAW, Denoiser, noise_levels


@rebuilt
@takes_numbers
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

    Args, errors: as `euler`, and
        predictor_order: the number of x0 that a step combines, 1 to 3, less in the first steps.
        corrector_order: the number it combines when taken again, the one at its end included, 1 to 4.
        tau: τ, one number or one for each of the N steps, at least 0: 0 is the ODE, 1 the noise of DDPM. diffusers'
            default is 1 at timesteps 200 to 800 and 0 elsewhere.
        lower_order_final: as `unipc`.

    Result: as `euler`, with max(predictor_order, corrector_order - 1) saved tensors.
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
    noise = σ_to * np.sqrt(1 - (σ_to / σ) ** (2 * (c - 1)))
    orders = (predictor_order, corrector_order, lower_order_final)
    return data_table(denoiser, levels, *orders, lambda h: -c * h, c, s=noise, name="sa_solver")
