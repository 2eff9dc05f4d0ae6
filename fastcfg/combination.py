"""Sums of the same tensors, computed together: what one step of a scheduler is once it has been traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .clip import DynamicThreshold
from .utils.checks import check_finite

__all__ = ["Combination", "Sum"]

SAMPLE, OUTPUT = 0, 1  # the inputs that every step has


class Sum(NamedTuple):
    """A sum as it is computed: the terms in turn, the first a product (the input itself if its coefficient is 1), each
    of the others a multiply-add with one rounding, then the product with the factor if that is not 1.

    Attributes:
        terms: (input, coefficient); an input equal to the number of inputs is x0.
        factor: of the whole sum.
    """

    terms: tuple[tuple[int, float], ...]
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Combination:
    """Sums of the same N tensors v_i: out_j = sum_i coefficients[j, i]*v_i + of_x0[j]*x0, for M outputs j, where
    x0 = clip(sum_i x0[i]*v_i). An input whose coefficient is 0 is not read: its NaN and infinities stay out.

    Attributes:
        coefficients: [M, N]. Input 0 is the sample, input 1 the model's output (its first C channels); the others are
            kept tensors and noise.
        x0: [N], of the unclipped x0; None if nothing uses it.
        of_x0: [M]; None for zeros.
        clip: of x0: None, a bound, or a `DynamicThreshold`; unused without x0.
        noise: with learned variances, the input that is added to output 0 last, with the coefficient 2**(l_0 + l_v*v)
            instead of its own; v is the second C channels of the model's output.
        l_0, l_v: of that coefficient.

    Raises:
        ValueError: an attribute that does not fit the others.
    """

    coefficients: NDArray[np.float64]
    x0: NDArray[np.float64] | None = None
    of_x0: NDArray[np.float64] | None = None
    clip: float | DynamicThreshold | None = None
    noise: int | None = None
    l_0: float = 0.0
    l_v: float = 0.0

    def __post_init__(self) -> None:
        coefficients = np.array(self.coefficients, np.float64)
        if coefficients.ndim != 2 or not coefficients.size:
            raise ValueError(f"coefficients: got shape {coefficients.shape}, expected [M, N]")
        object.__setattr__(self, "coefficients", coefficients)
        for name, size in (("x0", coefficients.shape[1]), ("of_x0", coefficients.shape[0])):
            if getattr(self, name) is not None:
                values = np.array(getattr(self, name), np.float64)
                if values.shape != (size,):
                    raise ValueError(f"{name}: got shape {values.shape}, expected ({size},)")
                object.__setattr__(self, name, values)
        if self.x0 is None and self.of_x0 is not None and self.of_x0.any():
            raise ValueError("x0: got None with coefficients of x0, expected the sum that x0 is")
        if self.clip is not None and not isinstance(self.clip, DynamicThreshold):
            object.__setattr__(self, "clip", check_finite("clip", self.clip, least=0))
        if self.noise is not None and not 1 < self.noise < coefficients.shape[1]:
            raise ValueError(f"noise: got {self.noise}, expected an input after the model's output")

    @property
    def uses_x0(self) -> bool:
        """Whether an output has a term of x0."""
        return self.of_x0 is not None and bool(self.of_x0.any())

    def sum_of(self, output: int, dtype: torch.dtype = torch.float32) -> Sum:
        """An output's sum, without its learned noise, for coefficients rounded to a dtype."""
        row = self.coefficients[output].copy()
        if output == 0 and self.noise is not None:
            row[self.noise] = 0
        return _sum_of(row, 0.0 if self.of_x0 is None else float(self.of_x0[output]), dtype)

    def sum_of_x0(self, dtype: torch.dtype = torch.float32) -> Sum:
        """The sum that x0 is before its clip; for a combination with x0."""
        return _sum_of(self.x0, 0.0, dtype)  # type: ignore[arg-type]


def _sum_of(row: NDArray[np.float64], of_x0: float, dtype: torch.dtype) -> Sum:
    """The order that rounds least, mostly: kept tensors and noise, x0, the model's output, the sample."""
    order = [*range(OUTPUT + 1, len(row)), len(row), *range(min(OUTPUT, len(row) - 1), -1, -1)]
    values = [*row.tolist(), of_x0]
    terms = [(index, values[index]) for index in order if values[index] != 0]
    factor = 1.0
    of_sample, squares = values[SAMPLE], sum(value * value for _, value in terms)
    if len(terms) > 1 and abs(of_sample) > 1 and 2 < squares < np.inf:
        # Large terms that nearly cancel, as in an x0 from noise. With the sample's coefficient taken out, only those of
        # the others are rounded before terms cancel.
        factor = of_sample
        terms = [(index, value / factor) for index, value in terms]
    if len(terms) == 2 and is_one(terms[1][1], dtype):
        # The exact term first: then the other's product is not rounded by itself.
        terms.reverse()
    return Sum(tuple(terms), 1.0 if is_one(factor, dtype) else factor)


def is_one(value: float, dtype: torch.dtype) -> bool:
    """Whether a coefficient is 1 once it is rounded to a dtype."""
    return bool((value if dtype == torch.float64 else np.float32(value)) == 1)
