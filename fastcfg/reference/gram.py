"""The branches' Gram matrix in torch, in float64 over the differences that the kernel forms in float32, and the factor
of rescaled guidance that follows from it."""

from __future__ import annotations

import torch
from torch import Tensor

from ._fma import fma

# Variances below this share of the mean square are the Gram matrix's rounding.
_NO_VARIANCE = 1e-6


def gram(
    output: Tensor, branches: int, base: int, channels: int, conditional: int, momentum: Tensor | None, decay: float
) -> Tensor:
    """float64 [B, V, V + 1]: the Gram matrix of every sample's vectors and, as the last column, their sums; arguments
    and V as for `fastcfg.ops.gram`."""
    dtype = torch.promote_types(output.dtype, torch.float32 if momentum is None else momentum.dtype)
    parts = output.narrow(1, 0, channels).to(dtype).chunk(branches)
    vectors = [part if k == base else part - parts[base] for k, part in enumerate(parts)]
    if momentum is not None:
        fma(momentum.new_full((), decay), momentum, vectors[conditional], out=momentum)
        vectors.append(momentum)
    stacked = torch.stack([vector.flatten(1).double() for vector in vectors], dim=1)
    # Sums over the last dimension alone: torch adds them in the same order whatever the batch.
    rows = [(stacked * stacked[:, i : i + 1]).sum(-1) for i in range(len(vectors))]
    return torch.stack([*rows, stacked.sum(-1)], dim=2)


def rescale_factor(
    gram: Tensor, sums: Tensor, count: int, weights: Tensor, base: int, conditional: int, rescale: float
) -> Tensor:
    """[B, 1]: φ std(cond)/std(m) + 1 - φ for the blend m of the vectors with weights [B, V]; 1 where m hardly varies.

    `gram` [B, V, V] and `sums` [B, V] are of vectors of `count` elements, rescale is φ.
    """
    sums = sums / count
    second = gram / count
    covariance = second - sums[:, :, None] * sums[:, None, :]
    # No matrix products: their order of additions may depend on the batch.
    pairs = weights[:, :, None] * weights[:, None, :]
    variance, square = (covariance * pairs).sum((1, 2)), (second * pairs).sum((1, 2))
    wanted = covariance[:, base, base]
    if conditional != base:
        wanted = wanted + 2 * covariance[:, base, conditional] + covariance[:, conditional, conditional]
    ratio = (wanted.clamp_min(0) / variance).sqrt()
    ratio = ratio.masked_fill(~(variance > _NO_VARIANCE * square), 1.0)
    return (rescale * ratio + (1 - rescale))[:, None]
