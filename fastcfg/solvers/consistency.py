"""Samplers of distilled models, which jump to x0, or far towards it, in every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..schedule import Schedule
from ..table import StepTable
from ..utils.checks import check_finite, takes_numbers
from ._prediction import check_schedule, level_coefficients, levels_of, timestep_table

_SIGMA_DATA = 0.5


@takes_numbers
def lcm(
    schedule: Schedule, *, timestep_scaling: float = 10.0, prediction: str = "epsilon", rescale_timesteps: bool = False
) -> StepTable:
    """Multistep sampling of latent consistency models (Luo et al. 2023, https://arxiv.org/abs/2310.04378, algorithm 3).

    f = c_out x0 + c_skip x, then noise up to the next timestep. It is diffusers' `LCMScheduler`.

    Args, errors: as `ddim`, and
        schedule: the process, re-spaced to the timesteps wanted, usually two to eight:
            `schedule.respace(fastcfg.schedule.consistency_timesteps(4))`.
        timestep_scaling: s of c_skip = 0.25/((s t)² + 0.25) and c_out = s t/√((s t)² + 0.25), t the original timestep;
            above 0.

    Result: as `ddim`, but the last row returns f.

    Example:
        >>> from fastcfg.schedule import consistency_timesteps
        >>> table = lcm(Schedule.named("scaled_linear").respace(consistency_timesteps(4)))
        >>> table["t"].tolist()
        [999.0, 759.0, 499.0, 259.0]
    """
    check_finite("timestep_scaling", timestep_scaling, above=0)
    check_schedule(schedule)
    st = timestep_scaling * schedule.timestep_map
    c_skip, c_out = _SIGMA_DATA**2 / (st**2 + _SIGMA_DATA**2), st / np.sqrt(st**2 + _SIGMA_DATA**2)
    ᾱ_prev = schedule.alphas_cumprod_prev
    columns = {"a_x": np.sqrt(ᾱ_prev) * c_skip, "a_0": np.sqrt(ᾱ_prev) * c_out, "s": np.sqrt(1 - ᾱ_prev)}
    return timestep_table(schedule, prediction, rescale_timesteps, **columns, name="lcm")


@takes_numbers
def tcd(
    schedule: Schedule,
    timesteps: Sequence[int],
    *,
    gamma: float = 0.3,
    prediction: str = "epsilon",
    rescale_timesteps: bool = False,
) -> StepTable:
    """Strategic stochastic sampling of trajectory consistency models (Zheng et al. 2024, algorithm 4).

    https://arxiv.org/abs/2402.19159: along ε to s = (1-γ) t', then noise up to t'. It is diffusers' `TCDScheduler`,
    with γ for its `eta`. ε is re-derived from the clipped x0.

    Args, errors: as `ddim`, without prediction "previous_x", and
        schedule: the whole process: s is between the timesteps.
        timesteps: falling ones, as `fastcfg.schedule.consistency_timesteps(4)`. The run ends at timestep 0.
        gamma: γ, 0 for no noise to 1 for steps through x at timestep 0.

    Result: a table of one row per timestep. The last row adds no noise.
    """
    check_schedule(schedule)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma: got {gamma}, expected 0 to 1")
    t = np.array(timesteps, dtype=np.int64)
    if t.ndim != 1 or not t.size or (np.diff(t) >= 0).any() or t[0] >= schedule.num_timesteps or t[-1] < 0:
        raise ValueError(f"timesteps: got {t.tolist()}, expected falling ones from {schedule.num_timesteps - 1} to 0")
    t_prev = np.append(t[1:], 0)
    t_s = np.floor((1 - gamma) * t_prev).astype(np.int64)
    ᾱ, ᾱ_prev, ᾱ_s = (schedule.alphas_cumprod[index] for index in (t, t_prev, t_s))
    p_x, p_m = level_coefficients(ᾱ, prediction)
    ratio = ᾱ_prev / ᾱ_s
    a_x = np.sqrt(ratio * (1 - ᾱ_s) / (1 - ᾱ))
    columns = {"p_x": p_x, "p_m": p_m, "a_x": a_x, "a_0": np.sqrt(ᾱ_prev) - a_x * np.sqrt(ᾱ), "s": np.sqrt(1 - ratio)}
    options: dict[str, Any] = {"integer_time": not rescale_timesteps, "levels": levels_of(np.append(ᾱ, ᾱ_prev[-1]))}
    times = schedule.model_timesteps(rescale_timesteps)[t]
    return StepTable.from_columns(t=times, **options, **columns, name="tcd")
