"""Errors of compiled methods in float32 against float64, beside the originals' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Of runs with so many steps: the largest error by step and of whole runs.
Bounds = Mapping[tuple[int, ...], tuple[float, float]]


def mean_square(got: Tensor, want: Tensor) -> float:
    """In shares of the largest value."""
    return float(((got - want) / max(1.0, float(want.abs().max()))).square().mean())


def assert_no_larger(squares: Callable[[int], list[list[float]] | None], bounds: Bounds) -> None:
    """Root mean squares of the errors are within bounds, in the original's.

    Args:
        squares: for a number of steps the sums of mean squares, by step and of the whole run, the compiled and the
            original one's; None where the original does not run.
        bounds: for each group of such numbers.
    """
    for counts, (by_step_bound, whole_bound) in bounds.items():
        found = [sums for count in counts if (sums := squares(count)) is not None]
        ours, theirs = torch.tensor(found, dtype=torch.float64).sum(dim=0).unbind(dim=1)
        by_step, whole = (ours / theirs).sqrt().tolist()
        assert by_step <= by_step_bound, counts
        assert whole <= whole_bound, counts
