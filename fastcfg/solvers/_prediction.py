"""What a model of a discrete process predicts, as the numbers that turn (x, output) into x0 or ε."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schedule import Schedule
from ..table import StepTable

Array = NDArray[np.float64]

PREDICTIONS = ("epsilon", "x0", "v", "previous_x")


def check_schedule(schedule: Any) -> None:
    """Raise TypeError for anything but a Schedule, such as a number of steps."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule: got {type(schedule).__name__}, expected a Schedule (see Schedule.named)")


def x0_coefficients(schedule: Schedule, prediction: str) -> tuple[Array, Array]:
    """(p_x, p_m), float64 [T] by timestep, with x0 = p_x*x + p_m*output: `level_coefficients`, or for "previous_x", the
    mean of x_{t-1} (guided-diffusion's PREVIOUS_X), solved for the x0 with that posterior mean."""
    check_schedule(schedule)
    if prediction == "previous_x":
        return -schedule.posterior_mean_coef2 / schedule.posterior_mean_coef1, 1.0 / schedule.posterior_mean_coef1
    return level_coefficients(schedule.alphas_cumprod, prediction, PREDICTIONS)


def level_coefficients(ᾱ: Array, prediction: str, expected: tuple[str, ...] = PREDICTIONS[:3]) -> tuple[Array, Array]:
    """(p_x, p_m) at noise levels ᾱ, each like ᾱ, for the predictions that ᾱ alone defines.

    "epsilon": Ho et al. 2020; "x0"; "v" = √ᾱ ε - √(1-ᾱ) x0: Salimans & Ho 2022.
    """
    if prediction == "epsilon":
        with np.errstate(divide="ignore"):
            return np.sqrt(1.0 / ᾱ), -np.sqrt(1.0 / ᾱ - 1)
    if prediction == "x0":
        return np.zeros_like(ᾱ), np.ones_like(ᾱ)
    if prediction == "v":
        return np.sqrt(ᾱ), -np.sqrt(1.0 - ᾱ)
    raise ValueError(f"prediction: got {prediction!r}, expected one of {', '.join(expected)}")


def epsilon_coefficients(ᾱ: Array, p_x: Array, p_m: Array, prediction: str) -> tuple[Array, Array]:
    """(e_x, e_m), each like ᾱ, with ε = e_x*x + e_m*output."""
    if prediction == "epsilon":
        return np.zeros_like(ᾱ), np.ones_like(ᾱ)
    return (1 - np.sqrt(ᾱ) * p_x) / np.sqrt(1 - ᾱ), -np.sqrt(ᾱ) * p_m / np.sqrt(1 - ᾱ)


def timestep_table(
    schedule: Schedule, prediction: str, rescale_timesteps: bool, ascending: bool = False, /, **columns: Any
) -> StepTable:
    """A table of one row per timestep, noisiest first unless `ascending`: the prediction's p_x and p_m with `columns`,
    arrays [T] by timestep and attributes of the table."""
    p_x, p_m = x0_coefficients(schedule, prediction)
    columns |= {"t": schedule.model_timesteps(rescale_timesteps), "p_x": p_x, "p_m": p_m}
    order = slice(None) if ascending else slice(None, None, -1)
    ordered = {key: value[order] if isinstance(value, np.ndarray) else value for key, value in columns.items()}
    last = schedule.alphas_cumprod_next[-1] if ascending else 1.0
    levels = levels_of(np.append(schedule.alphas_cumprod[order], last))
    return StepTable.from_columns(integer_time=not rescale_timesteps, levels=levels, **ordered)


def levels_of(ᾱ: Array) -> Array:
    """[..., 2]: `StepTable.levels` of states at ᾱ."""
    return np.stack([np.sqrt(ᾱ), np.sqrt(1 - ᾱ)], axis=-1)
