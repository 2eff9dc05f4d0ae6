"""Which row every draw of a run belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .assembly import Compiled
from .probe import Array
from .trial import Trial


def first_uses(states: Array, run: Trial) -> NDArray[np.int64]:
    """Up to every state, the number of draws that it or an earlier one has: noise may be drawn before the model's call
    that precedes its use. Unused ones count where they are drawn."""
    calls = len(run.inputs)
    drawn = np.repeat(np.arange(calls + 1), [len(values) for values in run.drawn])
    noise = np.abs(states[: calls + 1, 1 + calls :]) > 1e-12
    places = np.where(noise.any(axis=0), noise.argmax(axis=0), drawn)
    if (np.diff(places) < 0).any():
        raise ValueError("sample_fn: got one that uses its noise in another order than it draws it, expected the same")
    return np.searchsorted(places, np.arange(calls + 1), side="right")


def regrouped(drawn: Sequence[Sequence[Tensor]], compiled: Compiled) -> list[list[Tensor]]:
    """A run's draws, those of the start and of every row."""
    values = iter([value for row in drawn for value in row])
    return [[next(values) for _ in weights] for weights in (compiled.start_draws, *compiled.draws)]
