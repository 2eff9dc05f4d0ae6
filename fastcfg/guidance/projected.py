"""Adaptive projected guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..table import StepTable
from .gram import GramGuidance
from .scales import Scale, check_number, check_scale, close, scale_by_row

__all__ = ["APG", "APGMix"]


@dataclass(frozen=True, eq=False)
class APG(GramGuidance):
    """Adaptive projected guidance: strong scales without oversaturation (Sadat et al. 2024,
    https://arxiv.org/abs/2410.02416; diffusers' AdaptiveProjectedGuidance).

    m = uncond + s (g' - (1 - η) proj_cond g') with g' = g min(1, norm_threshold / ||g||), where g is cond - uncond or,
    with momentum β, the running sum h <- (cond - uncond) + β h of the guided rows so far. Norms and projections are
    over a whole sample. Two forwards, two passes; with momentum a tensor more is read twice and written once per row.
    Zeros are harmless: nothing is projected onto a cond of norm 0, and a g of norm 0 stays 0.

    Attributes:
        scale, interval, order, rescale: as `CFG`.
        formulation: "standard", or "original" for cond in place of the first uncond.
        eta: η, how much of the parallel part remains; the paper takes 0.
        momentum: β, negative in the paper (-0.5, -0.75); None for none.
        norm_threshold: r; 0 for no limit.

    Raises:
        ValueError: as `CFG`, or numbers that are not finite or (r) negative.
    """

    eta: float = 1.0
    momentum: float | None = None
    norm_threshold: float = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eta", self.eta)
        check_number("norm_threshold", self.norm_threshold, 0)
        if self.momentum is not None:
            check_number("momentum", self.momentum)

    @property
    def decay(self) -> float | None:
        return self.momentum

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
    AdaptiveProjectedMixGuidance). The momentum is collected from the first guided row on. Cost as `APG`.

    Attributes:
        scale, interval, formulation, order, rescale, eta, momentum, norm_threshold: as `APG`; the scale is that of the
            first steps.
        apg_scale: that of the others, as `CFG.scale`.
        apg_start_step: the last step with plain guidance.

    Raises:
        ValueError: as `APG`, or a step that is no integer.
    """

    scale: Scale = 3.5
    eta: float = 0.0
    momentum: float | None = -0.5
    norm_threshold: float = 10.0
    apg_scale: Scale = 10.0
    apg_start_step: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("apg_scale", self.apg_scale)
        if not isinstance(self.apg_start_step, int):
            raise ValueError(f"apg_start_step: got {self.apg_start_step!r}, expected an integer")

    def planned(self, table: StepTable, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        scale = scale_by_row("apg_scale", self.apg_scale, table, weights.shape[1])
        original = self.formulation == "original"
        # As in diffusers a scale that guides nothing leaves the row to plain guidance.
        projected = (table.steps > self.apg_start_step)[:, None] & ~close(scale, 1 - original)
        planned = super().planned(table, weights)
        planned[..., -1] = np.where(projected, scale, 0)
        planned[..., self.conditional] = np.where(projected, original, weights[..., self.conditional])
        return planned


def _project(
    u: int, c: int, with_momentum: bool, eta: float, norm_threshold: float, gram: Tensor, planned: Tensor
) -> Tensor:
    """`GuidancePlan.mix` of APG: the last column plans the update."""
    g = gram.shape[1] - 1 if with_momentum else c
    weights = planned[:, :-1]
    scale = planned[:, -1]
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
