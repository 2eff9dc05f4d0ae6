"""The row of the table that a run stands at, looked up on the device."""

from __future__ import annotations

import torch

from ..step import StepBuffers
from ..table import COLUMNS


class RowReader:
    """The counter's row, the one after it, and the row's weights, in memory of their own.

    Args:
        buffers: the run's tensors.

    Attributes:
        index: int32 [2]: the row and the next one.
        row: a scalar tensor for every column.
        next: the same of the next row.
        weights: [B, K], or None where there are none.
    """

    def __init__(self, buffers: StepBuffers) -> None:
        self._buffers = buffers
        self.index = torch.empty(2, dtype=torch.int32, device=buffers.x.device)
        self._rows = torch.empty_like(buffers.table[:2])
        self._weights = None if buffers.weights is None else torch.empty_like(buffers.weights[:1])
        self.row = dict(zip(COLUMNS, self._rows[0].unbind(), strict=True))
        self.next = dict(zip(COLUMNS, self._rows[1].unbind(), strict=True))
        self.weights = None if self._weights is None else self._weights[0]

    def read(self) -> None:
        """Look the rows up."""
        buffers = self._buffers
        self.index.copy_(buffers.counter[0])
        self.index[1].add_(1)
        torch.index_select(buffers.table, 0, self.index, out=self._rows)
        if self._weights is not None:
            torch.index_select(buffers.weights, 0, self.index[:1], out=self._weights)  # type: ignore[arg-type]
