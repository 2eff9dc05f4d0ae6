"""What a compiled sampler leaves beside its table: how the original's own draws make its noise."""

from __future__ import annotations

from dataclasses import dataclass

from ..table import StepTable

__all__ = ["Compiled"]


@dataclass(frozen=True, eq=False)
class Compiled:
    """A table, and the draws of noise that the original makes, in its order: for images of the same seed.

    Attributes:
        table: its s is the joint deviation of a row's draws, its initial_scale that of the start.
        draws: for every row the coefficients of the draws after its model call, 0 where the value is not used (but
            drawn): s * z = sum_k draws[row][k] * z_k; of learned variances those where v is 0.
        start: the first state's share of the x that the original is given.
        start_draws: those of the draws before the first model call: x_T = start * x + sum_k start_draws[k] * z_k.
    """

    table: StepTable
    draws: tuple[tuple[float, ...], ...]
    start: float = 1.0
    start_draws: tuple[float, ...] = ()
