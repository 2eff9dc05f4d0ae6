"""Whether a row left numbers that are not finite, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

FINITE = torch.iinfo(torch.int64).max  # what a record of no such row holds


class ReferenceFiniteCheck:
    """Notes in `record`, int64 [1], the smallest code ((row*S) + source)*B + sample of a sample with NaN or infinity.

    Args:
        x: the state [B, ...] after the row.
        counter: the run's, already at the next row.
        sources: int32 [K + 1]: the sources of the K branches' outputs, and that of the state, S - 1.
        record: written.
        every: only rows r with (r + 1) % every = 0 are checked.
    """

    def __init__(self, x: Tensor, counter: Tensor, sources: Tensor, record: Tensor, every: int) -> None:
        self._x, self._counter, self._record, self._every = x, counter, record, every
        self._per_row = (int(sources[-1]) + 1) * len(x)
        samples = torch.arange(len(x), device=x.device)
        self._codes = sources.long()[:, None] * len(x) + samples  # [K + 1, B]

    def __call__(self, output: Tensor) -> None:
        """Args: output: the model's, [K*B, ...]."""
        finite = torch.cat([output.isfinite().flatten(1).all(1), self._x.isfinite().flatten(1).all(1)])
        row = self._counter[0].long() - 1
        codes = self._codes + row * self._per_row
        passed = finite.view_as(codes) | ((row + 1) % self._every != 0)
        first = codes.masked_fill(passed, FINITE).amin()
        torch.minimum(self._record, first, out=self._record)
