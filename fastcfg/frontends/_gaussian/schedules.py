"""The originals' schedule functions and options. Errors are ValueErrors and also of the originals' own types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import schedule as schedules
from ...schedule import Schedule


class AssertionValueError(ValueError, AssertionError):
    """Where the originals assert."""


class IndexValueError(ValueError, IndexError):
    """Where the originals index past the end: a process of one step."""


class ZeroDivisionValueError(ValueError, ZeroDivisionError):
    """Where the originals divide by zero: no sections to keep timesteps of."""


class UnknownScheduleError(ValueError, NotImplementedError):
    """A schedule name the original does not know."""


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> NDArray[np.float64]:
    """The originals' `betas_for_alpha_bar`: see `fastcfg.schedule.betas_for_alpha_bar`."""
    return schedules.betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta)


def named_betas(name: str, known: tuple[str, ...], num_timesteps: int) -> NDArray[np.float64]:
    """Betas by one of the names an original knows."""
    if name not in known:
        raise UnknownScheduleError(f"unknown beta schedule: {name}")
    try:
        return schedules.named_betas(name, num_timesteps)
    except ValueError as error:
        raise AssertionValueError(str(error)) from None


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The originals' `space_timesteps`: see `fastcfg.schedule.space_timesteps`."""
    if not isinstance(section_counts, str) and not len(section_counts):
        raise ZeroDivisionValueError("section_counts: got an empty list, expected at least one count")
    return schedules.space_timesteps(num_timesteps, section_counts)


def make_schedule(betas: Any, timestep_map: Any = None, original_num_timesteps: int = 0) -> Schedule:
    """A schedule from betas: one-dimensional, in (0, 1], and at least two."""
    try:
        schedule = Schedule(betas, timestep_map, original_num_timesteps)
    except ValueError as error:
        raise AssertionValueError(str(error)) from None
    if schedule.num_timesteps < 2:
        raise IndexValueError(f"betas: got {schedule.num_timesteps}, expected at least 2")
    return schedule


def check_options(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise TypeError unless the options have the same names as an original's `..._defaults()`."""
    if set(options) != set(defaults):
        wrong = ", ".join(sorted(set(options) ^ set(defaults)))
        raise TypeError(f"options: got {wrong} missing or unknown, expected {', '.join(defaults)}")
