"""Runs of a compiled scheduler that begin with an image: the noise levels of its timesteps, and its later tables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..table import StepTable
from .probe import Array, Original


def noise_levels(original: Original) -> Array | None:
    """`StepTable.levels` as the scheduler's `add_noise` (or `scale_noise`, of flows) has them, and an end without
    noise; None for a scheduler that has neither, or where they fail."""
    scheduler, timesteps = copy.deepcopy(original.scheduler), original.timesteps
    # A run that has begun would look its own place up.
    nowhere = {name: None for name in ("_begin_index", "_step_index") if name in vars(scheduler)}
    vars(scheduler).update(nowhere)
    ones = torch.ones(len(timesteps), 1, 1, 1, dtype=torch.float64)
    zeros = torch.zeros_like(ones)
    try:
        if hasattr(scheduler, "add_noise"):
            parts = scheduler.add_noise(ones, zeros, timesteps), scheduler.add_noise(zeros, ones, timesteps)
        else:
            # One by one, each as if the run began there: some take one timestep alone, and keep its place.
            scaled = []
            for timestep in timesteps.split(1):
                for sample, noise in ((ones, zeros), (zeros, ones)):
                    vars(scheduler).update(nowhere)
                    scaled.append(scheduler.scale_noise(sample[:1], timestep, noise[:1]))
            parts = torch.cat(scaled[::2]), torch.cat(scaled[1::2])
        found: Array = torch.stack([part.double().flatten() for part in parts], dim=1).numpy()
        found = np.append(found, [[1.0, 0.0]], axis=0)
    except Exception:  # whatever a scheduler raises: its table has no levels then
        return None
    return found if found.shape == (len(timesteps) + 1, 2) and np.isfinite(found).all() else None


class Rebuild:
    """`StepTable.rebuild` of a scheduler's table. It is not pickled: a scheduler may not be."""

    def __init__(self, compiled: Callable[..., Any], original: Original, clipped: bool) -> None:
        self._compiled, self._scheduler, self._first = compiled, original.scheduler, original.first
        self._options: Mapping[str, Any] = original.options
        self._clipped = clipped

    def __call__(self, row: int) -> StepTable:
        """The table of a run that begins at a row."""
        table: StepTable = self._compiled(self._scheduler, self._first + row, self._options, self._clipped).table
        return table

    def __deepcopy__(self, memo: Any) -> Rebuild:
        return self

    def __reduce__(self) -> Any:
        return _nothing, ()


def _nothing() -> None:
    """What takes a `Rebuild`'s place in a pickled table."""
