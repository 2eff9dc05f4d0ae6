"""Ancestral sampling of DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239)."""

from __future__ import annotations

import numpy as np

from ..schedule import Schedule
from ..table import NO_NOISE, StepTable
from ..utils.checks import check_one_of, takes_numbers
from ._prediction import Array, check_schedule, timestep_table

VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


@takes_numbers
def ddpm(
    schedule: Schedule, *, prediction: str = "epsilon", variance: str = "learned_range", rescale_timesteps: bool = False
) -> StepTable:
    """x_{t-1} ~ N(μ̃(x_t, x0), σ²): guided-diffusion's and GLIDE's `p_sample_loop`.

    A classifier's gradient g moves the mean by σ² g, at the last step too (Dhariwal & Nichol 2021, algorithm 1;
    guided-diffusion's `condition_mean`).

    Args, errors: as `ddim`, and
        variance: "fixed_small" (β̃), "fixed_large" (β), "learned" (the model's second C channels are log σ²) or
            "learned_range" (they interpolate log σ² between log β̃ at -1 and log β at +1; Nichol & Dhariwal 2021,
            https://arxiv.org/abs/2102.09672).

    Result: as `ddim`; the last row adds no noise.

    Raises:
        ValueError: unknown variance, or a schedule with coefficients that are not finite.

    Example:
        >>> table = ddpm(Schedule.named("squaredcos_cap_v2", 1000).respace(50))
        >>> len(table), table.learned_variance
        (50, True)
    """
    check_one_of("variance", variance, VARIANCES)
    check_schedule(schedule)
    n = schedule.num_timesteps
    zero: Array = np.zeros(n)
    a_x, a_0, a_m = schedule.posterior_mean_coef2, schedule.posterior_mean_coef1, zero
    if prediction == "previous_x":
        a_x, a_0, a_m = zero, zero, np.ones(n)
    # log2 std = l_0 + l_v*v. The last step is the mean itself; its variance a_g counts only for a gradient.
    noisy = np.arange(n) > 0
    s = l_0 = l_v = zero
    low, high = schedule.posterior_log_variance_clipped, np.log(schedule.betas)
    if variance == "fixed_small":
        s, a_g = np.where(noisy, np.exp(0.5 * low), 0.0), schedule.posterior_variance
    elif variance == "fixed_large":
        s, a_g = np.where(noisy, np.sqrt(schedule.fixed_large_variance), 0.0), schedule.fixed_large_variance
    elif variance == "learned":
        l_0, l_v, a_g = np.where(noisy, 0.0, NO_NOISE), np.full(n, 0.5 / np.log(2)), np.ones(n)
    else:
        # log σ² = f*high + (1 - f)*low with f = (v + 1)/2.
        l_0, l_v = np.where(noisy, (high + low) / (4 * np.log(2)), NO_NOISE), (high - low) / (4 * np.log(2))
        a_g = np.exp(0.5 * (high + low))

    columns = {"a_x": a_x, "a_0": a_0, "a_m": a_m, "s": s, "l_0": l_0, "l_v": l_v, "a_g": a_g}
    learned = {"learned_variance": variance.startswith("learned")}
    return timestep_table(schedule, prediction, rescale_timesteps, **columns, **learned, name="ddpm")
