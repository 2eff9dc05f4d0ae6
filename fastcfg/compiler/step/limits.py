"""Sums over a limited x0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ...clip import DynamicThreshold
from ...combination import Combination
from ..probe import Array
from .parts import UntraceableError
from .reader import Reader
from .run import Runs
from .sums import TOLERANCE, ZERO, prove
from .tensors import BasisVectors, Inputs

_SAME = 1e-7  # coefficients of x0 by differences of a run's values, which round to 1e-9


def clip_of(config: Any) -> float | DynamicThreshold | None:
    """The limit of x0 that a diffusers config asks for, read as its schedulers read it."""

    def option(name: str, default: Any) -> Any:
        return getattr(config, name, config.get(name, default))

    if not isinstance(config, Mapping):
        return None
    if option("thresholding", False):
        quantile, ceiling = float(option("dynamic_thresholding_ratio", 0.995)), float(option("sample_max_value", 1.0))
        # torch.clamp gives the maximum where the minimum, 1, is larger.
        return DynamicThreshold(quantile, min(ceiling, 1.0), ceiling)
    return float(option("clip_sample_range", 1.0)) if option("clip_sample", False) else None


def over_limited_x0(
    combination: Combination,
    inputs: Inputs,
    vectors: BasisVectors,
    found: list[Tensor],
    converted: Array,
    reader: Reader,
    clip: float | DynamicThreshold,
    run: Runs,
) -> Combination:
    """The sums, found on basis vectors, with what passes through a limited x0 written over it. Candidates for x0 are
    what the step converts its output to (the coefficients of these) and what it returns or keeps, the next sample last;
    the sums are proved on random samples."""
    # Dynamic thresholding divides by its bound.
    floor = clip.floor if isinstance(clip, DynamicThreshold) else 1.0
    rows = combination.coefficients
    for limited in (*converted, *rows[1:], *rows[:1]):
        if not limited.any():
            continue
        p = floor * limited
        beyond = p * vectors.base
        if beyond.max() * beyond.min() < 0 or not beyond[p != 0].all():
            # The samples in which another x0 would be limited.
            vectors = BasisVectors(inputs, np.sign(p))
            found = reader.sums_of(run(vectors))
        over = _over_x0(combination, inputs, vectors, found, p, clip)
        if _holds(over, inputs, vectors, found):
            return over
    if _holds(combination, inputs, vectors, found):
        return combination
    raise UntraceableError("what limits its x0 cannot be told from its other terms")


def _holds(combination: Combination, inputs: Inputs, vectors: BasisVectors, sums: list[Tensor]) -> bool:
    try:
        prove(combination, inputs, vectors.values(), [value[vectors.random] for value in sums], TOLERANCE)
    except UntraceableError:
        return False
    return True


def _over_x0(
    combination: Combination,
    inputs: Inputs,
    vectors: BasisVectors,
    sums: list[Tensor],
    p: Array,
    clip: float | DynamicThreshold,
) -> Combination:
    """The sums over x0. Where it is at its bound it is constant: the derivatives there are those of the other terms."""
    rows = combination.coefficients
    found = np.array([value[vectors.saturated].reshape(1 + len(inputs.names), -1)[:, 0].numpy() for value in sums])
    rest = (found[:, 1:] - found[:, :1]) / vectors.added
    bound = np.sign(p @ vectors.base) * (clip if isinstance(clip, float) else 1.0)
    of_x0 = (found[:, 0] - rest @ vectors.base) / bound if bound else np.zeros(len(rows))
    if combination.noise is not None:
        rest[0, combination.noise] = 0.0
    # Without what rounding left of a difference.
    rest[np.abs(rest) < 1e-9 * np.abs(rows).max(axis=1, keepdims=True)] = 0.0
    # x0 of an infinite input is finite: what is not comes of other terms, if only of a product with 0.
    infinite: Any = [~value[vectors.infinite].isfinite().flatten(1).all(dim=1).numpy() for value in sums]
    rest[np.array(infinite) & (rest == 0)] = ZERO
    # NaN passes through the limit, also where x0 is multiplied by 0.
    of_x0[((rows == ZERO) & (rest == 0) & (p != 0)).any(axis=1) & (of_x0 == 0)] = ZERO
    most = int(np.argmax(np.abs(of_x0)))
    if isinstance(clip, float) and of_x0[most]:
        # What a step returns may be x0 and a little of its sample (LCM): x0 alone is what the limit takes off a sum.
        alone = (rows[most] - np.where(rest[most] == ZERO, 0.0, rest[most])) / of_x0[most]
        if np.abs(alone - p).max() > _SAME * np.abs(p).max():
            p = alone
    return replace(combination, coefficients=rest, x0=p, of_x0=of_x0, clip=clip)
