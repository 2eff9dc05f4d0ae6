"""What the originals read of a process at every step, and users change: its arrays, and methods that they override."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# The originals' numpy attributes that are arrays of the schedule.
ARRAYS = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "alphas_cumprod_next", "sqrt_alphas_cumprod"),
    *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod"),
    *("sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped"),
    *("posterior_mean_coef1", "posterior_mean_coef2"),
)


class Tables:
    """A process's arrays at one time, copied, under the names that a `Schedule` has for them."""

    num_timesteps: int

    def __init__(self, process: Any) -> None:
        self.num_timesteps = process.num_timesteps
        for name in ARRAYS:
            setattr(self, name, np.array(getattr(process, name)))
        self._bytes = {name: getattr(self, name).tobytes() for name in ARRAYS}

    @property
    def fixed_large_variance(self) -> Any:
        """The variances of FIXED_LARGE."""
        return np.append(self.posterior_variance[1], self.betas[1:])  # type: ignore[attr-defined]

    def differing(self, process: Any) -> list[str]:
        """The names of the process's arrays, or its number of steps, that are others by now."""
        changed = [name for name, was in self._bytes.items() if np.asarray(getattr(process, name)).tobytes() != was]
        return changed + (["num_timesteps"] if process.num_timesteps != self.num_timesteps else [])


def overridden(process: Any, names: Sequence[str]) -> list[str]:
    """Those of some methods that are the user's: of a subclass, or set on the object."""
    return [name for name in names if name in vars(process) or not _is_ours(type(process), name)]


def _is_ours(kind: type, name: str) -> bool:
    owner = next((base for base in kind.__mro__ if name in vars(base)), None)
    return owner is None or owner.__module__.startswith("fastcfg.")
