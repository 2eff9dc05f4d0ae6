"""What a model predicts, as the two numbers that turn (x, output) into x0."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..schedule import Schedule

PREDICTIONS = ("epsilon", "x0", "v", "previous_x")


def x0_coefficients(schedule: Schedule, prediction: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(p_x, p_m), each float64 [T] by timestep, with x0 = p_x*x + p_m*output.

    "epsilon": Ho et al. 2020; "x0"; "v" = √ᾱ ε - √(1-ᾱ) x0: Salimans & Ho 2022; "previous_x": the mean of x_{t-1}
    (guided-diffusion's PREVIOUS_X), solved for the x0 whose posterior mean it is.
    """
    if prediction == "epsilon":
        return schedule.sqrt_recip_alphas_cumprod, -schedule.sqrt_recipm1_alphas_cumprod
    if prediction == "x0":
        return np.zeros(schedule.num_timesteps), np.ones(schedule.num_timesteps)
    if prediction == "v":
        return schedule.sqrt_alphas_cumprod, -schedule.sqrt_one_minus_alphas_cumprod
    if prediction == "previous_x":
        return -schedule.posterior_mean_coef2 / schedule.posterior_mean_coef1, 1.0 / schedule.posterior_mean_coef1
    raise ValueError(f"prediction: got {prediction!r}, expected one of {', '.join(PREDICTIONS)}")
