"""Adaptive guidance on the device: which samples' branches agree, and who is guided no more."""

from __future__ import annotations

import torch
from torch import Tensor

from .step import StepBuffers

__all__ = ["Agreement"]

# A decision made on row r acts on row r + 2: the host reads it when row r + 1 is enqueued.
DELAY = 2


class Agreement:
    """Compares two branches of every row, sample by sample, and ends the guidance of those that agree.

    A sample whose branches have had a cosine of at least the threshold once is unguided from two rows later on,
    whatever the batch. When all have, the host, which reads `done` one row late, can stop evaluating the other branch.

    Args:
        buffers: of the run.
        weights: [R + 2, B, K], of which rows 0 to R - 1 are the run's and the last two may be written to.
        pair: which of the K branches are compared.
        alone: [K], the weights of an unguided sample.
        threshold: the least cosine of agreement.
    """

    def __init__(
        self, buffers: StepBuffers, weights: Tensor, pair: tuple[int, int], alone: Tensor, threshold: float
    ) -> None:
        self._x, self._counter, self._weights = buffers.x, buffers.counter, weights
        self._pair, self._alone, self._threshold = pair, alone, threshold
        self._agreed = torch.zeros(len(buffers.x), dtype=torch.bool, device=buffers.x.device)
        self.done = torch.zeros((), dtype=torch.bool, device=buffers.x.device)

    def reset(self) -> None:
        """No sample has agreed yet."""
        self._agreed.zero_()
        self.done.zero_()

    def __call__(self, output: Tensor) -> None:
        """Args: output: the model's, [K*B, C or 2C, ...]."""
        first, second = (self._branch(output, k) for k in self._pair)
        norms = torch.linalg.vecdot(first, first) * torch.linalg.vecdot(second, second)
        # Without a division: branches of norm 0 have no cosine and do not agree.
        dot = torch.linalg.vecdot(first, second)
        self._agreed |= (dot >= self._threshold * norms.sqrt()) & (norms > 0)
        row = self._counter[:1].long() + DELAY
        planned = self._weights.index_select(0, row)
        self._weights.index_copy_(0, row, torch.where(self._agreed[:, None], self._alone, planned))
        self.done.copy_(self._agreed.all())

    def _branch(self, output: Tensor, k: int) -> Tensor:
        """A branch's prediction, [B, N] in the state's dtype, without variance channels."""
        batch, channels = self._x.shape[:2]
        return output[k * batch : (k + 1) * batch, :channels].to(self._x.dtype).flatten(1)
