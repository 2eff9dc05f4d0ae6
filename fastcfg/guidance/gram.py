"""Guidance whose weights are computed from the outputs, row by row and sample by sample, on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .cfg import CFG

__all__ = ["GramGuidance", "rescale_factor"]

# Variances below this share of the mean square are rounding errors of the Gram matrix.
_NO_VARIANCE = 1e-6


@dataclass(frozen=True, eq=False)
class GramGuidance(CFG):
    """Base of guidance that is a function of the Gram matrix: subclass it and write `mix`.

    A sample's vectors are u = uncond and d = cond - uncond; the output is w_u u + w_d d with the weights that `mix`
    returns. Two forwards, two passes over the outputs. Samples whose scale guides nothing (1, or 0 with formulation
    "original") and rows outside the interval are the conditional branch's, unseen by `mix`. Formulation "sum" is
    "standard".

    Attributes:
        scale, interval, formulation, order, rescale: as `CFG`.

    Example:
        Guidance of a bounded length: ||s d|| is at most that of uncond.

        >>> import torch
        >>> from dataclasses import dataclass
        >>> from fastcfg import GramGuidance, Sampler, Schedule, solvers
        >>> @dataclass(frozen=True, eq=False)
        ... class BoundedCFG(GramGuidance):
        ...     def mix(self, gram, planned):
        ...         u, d = self.other, self.conditional
        ...         longest = (gram[:, u, u] / gram[:, d, d].clamp_min(1e-30)).sqrt()
        ...         weights = planned.clone()               # 1 for u, the scale for d
        ...         weights[:, d] = planned[:, d].minimum(longest)
        ...         return weights
        >>> model = lambda x, t, y: x * y.view(-1, 1, 1, 1)
        >>> table = solvers.ddim(Schedule.named("linear").respace(10))
        >>> sampler = Sampler(model, table, guidance=BoundedCFG(7.5))
        >>> sampler.sample((2, 3, 8, 8), cond={"y": torch.ones(2)}, uncond={"y": torch.full((2,), 0.9)}, seed=0).shape
        torch.Size([2, 3, 8, 8])
    """

    def mix(self, gram: Tensor, planned: Tensor) -> Tensor:
        """A row's weights. It is captured with the step: tensor operations alone, nothing read back to the host.

        Args:
            gram: float64 [B, 2, 2], the inner products of u and d, at the places of uncond and cond in `branches`.
            planned: float64 [B, 2], the weights of u (1) and of d (the scale, of the standard formulation).

        Returns:
            float64 [B, 2].
        """
        raise NotImplementedError

    def mixer(self) -> Callable[..., Any] | None:
        return self.mix


def rescale_factor(
    gram: Tensor, sums: Tensor, count: int, weights: Tensor, base: int, conditional: int, rescale: float
) -> Tensor:
    """[B, 1]: φ std(cond)/std(m) + 1 - φ for the blend m of a row's vectors, by w^T Cov w.

    The Gram matrix knows a variance to 2**-19 of the mean square; where it is below a millionth of it, or 0, the factor
    is 1.

    Args:
        gram: float64 [B, V, V], as from `ops.gram`.
        sums: float64 [B, V].
        count: elements of a vector.
        weights: [B, V].
        base: index of the vector that is a branch's output itself.
        conditional: of the conditional branch's, an output or a difference from the base.
        rescale: φ.
    """
    sums = sums / count
    second = gram / count
    covariance = second - sums[:, :, None] * sums[:, None, :]
    variance = ((covariance @ weights[..., None])[..., 0] * weights).sum(-1)
    square = ((second @ weights[..., None])[..., 0] * weights).sum(-1)
    wanted = covariance[:, base, base]
    if conditional != base:
        wanted = wanted + 2 * covariance[:, base, conditional] + covariance[:, conditional, conditional]
    ratio = (wanted.clamp_min(0) / variance).sqrt()
    ratio = ratio.masked_fill(~(variance > _NO_VARIANCE * square), 1.0)
    return (rescale * ratio + (1 - rescale))[:, None]
