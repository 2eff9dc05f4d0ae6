"""Solvers and schedules by name, for models of a discrete process: what `TextToImage.sample` and `fastcfg sample` take.

Two kinds of solvers differ in what `schedule` means. Those on timesteps keep some timesteps of the process, those in
noise-level space take levels, which the model sees as the nearest times of the process.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import sigmas
from ..schedule import Schedule, consistency_timesteps, space_timesteps
from ..table import StepTable
from ..utils.checks import check_count, takes_numbers
from ._prediction import check_schedule
from .cfg_pp import ddim_cfg_pp, euler_ancestral_cfg_pp, euler_cfg_pp
from .consistency import lcm, tcd
from .ddim import ddim, ddim_extrapolated
from .ddpm import ddpm
from .deis import deis
from .denoiser import Denoiser
from .langevin import langevin, predictor_corrector
from .pndm import plms, prk
from .sa import sa_solver
from .sigma import dpm2, dpm2_ancestral, dpmpp_2s_ancestral, euler, euler_ancestral, heun
from .sigma_multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, lms
from .unipc import unipc

__all__ = ["LEVELS", "SOLVERS", "SPACINGS", "solver_table"]

_Build = Callable[..., StepTable]


_ON_TIMESTEPS: dict[str, _Build] = {
    **{build.__name__: build for build in (ddpm, ddim, ddim_extrapolated, ddim_cfg_pp, plms, prk, lcm, tcd, langevin)},
    "predictor_corrector": lambda schedule: predictor_corrector(ddpm(schedule), schedule),
}
_ON_LEVELS: dict[str, _Build] = {
    build.__name__: build
    for build in (
        *(euler, euler_ancestral, euler_cfg_pp, euler_ancestral_cfg_pp, heun, dpm2, dpm2_ancestral),
        *(dpmpp_2s_ancestral, lms, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, unipc, deis, sa_solver),
    )
}
SOLVERS = (*_ON_TIMESTEPS, *_ON_LEVELS)

# What `schedule` may be with solvers on timesteps, and with those in noise-level space besides.
SPACINGS = tuple(spacing for spacing in sigmas.SPACINGS if spacing != "beta")
_LEVELS: dict[str, Callable[[int, float, float], Any]] = {
    "karras": sigmas.karras,
    "exponential": sigmas.exponential,
    "polyexponential": sigmas.polyexponential,
    "beta": sigmas.beta,
    "align_your_steps": lambda n, low, high: sigmas.align_your_steps(n),
}
LEVELS = tuple(_LEVELS)

# Levels are the process's own, within this range: those of processes that end in nearly pure noise reach 20,000.
_LOWEST, _HIGHEST = 0.02, 80.0
# plms and prk take the model's ε unclipped, and its errors count σ times: they start at a level up to this one.
_HIGHEST_UNCLIPPED = 15.0


@takes_numbers
def solver_table(
    solver: str, schedule: Schedule, steps: int | str = 50, spacing: str | None = None, eta: float | None = None
) -> StepTable:
    """The table of a named solver for a model that predicts ε, with learned variances, of a discrete process.

    Args:
        solver: one of `SOLVERS`, the functions of `fastcfg.solvers` of these names with their own defaults;
            "predictor_corrector" corrects `ddpm`.
        schedule: the whole process.
        steps: their number, 1 to T ("lcm" and "tcd": to 50), or, for solvers on timesteps, a respacing such as
            "10,15,20", "ddim50" or "fast27" (`fastcfg.schedule.space_timesteps`).
        spacing: one of `SPACINGS` (spacings of `fastcfg.sigmas.from_schedule`) or, for solvers in noise-level space,
            of `LEVELS` (functions of `fastcfg.sigmas`, over the process's levels from 0.02 to 80). None is "karras"
            there, and guided-diffusion's respacing for solvers on timesteps.
        eta: of solvers that have one (γ of "tcd"); None is the solver's default.

    Raises:
        TypeError: schedule not a Schedule.
        ValueError: an unknown name, or options that do not go together.

    Example:
        >>> solver_table("dpmpp_2m", Schedule.named("cosine"), 20, "karras").num_rows
        20
    """
    check_schedule(schedule)
    build = _ON_TIMESTEPS.get(solver) or _ON_LEVELS.get(solver)
    if build is None:
        raise ValueError(f"solver: got {solver!r}, expected one of {', '.join(SOLVERS)}")
    name_of_eta = "gamma" if build is tcd else "eta"
    options: dict[str, Any] = {} if eta is None else {name_of_eta: eta}
    if name_of_eta not in inspect.signature(build).parameters:
        options = {}
    if eta and not options:
        raise ValueError(f"eta: got {eta!r} with solver {solver!r}, expected 0 or None: it has no eta")
    count: int | str = int(steps) if isinstance(steps, str) and steps.isdecimal() else steps
    if not isinstance(count, str):
        count = check_count("steps", count, schedule.num_timesteps)
    expected = SPACINGS if solver in _ON_TIMESTEPS else (*LEVELS, *SPACINGS)
    if build in (lcm, tcd):
        expected = ()  # their models are distilled for certain timesteps
    if spacing is not None and spacing not in expected:
        names = ", ".join(expected) or "None"
        raise ValueError(f"schedule: got {spacing!r} with solver {solver!r}, expected one of {names}")
    if isinstance(count, str) and (spacing is not None or expected != SPACINGS):
        what = f"solver {solver!r}" if spacing is None else f"schedule {spacing!r}"
        raise ValueError(f"steps: got the respacing {count!r} with {what}, expected a number of steps")
    if solver in _ON_LEVELS:
        denoiser = Denoiser("epsilon", schedule=schedule)
        return build(_levels(schedule, count, spacing or "karras"), denoiser=denoiser, **options)  # type: ignore[arg-type]
    if build is tcd:
        return tcd(schedule, _distilled(schedule, count), **options)
    if build is lcm:
        return lcm(schedule.respace(_distilled(schedule, count)))
    return build(_respaced(schedule, count, spacing, build), **options)


def _levels(schedule: Schedule, n: int, spacing: str) -> Any:
    if spacing in SPACINGS:
        return sigmas.from_schedule(schedule, n, spacing)[0]
    levels = sigmas.discrete_sigmas(schedule)
    return _LEVELS[spacing](n, max(float(levels[0]), _LOWEST), min(float(levels[-1]), _HIGHEST))


def _distilled(schedule: Schedule, n: Any) -> list[int]:
    T = schedule.num_timesteps
    known = min(50, T)
    if n > known:
        raise ValueError(f"steps: got {n}, expected 1 to {known}, the timesteps that such models are distilled for")
    return consistency_timesteps(n, T, known)


def _respaced(schedule: Schedule, steps: Any, spacing: str | None, build: _Build) -> Schedule:
    """The timesteps kept of a process."""
    T = schedule.num_timesteps
    if build is prk and isinstance(steps, int):
        # Its steps lead from the second timestep to the last but one.
        if steps > T - 2:
            raise ValueError(f"steps: got {steps}, expected 1 to {T - 2} with solver 'prk'")
        steps += 2
    if spacing is not None:
        return schedule.respace(np.unique(np.rint(sigmas.spaced_timesteps(T, steps, spacing)).astype(int)).tolist())
    if build in (plms, prk) and isinstance(steps, int):
        usable = int(np.searchsorted(schedule.sqrt_recipm1_alphas_cumprod, _HIGHEST_UNCLIPPED, side="right"))
        return schedule.respace(space_timesteps(max(usable, steps), str(steps)))
    try:
        return schedule.respace(steps)
    except ValueError as error:
        raise ValueError(f"steps: got {steps!r}, expected a number or another respacing ({error})") from error
