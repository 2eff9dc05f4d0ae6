"""Guidance whose weights are computed from the outputs, row by row and sample by sample, on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .cfg import CFG


@dataclass(frozen=True, eq=False)
class GramGuidance(CFG):
    """Base of guidance that is a function of the Gram matrix: subclass it and write `mix`.

    A sample's vectors are u = uncond and d = cond - uncond; the output is w_u u + w_d d with the weights that `mix`
    returns. Two forwards, two passes over the outputs. A sample with a scale that guides nothing (1, or 0 with
    formulation "original"), and rows outside the interval, are the conditional branch's: `mix` does not see them.
    Formulation "sum" is "standard".

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
        """Return a row's weights. It is captured with the step: only tensor operations, nothing read back to the host.

        Args:
            gram: float64 [B, 2, 2], the inner products of u and d, at the places of uncond and cond in `branches`.
            planned: float64 [B, 2], the weights of u (1) and of d (the scale, of the standard formulation).

        Returns:
            float64 [B, 2].
        """
        raise NotImplementedError

    def mixer(self) -> Callable[..., Any] | None:
        return self.mix
