"""Blend weights computed from a row's outputs, between model and fused step; and where adaptive guidance ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import gram
from ..ops.gram import mixed_weights
from ..step import StepBuffers

__all__ = ["DELAY", "Agreement", "BranchWeights", "Mixing"]

# An agreement on row r acts on row r + 2: the host reads it when row r + 1 is enqueued.
DELAY = 2


class BranchWeights:
    """Computes the Gram matrix of a row's branches in one pass and hands it to the readers.

    Args:
        readers: called with the Gram matrix and the sums.
        **options: of `ops.gram`, which also updates the momentum if there is one.
    """

    def __init__(self, readers: Sequence[Callable[[Tensor, Tensor], None]], **options: Any) -> None:
        self._readers, self._options = readers, options

    def __call__(self, output: Tensor) -> None:
        """Args: output: the model's, [K*B, C or 2C, ...]."""
        found = gram(output, **self._options)
        for read in self._readers:
            read(*found)


class Mixing:
    """Computes a row's blend weights.

    Args:
        buffers: the step's.
        planned: float64 [R + 2, B, P], as `GuidancePlan.planned`; the last two rows are padding.
        weights: [R, B, V] in the state's dtype, what the step reads; the current row's are written.
        base, conditional: indices of the base and of the conditional branch.
        mix, rescale: as `GuidancePlan`.
    """

    def __init__(
        self,
        buffers: StepBuffers,
        planned: Tensor,
        weights: Tensor,
        base: int,
        conditional: int,
        mix: Callable[[Tensor, Tensor], Tensor] | None,
        rescale: float,
    ) -> None:
        self._counter, self._planned, self._weights = buffers.counter, planned, weights
        self._count = buffers.x[0].numel()
        self._pair, self._mix, self._rescale = (base, conditional), mix, rescale

    def __call__(self, products: Tensor, sums: Tensor) -> None:
        row = self._counter[:1].long()
        planned = self._planned.index_select(0, row)[0]
        weights = mixed_weights(products, sums, self._count, planned, *self._pair, self._mix, self._rescale)
        self._weights.index_copy_(0, row, weights[None].to(self._weights.dtype))


class Agreement:
    """Ends the guidance of each sample once its branches agree.

    Once the cosine between a sample's branches has reached the bound, the sample is unguided from two rows later on,
    independently of the rest of the batch. When all samples are, the host, which reads `done` one row late, can stop
    evaluating the other branch.

    Args:
        buffers: the step's.
        planned: [R + 2, B, P], the (planned) weights; the last two rows are padding.
        base: as `Mixing`.
        pair: indices of the branches that are compared.
        fallback: [P], the (planned) weights of an unguided sample.
        cosine: the bound.
    """

    def __init__(
        self,
        buffers: StepBuffers,
        planned: Tensor,
        base: int,
        pair: tuple[int, int],
        fallback: Tensor,
        cosine: float,
    ) -> None:
        self._counter, self._planned, self._fallback = buffers.counter, planned, fallback
        self._base, self._pair, self._cosine = base, pair, cosine
        self._agreed = torch.zeros(len(buffers.x), dtype=torch.bool, device=buffers.x.device)
        self.done = torch.zeros((), dtype=torch.bool, device=buffers.x.device)

    def reset(self) -> None:
        """No sample has agreed yet."""
        self._agreed.zero_()
        self.done.zero_()

    def __call__(self, products: Tensor, sums: Tensor) -> None:
        i, j = self._pair
        dot = self._product(products, i, j)
        norms = self._product(products, i, i) * self._product(products, j, j)
        # Written without a division: branches of norm 0 have no cosine and do not agree.
        self._agreed |= (dot >= self._cosine * norms.sqrt()) & (norms > 0)
        row = self._counter[:1].long() + DELAY
        planned = self._planned.index_select(0, row)
        self._planned.index_copy_(0, row, torch.where(self._agreed[:, None], self._fallback, planned))
        self.done.copy_(self._agreed.all())

    def _product(self, products: Tensor, i: int, j: int) -> Tensor:
        """[B]: the inner product of two branches' outputs."""
        of_i, of_j = {i, self._base}, {j, self._base}
        return sum(products[:, a, b] for a in sorted(of_i) for b in sorted(of_j))  # type: ignore[return-value]
