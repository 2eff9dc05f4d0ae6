"""The coefficients of a step's sums, and the proof of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...clip import DynamicThreshold
from ...combination import Combination
from ...reference.quantile import quantile_bound
from ..probe import Array
from .parts import UntraceableError
from .tensors import MAX_DRAWS, RANDOM, SHORT, BasisVectors, Inputs

TOLERANCE = 5e-6  # of coefficients, relative to their row's: some schedulers compute in float32
_ROUNDING = 1e-13  # smaller shares of a row are what float64 left of a cancellation
# A coefficient of inputs that are multiplied by 0: it makes no term but of NaN and infinities.
_ZERO = 1e-300


def combination_of(inputs: Inputs, sums: list[Tensor]) -> Combination:
    """The sums of a run on basis vectors, proved on its random positions."""
    vectors = BasisVectors(inputs)
    rows = np.array([coefficients_of(value, vectors, inputs) for value in sums])
    rows = rows.reshape(len(sums), len(inputs.names))
    combination = Combination(rows)
    if inputs.wide:
        combination = _learned(combination, inputs, sums, vectors.end_nan - 1)
    prove(combination, inputs, vectors.random(), [value[..., -RANDOM:] for value in sums], TOLERANCE)
    return combination


def coefficients_of(value: Tensor, vectors: BasisVectors, inputs: Inputs) -> Array:
    """The coefficients of all inputs in a tensor [1, C, ..., positions]."""
    count = len(inputs.names)
    if value.shape[-1] != vectors.shape[-1]:
        raise UntraceableError("its step makes a tensor of another shape than the sample")
    found: Array = value.double().reshape(-1, vectors.shape[-1]).numpy()
    nan = slice(vectors.first_nan, vectors.end_nan)
    touched: Any = np.isnan(found[:, nan]).any(axis=0)
    touched = touched[:count]
    if not np.isfinite(np.delete(found, nan, axis=1)).all():
        raise UntraceableError("its results are not finite, or sums over elements")
    row, size = found[0, 1 : 1 + count].copy(), max(float(np.abs(found[:, 1 : 1 + count]).max()), 1e-300)
    if np.abs(found[:, 0]).max() > TOLERANCE * size:
        raise UntraceableError("its steps are not linear: without inputs its result is not 0")
    if np.abs(found[:, 1 : 1 + count] - row).max() > TOLERANCE * size:
        raise UntraceableError("its coefficients differ by channel")
    if np.abs(found[:, 1 + count : 1 + 2 * count] / SHORT - row).max() > TOLERANCE * size:
        raise UntraceableError("its steps are not linear")
    row[np.abs(row) < _ROUNDING * size] = 0.0
    row[touched & (row == 0)] = _ZERO
    return row


def _learned(combination: Combination, inputs: Inputs, sums: list[Tensor], nan: int) -> Combination:
    """With the coefficient of noise as a power of the variance channels, if it depends on them: also where these are
    multiplied by 0 (in position `nan` they are NaN)."""
    first, names = 1 + 2 * len(inputs.names), inputs.names
    for number, value in enumerate(sums):
        at = value.double().reshape(-1, value.shape[-1])[0, first : first + 2 * MAX_DRAWS].view(MAX_DRAWS, 2)
        for draw, (low, high) in enumerate(at.tolist()):
            index = names.index(("draw", draw))
            middle = float(combination.coefficients[number, index])
            multiplied = not number and middle > 0 and bool(value[..., nan].isnan().all())
            if abs(low - middle) + abs(high - middle) <= TOLERANCE * abs(middle) and not multiplied:
                continue
            if number or combination.noise is not None or min(low, middle, high) <= 0:
                raise UntraceableError("its noise depends on the variance channels in another way than by a power")
            l_0, l_v = float(np.log2(middle)), float(np.log2(high) - np.log2(low)) / 2
            combination.coefficients[number, index] = 0.0
            combination = replace(combination, noise=index, l_0=l_0, l_v=l_v)
    return combination


def prove(
    combination: Combination,
    inputs: Inputs,
    values: Array,
    found: list[Tensor],
    tolerance: float,
    together: bool = False,
) -> None:
    """Raise UntraceableError unless the sums give the tensors that were found, up to a share of each one's terms
    (`together`: of the largest sum's, where the original rounded what they share).

    `values` are float64: [inputs, B, C * ...], with a wide output's variance channels as a last row.
    """
    made, sizes = _evaluate(combination, inputs, values)
    if together:
        sizes = np.full_like(sizes, sizes.max(initial=0.0))
    wanted = np.array([value.double().numpy() for value in found]).reshape(made.shape)
    if not np.isfinite(wanted).all():
        raise UntraceableError("its results are not finite")
    if not (np.abs(made - wanted).max(axis=(1, 2)) <= tolerance * np.maximum(sizes, 1e-300)).all():
        raise UntraceableError("its steps are not linear")


def _evaluate(combination: Combination, inputs: Inputs, values: Array) -> tuple[Array, Array]:
    """The sums in float64, plainly written, and the size of each one's terms."""
    count, of_x0 = len(inputs.names), combination.of_x0
    rows, tensors, noise = combination.coefficients, values[:count], combination.noise
    largest = np.abs(tensors).max(axis=(1, 2))
    made, sizes = np.tensordot(rows, tensors, axes=1), (np.abs(rows) * largest).max(axis=1)
    if combination.x0 is not None and of_x0 is not None:
        x0 = np.tensordot(combination.x0, tensors, axes=1)
        bound: Any = combination.clip
        if isinstance(bound, DynamicThreshold):
            rank = bound.rank(x0.shape[1], torch.float64)
            bound = quantile_bound(torch.from_numpy(x0.copy()), rank).numpy()[:, None]
        x0_size = (np.abs(combination.x0) * largest).max()
        limited = np.clip(x0, -bound, bound) / (bound if isinstance(combination.clip, DynamicThreshold) else 1.0)
        made = made + of_x0[:, None, None] * limited
        sizes = np.maximum(sizes, np.abs(of_x0) * x0_size)
    if noise is not None:
        made[0] += (term := np.exp2(combination.l_0 + combination.l_v * values[count]) * tensors[noise])
        sizes[0] = max(sizes[0], np.abs(term).max())
    return made, sizes
