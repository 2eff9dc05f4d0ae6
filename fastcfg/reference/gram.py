"""The Gram matrix of the branches in torch: float64 over the differences that the kernel forms in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ._fma import fma


def gram(
    output: Tensor, branches: int, base: int, channels: int, conditional: int, momentum: Tensor | None, decay: float
) -> Tensor:
    """The Gram matrix of a sample's vectors and, as the last column, their sums.

    Args:
        output: [K*B, C or 2C, ...] in any floating dtype; the first C channels count.
        branches: K.
        base: the branch that differences are measured from.
        channels: C.
        conditional: another, whose difference the momentum takes up.
        momentum: [B, C, ...], rewritten: decay*h + difference; None for none.
        decay: a number.

    Returns:
        float64 [B, V, V + 1] with V = K, or K + 1 with momentum.
    """
    dtype = torch.promote_types(output.dtype, torch.float32 if momentum is None else momentum.dtype)
    parts = output.narrow(1, 0, channels).to(dtype).chunk(branches)
    vectors = [part if k == base else part - parts[base] for k, part in enumerate(parts)]
    if momentum is not None:
        fma(momentum.new_full((), decay), momentum, vectors[conditional], out=momentum)
        vectors.append(momentum)
    stacked = torch.stack([vector.flatten(1).double() for vector in vectors], dim=1)
    # Rows of sums over the last dimension alone: torch adds them in the same order whatever the batch.
    rows = [(stacked * stacked[:, i : i + 1]).sum(-1) for i in range(len(vectors))]
    return torch.stack([*rows, stacked.sum(-1)], dim=2)
