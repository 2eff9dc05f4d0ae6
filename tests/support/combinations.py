"""Random combinations, and what they are in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastcfg.clip import DynamicThreshold
from fastcfg.combination import Combination


def random_combination(
    rng: np.random.Generator,
    inputs: int,
    outputs: int,
    clip: float | DynamicThreshold | None = None,
    noise: bool = False,
) -> Combination:
    """Coefficients of several sizes, some of them 0 and some exactly 1; x0 where there is a clip, and otherwise by
    chance."""

    def row(*shape: int) -> np.ndarray:
        values = rng.normal(size=shape) * rng.choice([0.3, 1.0, 5.0])
        values[rng.random(shape) < 0.15] = 1.0
        values[rng.random(shape) < 0.25] = 0.0
        return values

    x0 = row(inputs) if clip is not None or rng.random() < 0.5 else None
    of_x0 = None if x0 is None else row(outputs)
    of_noise = {"noise": int(rng.integers(2, inputs)), "l_0": -1.0, "l_v": 0.5} if noise else {}
    return Combination(row(outputs, inputs), x0, of_x0, clip, **of_noise)


def in_float64(
    combination: Combination, inputs: Sequence[Tensor], variance: Tensor | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The results for inputs of one shape, and the sums of their terms' magnitudes."""
    values = [tensor.detach().double().cpu().numpy() for tensor in inputs]
    coefficients = combination.coefficients.copy()
    if combination.noise is not None:
        coefficients[0, combination.noise] = 0
    x0, of_x0 = np.zeros_like(values[0]), np.zeros(len(coefficients))
    x0_size = x0
    if combination.uses_x0:
        x0, x0_size = _sums(combination.x0, values)
        of_x0 = combination.of_x0
        if isinstance(combination.clip, DynamicThreshold):
            x0 = _thresholded(x0, combination.clip)
        elif combination.clip is not None:
            x0 = np.clip(x0, -combination.clip, combination.clip)
    results, sizes = [], []
    for row, share in zip(coefficients, of_x0, strict=True):
        result, size = _sums(row, values)
        results.append(result + (share * x0 if share else 0))
        sizes.append(size + abs(share) * x0_size)
    if variance is not None:
        std = np.exp2(combination.l_0 + combination.l_v * variance.double().cpu().numpy())
        results[0] = results[0] + std * values[combination.noise]
        sizes[0] = sizes[0] + np.abs(std * values[combination.noise])
    return results, sizes


def _sums(row: np.ndarray, values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    terms = [c * v for c, v in zip(row, values, strict=True) if c] or [np.zeros_like(values[0])]
    return np.sum(terms, axis=0), np.sum(np.abs(terms), axis=0)


def _thresholded(x0: np.ndarray, threshold: DynamicThreshold) -> np.ndarray:
    """diffusers' `_threshold_sample`."""
    flat = torch.from_numpy(x0).reshape(len(x0), -1)
    s = torch.quantile(flat.abs(), threshold.quantile, dim=1).clamp(threshold.floor, threshold.ceiling or np.inf)[
        :, None
    ]
    return (flat.clamp(-s, s) / s).reshape(x0.shape).numpy()


def assert_close(results: Sequence[Tensor], expected: tuple[list[np.ndarray], list[np.ndarray]], ulps: float) -> None:
    """Within so many float32 roundings of the sum of the terms' magnitudes."""
    for result, value, size in zip(results, *expected, strict=True):
        error = np.abs(result.double().cpu().numpy() - value)
        assert (error <= ulps * 2.0**-24 * size + 1e-37).all(), float((error / (size + 1e-30)).max() * 2**24)
