"""Blend weights computed from a row's outputs, between model and fused step; and where adaptive guidance ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops import gram
from ..ops.gram import mixed_weights
from ..step import StepBuffers
from .call import ProgramOptions

# An agreement on row r acts on row r + 2: the host reads it when row r + 1 is enqueued.
DELAY = 2


class BranchWeights:
    """Computes the Gram matrix of a row's branches in one pass, then the weights that follow from it.

    Args:
        options, buffers: of the program.
        active: the branches.
        planned: [R + 2, B, P], the (planned) weights; the last two rows are padding.
        weights: [R, B, V] in the state's dtype, what the step reads; the current row's are written.
        agreement: with adaptive guidance, what ends it.
    """

    def __init__(
        self,
        options: ProgramOptions,
        buffers: StepBuffers,
        active: tuple[int, ...],
        planned: Tensor,
        weights: Tensor,
        agreement: Agreement | None,
    ) -> None:
        base, conditional = base_index(options, active), active.index(options.conditional)
        others: dict[str, Any] = {"conditional": conditional, "channels": buffers.x.shape[1]}
        if options.momentum is not None:
            others |= {"momentum": buffers.momentum, "decay": options.momentum}
        self._gram: Callable[[Tensor], tuple[Tensor, Tensor]] = partial(
            gram, branches=len(active), base=base, backend=options.config.backend, **others
        )
        self._counter, self._planned, self._weights, self._agreement = buffers.counter, planned, weights, agreement
        self._mixes, self._count = options.uses_outputs(active), buffers.x[0].numel()
        self._arguments = base, conditional, options.mix.value, options.rescale

    def __call__(self, output: Tensor) -> None:
        """Args: output: the model's, [K*B, C or 2C, ...]."""
        products, sums = self._gram(output)
        row = self._counter[:1].long()
        if self._agreement is not None:
            self._agreement.update(products, row)
        if self._mixes:
            planned = self._planned.index_select(0, row)[0]
            weights = mixed_weights(products, sums, self._count, planned, *self._arguments)
            self._weights.index_copy_(0, row, weights[None].to(self._weights.dtype))


class Agreement:
    """Ends the guidance of each sample once its branches agree.

    Once the cosine between a sample's `pair` of branches has reached the bound, the sample is unguided (its weights are
    `fallback`, [P]) from two rows later on, independently of the rest of the batch. When all samples are, the host,
    which reads `done` one row late, can stop evaluating the other branch.
    """

    def __init__(self, planned: Tensor, base: int, pair: tuple[int, int], fallback: Tensor, cosine: float) -> None:
        self._planned, self._base, self._pair = planned, base, pair
        self._fallback, self._cosine = fallback, cosine
        self._agreed = torch.zeros(planned.shape[1], dtype=torch.bool, device=planned.device)
        self.done = torch.zeros((), dtype=torch.bool, device=planned.device)

    def reset(self) -> None:
        """No sample has agreed yet."""
        self._agreed.zero_()
        self.done.zero_()

    def update(self, products: Tensor, row: Tensor) -> None:
        """Take a row, int64 [1], into account by its Gram matrix."""
        i, j = self._pair
        dot = self._product(products, i, j)
        norms = self._product(products, i, i) * self._product(products, j, j)
        # Written without a division: branches of norm 0 have no cosine and do not agree.
        self._agreed |= (dot >= self._cosine * norms.sqrt()) & (norms > 0)
        row = row + DELAY
        planned = self._planned.index_select(0, row)
        self._planned.index_copy_(0, row, torch.where(self._agreed[:, None], self._fallback, planned))
        self.done.copy_(self._agreed.all())

    def _product(self, products: Tensor, i: int, j: int) -> Tensor:
        """[B]: the inner product of two branches' outputs."""
        of_i, of_j = {i, self._base}, {j, self._base}
        return sum(products[:, a, b] for a in sorted(of_i) for b in sorted(of_j))  # type: ignore[return-value]


def base_index(options: ProgramOptions, active: tuple[int, ...]) -> int:
    """The branch among `active` that differences are measured from: the last one for the sum form."""
    return len(active) - 1 if options.base is None else active.index(options.base)
