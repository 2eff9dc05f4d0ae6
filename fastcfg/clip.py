"""Dynamic thresholding: a clip bound of x0 taken from x0 itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .utils.checks import as_number

__all__ = ["MAX_SIZE", "DynamicThreshold", "Place", "QuantileRank"]

# Elements of a sample: float32 cannot number more of them, and torch.quantile takes no more either.
MAX_SIZE = 2**24


class QuantileRank(NamedTuple):
    """Where the bound lies among a sample's magnitudes in ascending order: at `rank`, counted from 0, plus `weight`
    times the distance to the next one; at least `floor` and at most `ceiling`."""

    rank: int
    weight: float
    floor: float
    ceiling: float


Place = QuantileRank  # the old name


@dataclass(frozen=True)
class DynamicThreshold:
    """Limit x0 to a quantile of its magnitudes, sample by sample, and divide by that bound (Saharia et al. 2022,
    https://arxiv.org/abs/2205.11487, section 2.3; diffusers' `thresholding`).

    x0 becomes clip(x0, -s, s) / s, where s is the quantile of |x0| over a sample, at least `floor` and at most
    `ceiling`. The quantile is `torch.quantile`'s: NaN where any x0 is NaN, and as a rule where it meets an infinity.

    Attributes:
        quantile: p in [0, 1] (diffusers: dynamic_thresholding_ratio).
        floor: positive; 1 leaves an x0 inside [-1, 1] unchanged.
        ceiling: at least floor, or None for none (diffusers: sample_max_value, whose default 1 makes the bound 1).

    Raises:
        TypeError, ValueError: an attribute that is not a number, or out of range.

    Example:
        >>> from fastcfg import CFG, DynamicThreshold, Sampler, Schedule, solvers
        >>> table = solvers.ddim(Schedule.named("linear").respace(10))
        >>> sampler = Sampler(lambda x, t: x, table, clip=DynamicThreshold(0.995))
        >>> bool(sampler.sample((2, 3, 8, 8), seed=0).abs().max() <= 1)
        True
    """

    quantile: float = 0.995
    floor: float = 1.0
    ceiling: float | None = None

    def __post_init__(self) -> None:
        for name in ("quantile", "floor", "ceiling"):
            value, optional = getattr(self, name), name == "ceiling"
            number = as_number(value)
            if number is None and not (optional and value is None):
                raise TypeError(f"{name}: got {value!r}, expected a number{' or None' * optional}")
            object.__setattr__(self, name, number)
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile: got {self.quantile!r}, expected 0 to 1")
        if not 0 < self.floor < math.inf:
            raise ValueError(f"floor: got {self.floor!r}, expected a positive finite number")
        if self.ceiling is not None and not self.floor <= self.ceiling:
            raise ValueError(f"ceiling: got {self.ceiling!r}, expected None or at least the floor, {self.floor!r}")

    def rank(self, size: int, dtype: torch.dtype = torch.float32) -> QuantileRank:
        """The quantile's rank among `size` magnitudes (at most `MAX_SIZE`, else ValueError) of a dtype, float32 or
        float64, with `torch.quantile`'s rounding."""
        if size > MAX_SIZE:
            raise ValueError(f"size: got {size} elements in a sample, expected at most 2**24 for dynamic thresholding")
        # The product of two float32 numbers is exact in float64.
        rank = _rounded(_rounded(self.quantile, dtype) * (size - 1), dtype)
        ceiling = math.inf if self.ceiling is None else self.ceiling
        return QuantileRank(int(rank), rank - int(rank), self.floor, ceiling)


def _rounded(value: float, dtype: torch.dtype) -> float:
    """The nearest number with the significand of `dtype`."""
    if dtype == torch.float64:
        return value
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(fraction, 24)), exponent - 24)
