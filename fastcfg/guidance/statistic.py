"""Guidance whose weights are formulas of the branches' norms and inner products. Two passes per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..table import StepTable
from .base import Guidance
from .gram import GramGuidance
from .scales import Scale, check_number, check_scale, scale_by_row

__all__ = ["CFGZeroStar", "MagnitudeAwareCFG", "PerpNeg", "TangentialCFG"]

_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class CFGZeroStar(GramGuidance):
    """CFG-Zero* for flow matching (Fan et al. 2025, https://arxiv.org/abs/2503.18886; diffusers'
    ClassifierFreeZeroStarGuidance).

    m = α uncond + s (cond - α uncond) with α = <cond, uncond> / (||uncond||² + 1e-8), the best multiple of uncond; and
    m = 0 in the first steps, where the prediction is worse than none. Two forwards, two passes. For an uncond of norm 0
    α is 0.

    Attributes:
        scale, interval, formulation, order, rescale: as `CFG`.
        zero_init_steps: the first steps, whose output is 0 (inside the interval or not).

    Raises:
        ValueError: as `CFG`, or a number of steps that is no integer of at least 0.
    """

    zero_init_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.zero_init_steps, int) or self.zero_init_steps < 0:
            raise ValueError(f"zero_init_steps: got {self.zero_init_steps!r}, expected an integer of at least 0")

    def inside(self, table: StepTable) -> NDArray[np.bool_]:
        return super().inside(table) | (table.steps < self.zero_init_steps)

    def weights(self, table: StepTable, batch: int) -> NDArray[np.float64]:
        weights = super().weights(table, batch)
        weights[table.steps < self.zero_init_steps] = 0
        return weights

    def planned(self, table: StepTable, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        planned = super().planned(table, weights)
        planned[table.steps < self.zero_init_steps] = 0
        return planned

    def mixer(self) -> Callable[..., Any]:
        return partial(_zero_star, u=self.other, c=self.conditional)


@dataclass(frozen=True, eq=False)
class TangentialCFG(GramGuidance):
    """Tangential damping: guidance away from the part of uncond that cond shares (Kwon et al. 2025,
    https://arxiv.org/abs/2503.18137; diffusers' TangentialClassifierFreeGuidance).

    m = u' + s (cond - u') with u' = <uncond, v> v, where v is the first right singular vector of (cond, uncond): in
    their span, an eigenvector of their Gram matrix. Two forwards, two passes. Where v is anything in the span (branches
    of one norm at right angles, or both 0), u' is uncond / 2.

    Attributes:
        scale, interval, formulation, order, rescale: as `CFG`.
    """

    def mixer(self) -> Callable[..., Any]:
        return partial(_tangential, u=self.other, c=self.conditional)


@dataclass(frozen=True, eq=False)
class MagnitudeAwareCFG(GramGuidance):
    """MAMBO-G: large scales, damped where the update is large, as at the beginning (Zhu et al. 2025,
    https://arxiv.org/abs/2508.03442; diffusers' MagnitudeAwareGuidance).

    m = uncond + (1 + (s - 1) exp(-α ||cond - uncond|| / ||uncond||)) (cond - uncond). Two forwards, two passes. For an
    uncond of norm 0 it is cond.

    Attributes:
        scale, interval, formulation, order, rescale: as `CFG`.
        alpha: α, at least 0.

    Raises:
        ValueError: as `CFG`, or an α that is negative or not finite.
    """

    scale: Scale = 10.0
    alpha: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0)

    def mixer(self) -> Callable[..., Any]:
        return partial(_magnitude_aware, u=self.other, c=self.conditional, alpha=self.alpha)


@dataclass(frozen=True, eq=False)
class PerpNeg(Guidance):
    """Negative prompts that take nothing from the positive one (Armandpour et al. 2023,
    https://arxiv.org/abs/2304.04968).

    m = uncond + s (e - Σ w_k (e_k - proj_e e_k)) with e = cond - uncond and e_k = negative_k - uncond. A forward for
    each branch, two passes. Where cond equals uncond nothing is projected.

    Attributes:
        scale: s, as `CFG.scale`.
        negatives: the weights w_k by branch name, each as `CFG.scale`, positive to lead away.
        interval: as `CFG.interval`.
        rescale: as `CFG.rescale`.

    Raises:
        ValueError: no negatives, names that are "cond" or "uncond", non-finite numbers, a bad interval or rescale.
    """

    scale: Scale = 7.5
    negatives: Mapping[str, Scale] = field(default_factory=lambda: {"negative": 1.0})
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if not self.negatives or {"cond", "uncond"} & set(self.negatives):
            raise ValueError(f"negatives: got {sorted(self.negatives)}, expected names other than 'cond' and 'uncond'")
        check_scale("scale", self.scale)
        for name, weight in self.negatives.items():
            check_scale(f"negatives[{name!r}]", weight)
        super().__post_init__()

    @property
    def branches(self) -> tuple[str, ...]:
        return ("cond", *self.negatives, "uncond")

    @property
    def base(self) -> int | None:
        return len(self.negatives) + 1

    def weights(self, table: StepTable, batch: int) -> NDArray[np.float64]:
        scale = scale_by_row("scale", self.scale, table, batch)
        away = [scale_by_row(f"negatives[{name!r}]", weight, table, batch) for name, weight in self.negatives.items()]
        return np.stack([scale, *(-scale * weight for weight in away), np.zeros_like(scale)], axis=-1)

    def mixer(self) -> Callable[..., Any]:
        return _perp_neg


# `GuidancePlan.mix` of these, for u = uncond and, at the place of cond, the difference from it.


def _zero_star(gram: Tensor, planned: Tensor, u: int, c: int) -> Tensor:
    square = gram[:, u, u]
    alpha = (square + gram[:, u, c]) / (square + 1e-8)
    weight = planned[:, c]
    return _pair(planned[:, u] * alpha + weight * (1 - alpha), weight, u)


def _tangential(gram: Tensor, planned: Tensor, u: int, c: int) -> Tensor:
    # The eigenvector (a, b) of [[cc, cu], [cu, uu]] is (cos, sin) of half the angle of ((cc - uu) / 2, cu); and
    # <uncond, v> v = b (a cond + b uncond).
    apart, together = gram[:, u, c] + gram[:, c, c] / 2, gram[:, u, u] + gram[:, u, c]
    radius = torch.hypot(apart, together).clamp_min(_TINY)
    ab, bb = together / radius / 2, (1 - apart / radius) / 2
    weight = planned[:, c]
    return _pair((1 - weight) * (ab + bb) + weight, (1 - weight) * ab + weight, u)


def _magnitude_aware(gram: Tensor, planned: Tensor, u: int, c: int, alpha: float) -> Tensor:
    ratio = (gram[:, c, c] / gram[:, u, u].clamp_min(_TINY)).sqrt()
    return _pair(planned[:, u], 1 + (planned[:, c] - 1) * torch.exp(-alpha * ratio), u)


def _perp_neg(gram: Tensor, planned: Tensor) -> Tensor:
    shares = gram[:, 1:-1, 0] / gram[:, :1, 0].clamp_min(_TINY)
    cond = planned[:, :1] - (planned[:, 1:-1] * shares).sum(dim=1, keepdim=True)
    return torch.cat([cond, planned[:, 1:]], dim=1)


def _pair(of_u: Tensor, of_d: Tensor, u: int) -> Tensor:
    """[B, 2], in the order of the branches."""
    return torch.stack([of_d, of_u] if u else [of_u, of_d], dim=1)
