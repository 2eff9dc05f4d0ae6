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
from .tensors import MAX_DRAWS, SHORT, BasisVectors, Inputs, Values

TOLERANCE = 5e-6  # of coefficients, relative to their row's: some schedulers compute in float32
_ROUNDING = 1e-13  # smaller shares of a row are what float64 left of a cancellation
# A coefficient of inputs that are multiplied by 0: it makes no term but of NaN and infinities.
ZERO = 1e-300


def combination_of(rows: Array, inputs: Inputs, vectors: BasisVectors, sums: list[Tensor]) -> Combination:
    """The sums of a run on basis vectors, which have these coefficients."""
    combination = Combination(rows)
    return _learned(combination, inputs, vectors, sums) if inputs.wide else combination


def coefficients_of(values: list[Tensor], vectors: BasisVectors, inputs: Inputs) -> Array:
    """The coefficients of all inputs [tensors, inputs] in tensors of a run on basis vectors."""
    count, size = len(inputs.names), vectors.size
    if any(value.shape != vectors.shape for value in values):
        raise UntraceableError("its step makes a tensor of another shape than the sample")
    if not values:
        return np.zeros((0, count))
    found: Array = np.array([value.double().numpy() for value in values])
    found = found.reshape(len(values), len(found[0]), -1, vectors.shape[-1])
    linear: Array = found[:, 0]
    touched: Any = np.isnan(found[:, vectors.nan, :, 0]).any(axis=2)
    touched = touched[:, :count]
    # A limit of x0 may depend on all elements of a sample.
    spread = vectors.size == 1 and np.isnan(found[:, vectors.nan, :, 1:]).any()
    if spread or not (np.isfinite(linear).all() and np.isfinite(found[:, vectors.infinite.stop :]).all()):
        raise UntraceableError("its results are not finite, or sums over elements")
    long, short = linear[..., 1 : 1 + count] / size, linear[..., 1 + count : 1 + 2 * count] / (size * SHORT)
    rows = long[:, 0].copy()
    bound = TOLERANCE * np.maximum(np.abs(long).max(axis=(1, 2)), 1e-300)[:, None]
    if (np.abs(linear[..., 0]) > bound * size).any():
        raise UntraceableError("its steps are not linear: without inputs its result is not 0")
    if (np.abs(long - rows[:, None]).max(axis=1) > bound).any():
        raise UntraceableError("its coefficients differ by channel")
    if (np.abs(short - rows[:, None]).max(axis=1) > bound).any():
        raise UntraceableError("its steps are not linear")
    rows[np.abs(rows) < (_ROUNDING / TOLERANCE) * bound] = 0.0
    rows[touched & (rows == 0)] = ZERO
    return rows


def _learned(combination: Combination, inputs: Inputs, vectors: BasisVectors, sums: list[Tensor]) -> Combination:
    """With the coefficient of noise as a power of the variance channels, if it depends on them: also where these are
    multiplied by 0 (in the last NaN sample they are NaN)."""
    first, names = 1 + 2 * len(inputs.names), inputs.names
    for number, value in enumerate(sums):
        at = value[0].double().reshape(-1, value.shape[-1])[0, first : first + 2 * MAX_DRAWS].view(MAX_DRAWS, 2)
        for draw, (low, high) in enumerate(at.tolist()):
            index = names.index(("draw", draw))
            middle = float(combination.coefficients[number, index])
            multiplied = not number and middle > 0 and bool(value[vectors.nan.stop - 1, ..., 0].isnan().all())
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
    values: Values,
    found: list[Tensor],
    tolerance: float,
    together: bool = False,
) -> None:
    """Raise UntraceableError unless the sums give the tensors that were found, up to a share of each one's terms
    (`together`: of the largest sum's, where the original rounded what they share)."""
    made, sizes = _evaluate(combination, inputs, values)
    if together:
        sizes = np.full_like(sizes, sizes.max(initial=0.0))
    wanted = np.array([value.double().numpy() for value in found]).reshape(made.shape)
    if not np.isfinite(wanted).all():
        raise UntraceableError("its results are not finite")
    if (np.abs(made - wanted).max(axis=2) > tolerance * np.maximum(sizes, 1e-300)).any():
        raise UntraceableError("its steps are not linear")


def _evaluate(combination: Combination, inputs: Inputs, values: Values) -> tuple[Array, Array]:
    """The sums in float64, plainly written, [outputs, B, ...], and the size of their terms in each sample."""
    count, of_x0 = len(inputs.names), combination.of_x0
    rows, tensors, noise = combination.coefficients, values.tensors[:count], combination.noise
    flat = tensors.reshape(count, -1)
    largest = values.largest[:count]
    made: Any = (rows @ flat).reshape(len(rows), tensors.shape[1], -1)
    sizes: Array = (np.abs(rows)[..., None] * largest).max(axis=1)
    if combination.x0 is not None and of_x0 is not None:
        x0 = (combination.x0 @ flat).reshape(made.shape[1:])
        bound: Any = combination.clip
        if isinstance(bound, DynamicThreshold):
            rank = bound.rank(x0.shape[1], torch.float64)
            bound = quantile_bound(torch.from_numpy(x0.copy()), rank).numpy()[:, None]
        x0_sizes = (np.abs(combination.x0)[:, None] * largest).max(axis=0)
        limited = np.clip(x0, -bound, bound) / (bound if isinstance(combination.clip, DynamicThreshold) else 1.0)
        made = made + of_x0[:, None, None] * limited
        sizes = np.maximum(sizes, np.abs(of_x0)[:, None] * x0_sizes)
    if noise is not None:
        made[0] += (term := np.exp2(combination.l_0 + combination.l_v * values.tensors[count]) * tensors[noise])
        sizes[0] = np.maximum(sizes[0], np.abs(term).max(axis=1))
    return made, sizes
