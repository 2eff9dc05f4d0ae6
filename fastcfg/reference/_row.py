"""The run's current row of the table, looked up on the device."""

from __future__ import annotations

import torch

from ..step import StepBuffers
from ..table import DEVICE_COLUMNS


class RowReader:
    """The counter's row, the next one (a scalar tensor for every column), and if wanted the row's weights, in memory of
    their own."""

    def __init__(self, buffers: StepBuffers, weighted: bool) -> None:
        self._buffers = buffers
        # Views are made once: at small sizes dispatches cost most.
        self.count = buffers.counter[0]  # int32, the counter itself
        self._offsets = torch.arange(2, dtype=torch.int32, device=buffers.x.device)
        self.index = torch.empty_like(self._offsets)  # the row and the next one
        self._first = self.index[:1]
        self._rows = torch.empty_like(buffers.table[:2])
        weights = buffers.weights if weighted else None
        # Rows that are all the same memory need no look-up.
        is_same = weights is not None and weights.ndim > 3 and weights.stride(0) == 0
        self._weights = None if weights is None or is_same else torch.empty_like(weights[:1])
        self.row = dict(zip(DEVICE_COLUMNS, self._rows[0].unbind(), strict=True))
        self.next = dict(zip(DEVICE_COLUMNS, self._rows[1].unbind(), strict=True))
        found = weights if is_same else self._weights
        self.weights = None if found is None else found[0]  # [B, K, ...]

    def read(self) -> None:
        """Look the rows up."""
        torch.add(self.count, self._offsets, out=self.index)
        torch.index_select(self._buffers.table, 0, self.index, out=self._rows)
        if self._weights is not None:
            torch.index_select(self._buffers.weights, 0, self._first, out=self._weights)  # type: ignore[arg-type]
