"""The coefficients of a step's sums, and the proof of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...clip import DynamicThreshold
from ...combination import Combination
from ...reference.quantile import quantile_bound
from ..probe import Array
from .parts import Source, UntraceableError
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
        combination = _learned(combination, inputs, sums)
    found = [value.double()[..., -RANDOM:] for value in sums]
    prove(combination, inputs, lambda source: vectors.tensor(source)[..., -RANDOM:], found, TOLERANCE)
    return combination


def coefficients_of(value: Tensor, vectors: BasisVectors, inputs: Inputs) -> Array:
    """The coefficients of all inputs in a tensor [1, C, ..., positions]."""
    count = len(inputs.names)
    if value.shape[-1] != vectors.shape[-1]:
        raise UntraceableError("its step makes a tensor of another shape than the sample")
    found: Array = value.double().reshape(-1, vectors.shape[-1]).numpy()
    nan = slice(vectors.first_nan, vectors.first_nan + count)
    touched = np.isnan(found[:, nan]).any(axis=0)
    if not np.isfinite(np.delete(found, nan, axis=1)).all():
        raise UntraceableError("its results are not finite")
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


def _learned(combination: Combination, inputs: Inputs, sums: list[Tensor]) -> Combination:
    """With the coefficient of noise as a power of the variance channels, if it depends on them."""
    first, names = 1 + 2 * len(inputs.names), inputs.names
    for number, value in enumerate(sums):
        at = value.double().reshape(-1, value.shape[-1])[0, first : first + 2 * MAX_DRAWS].view(MAX_DRAWS, 2)
        for draw, (low, high) in enumerate(at.tolist()):
            index = names.index(("draw", draw))
            middle = float(combination.coefficients[number, index])
            if abs(low - middle) + abs(high - middle) <= TOLERANCE * abs(middle):
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
    values: Callable[[Source], Tensor],
    found: list[Tensor],
    tolerance: float,
    together: bool = False,
) -> None:
    """Raise UntraceableError unless the sums give the tensors that were found, up to a share of each one's terms
    (`together`: of the largest sum's, where the original rounded what they share)."""
    made, sizes = _evaluate(combination, inputs, values)
    largest = max(sizes, default=0.0)
    for got, want, size in zip(made, found, sizes, strict=True):
        if want.shape != got.shape or not torch.isfinite(want).all():
            raise UntraceableError("its results are not finite, or of another shape")
        error = float((got - want).abs().max()) / max(largest if together else size, 1e-300)
        if not error <= tolerance:
            raise UntraceableError("its steps are not linear")


def _evaluate(
    combination: Combination, inputs: Inputs, values: Callable[[Source], Tensor]
) -> tuple[list[Tensor], list[float]]:
    """The sums in float64, plainly written, and the size of each one's terms."""
    tensors = [values(source) for source in inputs.names]
    variance = None
    if inputs.wide:
        tensors[1], variance = tensors[1].chunk(2, dim=1)

    def total(row: Array) -> tuple[Tensor, float]:
        terms = [c * v for c, v in zip(row.tolist(), tensors, strict=True) if c]
        return sum(terms, 0 * tensors[0]), max((float(term.abs().max()) for term in terms), default=0.0)

    x0, x0_size = None, 0.0
    if combination.x0 is not None:
        x0, x0_size = total(combination.x0)
        if isinstance(combination.clip, DynamicThreshold):
            rank = combination.clip.rank(x0[0].numel(), torch.float64)
            bound = quantile_bound(x0, rank).view(-1, *[1] * (x0.ndim - 1))
            x0 = torch.clamp(x0, -bound, bound) / bound
        elif combination.clip is not None:
            x0 = x0.clamp(-combination.clip, combination.clip)
    made, sizes = [], []
    for number, row in enumerate(combination.coefficients):
        value, size = total(row)
        if x0 is not None and combination.of_x0[number]:  # type: ignore[index]
            value, size = value + combination.of_x0[number] * x0, max(size, abs(combination.of_x0[number]) * x0_size)  # type: ignore[index]
        if number == 0 and combination.noise is not None:
            std = torch.exp2(combination.l_0 + combination.l_v * variance)  # type: ignore[operator, arg-type]
            noise = std * tensors[combination.noise]
            value, size = value + noise, max(size, float(noise.abs().max()))
        made.append(value)
        sizes.append(size)
    return made, sizes
