"""Langevin dynamics: annealed over noise levels, at one level, and as the corrector of another solver.

A step at level ᾱ is x' = x + δ/2 ∇ log p(x) + √δ z with ∇ log p(x) = -ε/√(1-ᾱ). Everywhere δ = step_size (1-ᾱ), so that
step_size means the same at every level: pure noise is scaled by 1 - step_size/2 before √step_size of new noise is
added, and from 4 on that diverges. A signal-to-noise ratio r of Song et al. is a step_size of 4 r² (0.16 is 0.1), with
the norms that they measure replaced by their expectations. ε is re-derived from the clipped x0, as in `ddim`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..schedule import Schedule
from ..table import StepTable
from ..utils.checks import check_count, takes_numbers
from ._prediction import Array, check_schedule, levels_of, x0_coefficients

_Ints = NDArray[np.int64]


@takes_numbers
def langevin(
    schedule: Schedule,
    *,
    steps_per_level: int = 1,
    step_size: float = 0.3,
    denoise: bool = True,
    prediction: str = "epsilon",
    rescale_timesteps: bool = False,
) -> StepTable:
    """Annealed Langevin dynamics (Song & Ermon 2019, https://arxiv.org/abs/1907.05600) from the noisiest level to the
    least noisy one. Samples get better with the number of steps; count on several hundred.

    Between levels x stays as it is, as in the corrector-only sampler of Song et al. 2021: variance-preserving levels
    have about one scale. (Keeping x/√ᾱ, as for variance-exploding levels, scales x by 20,000 in the cosine schedule.)

    Args, errors: as `ddim`, and
        schedule: the process, re-spaced to the levels wanted.
        steps_per_level: Langevin steps at each of them, at least 1.
        step_size: δ/(1-ᾱ), in (0, 4). Larger steps mix faster and leave more noise.
        denoise: end with a row that returns x0, without the last level's noise (Jolicoeur-Martineau et al. 2020,
            https://arxiv.org/abs/2009.05475).

    Returns:
        A table of `steps_per_level` rows for each level, which share a step; the row of `denoise` is in the last one.

    Example:
        >>> table = langevin(Schedule.named("cosine", 1000).respace(100), steps_per_level=5)
        >>> len(table), table.num_steps
        (501, 100)
    """
    check_schedule(schedule)
    check_count("steps_per_level", steps_per_level)
    levels = np.repeat(np.arange(schedule.num_timesteps)[::-1], steps_per_level)
    sizes = _sizes(step_size, len(levels))
    steps = schedule.num_timesteps - 1 - levels
    return _table(schedule, levels, sizes, steps, denoise, prediction, rescale_timesteps, "langevin")


@takes_numbers
def sgld(
    schedule: Schedule,
    timestep: int,
    num_steps: int,
    *,
    step_size: float | Sequence[float] = 0.1,
    denoise: bool = False,
    prediction: str = "epsilon",
    rescale_timesteps: bool = False,
) -> StepTable:
    """Langevin dynamics at one noise level (Welling & Teh 2011, https://dl.acm.org/doi/10.5555/3104482.3104568).

    With guidance of scale γ they sample the density proportional to p(x_t)^(1-γ) p(x_t | y)^γ.

    Args, errors: as `langevin`, and
        timestep: the level, an index into the schedule, 0 the least noisy.
        num_steps: Langevin steps, at least 1.
        step_size: δ/(1-ᾱ), in (0, 4): one number, or one for each step, say a (b + i)^-c with 1/2 < c <= 1 to end
            without a bias.

    Result: a table of `num_steps` rows, and the row of `denoise` in the last one's step.
    """
    check_schedule(schedule)
    check_count("num_steps", num_steps)
    if not 0 <= timestep < schedule.num_timesteps:
        raise ValueError(f"timestep: got {timestep}, expected 0 ... {schedule.num_timesteps - 1}")
    sizes, levels = _sizes(step_size, num_steps), np.full(num_steps, timestep)
    return _table(schedule, levels, sizes, np.arange(num_steps), denoise, prediction, rescale_timesteps, "sgld")


@takes_numbers
def predictor_corrector(
    predictor: StepTable, schedule: Schedule, *, corrector_steps: int = 1, step_size: float = 0.1
) -> StepTable:
    """Langevin steps at the level of each step of another solver, before it (Song et al. 2021,
    https://arxiv.org/abs/2011.13456).

    Args:
        predictor: a table of this package for the same schedule, such as `ddpm(schedule)` or `ddim(schedule)`; its rows
            say what the model predicts.
        schedule: the process.
        corrector_steps: Langevin steps before each step of the predictor, at least 1.
        step_size: δ/(1-ᾱ), in (0, 4).

    Result: the predictor's table with `corrector_steps` more rows at the head of each step, whose index they share.

    Raises:
        TypeError: predictor not a StepTable, or schedule not a Schedule.
        ValueError: a number out of its range, or a predictor with steps that do not begin at timesteps of the schedule,
            or with an x that is not the schedule's (c_in is not 1).

    Example:
        >>> from fastcfg.solvers import ddim
        >>> schedule = Schedule.named("linear", 1000).respace(50)
        >>> table = predictor_corrector(ddim(schedule), schedule, corrector_steps=2)
        >>> len(table), table.num_steps
        (150, 50)
    """
    if not isinstance(predictor, StepTable):
        raise TypeError(f"predictor: got {type(predictor).__name__}, expected a StepTable")
    check_schedule(schedule)
    check_count("corrector_steps", corrector_steps)
    (size,) = _sizes(step_size, 1)
    if (predictor["c_in"] != 1).any():
        raise ValueError(f"predictor: got the table {predictor.name} with c_in other than 1, expected one over x_t")
    first = np.flatnonzero(np.diff(predictor.steps, prepend=-1))
    ᾱ = schedule.alphas_cumprod[_levels(predictor, first, schedule)]
    columns = {name: predictor[name][first] for name in ("t", "p_x", "p_m")}
    inserted = StepTable.from_columns(**columns, **_step(ᾱ, size, predictor.learned_variance)).rows
    # Before the first row of each of the predictor's steps.
    at = np.repeat(first, corrector_steps)
    rows = np.insert(predictor.rows, at, np.repeat(inserted, corrector_steps, axis=0), axis=0)
    steps = np.insert(predictor.steps, at, predictor.steps[at])
    levels = None if predictor.levels is None else np.insert(predictor.levels, at, predictor.levels[at], axis=0)
    return replace(predictor, rows=rows, steps=steps, levels=levels, rebuild=None, name="predictor_corrector")


def _table(
    schedule: Schedule,
    levels: _Ints,
    sizes: Array,
    steps: _Ints,
    denoise: bool,
    prediction: str,
    rescale: bool,
    name: str,
) -> StepTable:
    """Langevin steps at some levels, and a row that returns the x0 of the last one."""
    columns = _step(schedule.alphas_cumprod[levels], sizes)
    if denoise:
        levels, steps = np.append(levels, levels[-1]), np.append(steps, steps[-1])
        columns = {key: np.append(column, float(key == "a_0")) for key, column in columns.items()}
    p_x, p_m = x0_coefficients(schedule, prediction)
    columns |= {"t": schedule.model_timesteps(rescale)[levels], "p_x": p_x[levels], "p_m": p_m[levels]}
    states = levels_of(
        np.append(schedule.alphas_cumprod[levels], 1.0 if denoise else schedule.alphas_cumprod[levels[-1]])
    )
    return StepTable.from_columns(steps=steps, **columns, levels=states, integer_time=not rescale, name=name)


def _step(ᾱ: Array, step_size: Array, learned_variance: bool = False) -> dict[str, Array]:
    """x' = x - δ/2 (x - √ᾱ x0)/(1-ᾱ) + √δ z, as columns over (x, x0)."""
    std = np.sqrt(step_size * (1 - ᾱ))
    # A table of learned variances takes its std from l_0 + l_v*v.
    noise = {"l_0": np.log2(std)} if learned_variance else {"s": std}
    return {"a_x": np.broadcast_to(1 - step_size / 2, ᾱ.shape), "a_0": step_size / 2 * np.sqrt(ᾱ), **noise}


def _levels(predictor: StepTable, first: _Ints, schedule: Schedule) -> _Ints:
    """The timestep at which each step of the predictor begins."""
    times = predictor["t"][first].tolist()
    # Float times are not always rescaled ones: those of `prk` lie between two timesteps.
    for rescale in (not predictor.integer_time, False):
        level_of = {time: level for level, time in enumerate(schedule.model_timesteps(rescale).tolist())}
        if set(times) <= level_of.keys():
            return np.array([level_of[time] for time in times])
    got, expected = f"the table {predictor.name} with steps beginning at times {times}", schedule.model_timesteps()
    raise ValueError(f"predictor: got {got}, expected some of the schedule's, {expected.tolist()}")


def _sizes(step_size: float | Sequence[float], num_steps: int) -> Array:
    sizes = np.asarray(step_size, dtype=np.float64)
    if sizes.shape not in ((), (num_steps,)):
        raise ValueError(f"step_size: got shape {sizes.shape}, expected a number or {num_steps} numbers")
    if not ((sizes > 0) & (sizes < 4)).all():
        raise ValueError(f"step_size: got {step_size}, expected values in (0, 4)")
    return np.broadcast_to(sizes, num_steps)
