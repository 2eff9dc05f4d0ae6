"""Functions that clamp x0: the bound, and x0 as a sum of a row's state and output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from .probe import Array, Response

_EXACT = 1e-7


def bound_of(bounded: Sequence[tuple[int, float, Tensor]], calls: int) -> float | None:
    """The bound of all that a function clamps after its model's calls; None if it clamps nothing.

    Raises:
        ValueError: there are several, or rows without one.
    """
    if not bounded:
        return None
    if len({bound for _, bound, _ in bounded}) > 1 or {before for before, *_ in bounded} != set(range(1, calls + 1)):
        raise ValueError("sample_fn: got one that clamps in some of its steps, or in several ways, expected one way")
    return bounded[0][1]


def clamped_x0(response: Response, clamped: Array, before: Sequence[int]) -> tuple[Response, Array, Array]:
    """The response with what is clamped as its predictions, and p_x and p_m [C]. `before` has the model calls before
    each of the clamped.

    Raises:
        ValueError: something else than one sum of a row's state and output is clamped.
    """
    assert response.predictions is not None
    predictions, pairs = np.zeros_like(response.predictions), np.zeros((response.calls, 2))
    for vector, count in zip(clamped, before, strict=True):
        row = count - 1
        size = max(1.0, float(np.abs(vector).max()))
        if predictions[row].any():
            if np.abs(vector - predictions[row]).max() > _EXACT * size:
                raise ValueError("sample_fn: got one that clamps two tensors in a step, expected x0 alone")
            continue
        parts = np.stack([response.states[row], response.predictions[row]], axis=1)
        pairs[row], *_ = np.linalg.lstsq(parts, vector, rcond=None)
        if np.abs(parts @ pairs[row] - vector).max() > _EXACT * size:
            raise ValueError("sample_fn: got one that clamps something else than a sum of x and its model's output")
        predictions[row] = vector
    return replace(response, predictions=predictions), pairs[:, 0], pairs[:, 1]
