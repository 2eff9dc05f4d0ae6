"""Guidance with weights computed from the branches' norms and inner products, on the device, row by row and sample by
sample: `GramGuidance`, and the methods of papers.

Two forwards and two passes over the outputs per row, unless a class says otherwise. Attributes that are not described,
and errors, are those of `CFG`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..table import StepTable
from .base import Guidance, GuidancePlan
from .cfg import CFG
from .scales import Count, Interval, Number, Positive, Scale, Scales, Share, scale_by_row

_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class GramGuidance(CFG):
    """Base of guidance that is a function of the Gram matrix: subclass it and write `mix`.

    A sample's vectors are u = uncond and d = cond - uncond; the output is w_u u + w_d d with the weights that `mix`
    returns. A sample with a scale that guides nothing (1, or 0 with formulation "original"), and rows outside the
    interval, are the conditional branch's: `mix` does not see them. Formulation "sum" is "standard".

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
        """A row's weights, float64 [B, 2], from the inner products of u and d, float64 [B, 2, 2], at the places of
        uncond and cond in `branches`, and the planned weights of u (1) and of d (the scale, of the standard
        formulation), float64 [B, 2]. It is captured with the step: only tensor operations, nothing read back.
        """
        raise NotImplementedError

    def mixer(self) -> Callable[..., Any] | None:
        return self.mix


@dataclass(frozen=True, eq=False)
class CFGZeroStar(GramGuidance):
    """CFG-Zero* for flow matching (Fan et al. 2025, https://arxiv.org/abs/2503.18886; diffusers'
    ClassifierFreeZeroStarGuidance).

    m = α uncond + s (cond - α uncond) with α = <cond, uncond> / (||uncond||² + 1e-8), the best multiple of uncond; and
    m = 0 in the first steps, where the prediction is worse than none. For an uncond of norm 0 α is 0.

    Attributes: zero_init_steps: the number of first steps with output 0 (inside the interval or not).
    """

    zero_init_steps: Count = 1

    def plan(self, table: StepTable, batch: int) -> GuidancePlan:
        plan, zero = super().plan(table, batch), table.steps < self.zero_init_steps
        plan.planned[zero] = 0  # type: ignore[index]
        active = (tuple(range(2)) if first else found for first, found in zip(zero, plan.active, strict=True))
        return replace(plan, active=tuple(active))

    def mixer(self) -> Callable[..., Any]:
        return partial(_zero_star, u=self.other, c=self.conditional)


@dataclass(frozen=True, eq=False)
class TangentialCFG(GramGuidance):
    """Tangential damping: guidance away from the part of uncond that cond shares (Kwon et al. 2025,
    https://arxiv.org/abs/2503.18137; diffusers' TangentialClassifierFreeGuidance).

    m = u' + s (cond - u') with u' = <uncond, v> v, where v is the first right singular vector of (cond, uncond): in
    their span, an eigenvector of their Gram matrix. Where v is anything in the span (branches of one norm at
    right angles, or both 0), u' is uncond / 2.
    """

    def mixer(self) -> Callable[..., Any]:
        return partial(_tangential, u=self.other, c=self.conditional)


@dataclass(frozen=True, eq=False)
class MagnitudeAwareCFG(GramGuidance):
    """MAMBO-G: large scales, damped where the update is large, as at the beginning (Zhu et al. 2025,
    https://arxiv.org/abs/2508.03442; diffusers' MagnitudeAwareGuidance).

    m = uncond + (1 + (s - 1) exp(-α ||cond - uncond|| / ||uncond||)) (cond - uncond). For an uncond of norm 0 it is
    cond. Attributes: alpha: α, at least 0.
    """

    scale: Scale = 10.0
    alpha: Positive = 8.0

    def mixer(self) -> Callable[..., Any]:
        return partial(_magnitude_aware, u=self.other, c=self.conditional, alpha=self.alpha)


@dataclass(frozen=True, eq=False)
class APG(GramGuidance):
    """Adaptive projected guidance: strong scales without oversaturation (Sadat et al. 2024,
    https://arxiv.org/abs/2410.02416; diffusers' AdaptiveProjectedGuidance).

    m = uncond + s (g' - (1 - η) proj_cond g') with g' = g min(1, r / ||g||), where g is cond - uncond or,
    with momentum β, the running sum h <- (cond - uncond) + β h of the guided rows so far. Norms and projections are
    over a whole sample. With momentum, one more tensor is read twice and written once per row. Nothing is projected
    onto a cond of norm 0, and a g of norm 0 stays 0.

    Attributes:
        formulation: "standard", or "original" for cond in place of the first uncond.
        eta: η, how much of the parallel part remains; the paper takes 0.
        momentum, norm_threshold: β, negative in the paper (-0.5, -0.75), None for none; the limit r, 0 for none.
    """

    eta: Number = 1.0
    momentum: Number | None = None
    norm_threshold: Positive = 15.0

    def planned(self, table: StepTable, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """The branches' weights without the update, and the update's."""
        original = self.formulation == "original"
        planned = np.concatenate([super().planned(table, weights), weights[..., self.conditional, None]], axis=-1)
        planned[..., self.conditional] = original
        planned[..., -1] -= original
        return planned

    def mixer(self) -> Callable[..., Any]:
        given = (self.other, self.conditional, self.momentum is not None, float(self.eta), float(self.norm_threshold))
        return partial(_project, *given)


@dataclass(frozen=True, eq=False)
class APGMix(APG):
    """Classifier-free guidance in the first steps, adaptive projected guidance after them (HunyuanImage 2.1; diffusers'
    AdaptiveProjectedMixGuidance). The momentum is collected from the first guided row on.

    Attributes:
        scale, apg_scale: of the first steps, and of the others, as `CFG.scale`.
        apg_start_step: the last step with plain guidance.
    """

    scale: Scale = 3.5
    eta: Number = 0.0
    momentum: Number | None = -0.5
    norm_threshold: Positive = 10.0
    apg_scale: Scale = 10.0
    apg_start_step: Count = 5

    def planned(self, table: StepTable, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        scale = scale_by_row("apg_scale", self.apg_scale, table, weights.shape[1])
        original = self.formulation == "original"
        # As in diffusers, a row with a scale that guides nothing gets plain guidance.
        projected = (table.steps > self.apg_start_step)[:, None] & ~np.isclose(scale, 1 - original, rtol=1e-9, atol=0)
        planned = super().planned(table, weights)
        planned[..., -1] = np.where(projected, scale, 0)
        planned[..., self.conditional] = np.where(projected, original, weights[..., self.conditional])
        return planned


@dataclass(frozen=True, eq=False)
class PerpNeg(Guidance):
    """Negative prompts without their part along the positive one (Armandpour et al. 2023,
    https://arxiv.org/abs/2304.04968).

    m = uncond + s (e - Σ w_k (e_k - proj_e e_k)) with e = cond - uncond and e_k = negative_k - uncond. A forward for
    each branch, two passes. Where cond equals uncond nothing is projected.

    Attributes:
        scale, interval, rescale: as `CFG`.
        negatives: the weights w_k by branch name, each as `CFG.scale`, positive to lead away.
    """

    scale: Scale = 7.5
    negatives: Scales = field(default_factory=lambda: {"negative": 1.0})
    interval: Interval = (0.0, 1.0)
    rescale: Share = 0.0

    def __post_init__(self) -> None:
        if not self.negatives or {"cond", "uncond"} & set(self.negatives):
            raise ValueError(f"negatives: got {sorted(self.negatives)}, expected names other than 'cond' and 'uncond'")
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


# `GuidancePlan.mix` of the classes above, for u = uncond and, in the place of cond, d = cond - uncond.


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


def _project(
    u: int, c: int, with_momentum: bool, eta: float, norm_threshold: float, gram: Tensor, planned: Tensor
) -> Tensor:
    g = gram.shape[1] - 1 if with_momentum else c
    weights, scale = planned[:, :-1], planned[:, -1]
    if norm_threshold > 0:
        scale = scale * (norm_threshold / gram[:, g, g].sqrt()).clamp(max=1)
    cond_square = gram[:, u, u] + 2 * gram[:, u, c] + gram[:, c, c]
    # The smallest square is that of torch.nn.functional.normalize.
    parallel = (1 - eta) * scale * (gram[:, u, g] + gram[:, c, g]) / cond_square.clamp_min(1e-24)
    columns = list((weights - parallel[:, None]).unbind(1))
    if with_momentum:
        columns.append(scale)
    else:
        columns[c] = columns[c] + scale
    return torch.stack(columns, dim=1)


def _perp_neg(gram: Tensor, planned: Tensor) -> Tensor:
    shares = gram[:, 1:-1, 0] / gram[:, :1, 0].clamp_min(_TINY)
    cond = planned[:, :1] - (planned[:, 1:-1] * shares).sum(dim=1, keepdim=True)
    return torch.cat([cond, planned[:, 1:]], dim=1)


def _pair(of_u: Tensor, of_d: Tensor, u: int) -> Tensor:
    return torch.stack([of_d, of_u] if u else [of_u, of_d], dim=1)
