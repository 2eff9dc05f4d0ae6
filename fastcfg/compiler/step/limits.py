"""Sums over a limited x0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ...clip import DynamicThreshold
from ...combination import Combination
from ..probe import Array
from .parts import UntraceableError
from .reader import Reader
from .run import Outcome
from .sums import TOLERANCE, coefficients_of, prove
from .tensors import CONFIG, BasisVectors, Examples, Inputs, Saturated


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
    linear: Outcome,
    reader: Reader,
    clip: float | DynamicThreshold,
    run: Callable[..., Outcome],
) -> Combination:
    """The sums with what passes through a limited x0 written over it. Candidates for x0 are what the step converts its
    output to and what it returns or keeps beside the next sample; the sums are proved on the step with its limit."""
    vectors = BasisVectors(inputs)
    converted = [value for value in linear.converted if value.shape[-1] == vectors.shape[-1]]
    for p in (*(coefficients_of(value, vectors, inputs) for value in converted), *combination.coefficients[1:]):
        if not p.any():
            continue
        # With which x0 lies on both sides of the limit.
        size = (clip if isinstance(clip, float) else 1.0) / float(np.linalg.norm(p))
        examples = Examples(inputs, reader.examples.shape, size)
        found, values = reader.sums_of(run(examples)), examples.exact()
        for of_x0, rest in _over_x0(combination, inputs, p, reader, run):
            over = replace(combination, coefficients=rest, x0=p, of_x0=of_x0, clip=clip)
            try:
                prove(over, inputs, values, found, TOLERANCE)
            except UntraceableError:
                continue
            return over
    raise UntraceableError("what limits its x0 cannot be told from its other terms")


def _over_x0(
    combination: Combination,
    inputs: Inputs,
    p: Array,
    reader: Reader,
    run: Callable[..., Outcome],
) -> Iterator[tuple[Array, Array]]:
    """Ways to write the sums over x0: its coefficients, and those of the other terms."""
    rows = combination.coefficients
    pivot = 1 if p[1] else int(np.abs(p).argmax())
    of_x0 = rows[:, pivot] / p[pivot]
    yield of_x0, _cleaned(rows - of_x0[:, None] * p, rows)
    # Where x0 is at its bound it is constant: the derivatives there are those of the other terms. How it is limited
    # makes no difference to them.
    saturated = Saturated(inputs, p)
    outcome = run(saturated, clip_sample=True)
    found = np.array([value.double().reshape(-1, value.shape[-1])[0].numpy() for value in reader.sums_of(outcome)])
    rest = _cleaned((found[:, 1:] - found[:, :1]) / saturated.added, rows)
    bound = clip_of(outcome.before[CONFIG][0])
    if isinstance(bound, float):
        yield (found[:, 0] - rest @ saturated.base) / bound, rest


def _cleaned(rest: Array, rows: Array) -> Array:
    """Without what rounding left of a difference."""
    small = np.abs(rest) < 1e-9 * np.abs(rows).max(axis=1, keepdims=True)
    return np.where(small, 0.0, rest)
