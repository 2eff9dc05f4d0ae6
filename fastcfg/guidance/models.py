"""Guidance by other models, or by the same one perturbed: `Sampler(branch_models={"weak": ...})`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..table import StepTable
from .cfg import CFG
from .scales import Scale, check_interval, check_scale, close, inside_interval, scale_by_row

__all__ = ["AutoGuidance", "PerturbedCFG"]


@dataclass(frozen=True, eq=False)
class AutoGuidance(CFG):
    """Guidance by a weaker version of the model: m = weak + s (cond - weak) (Karras et al. 2024,
    https://arxiv.org/abs/2406.02507; diffusers' AutoGuidance).

    The branch "weak" is run by `Sampler(branch_models={"weak": model})`, with the conditional branch's conditioning
    unless it is given its own. A forward of each model, one pass.

    Attributes:
        scale, interval, formulation, rescale: as `CFG`.
        order: a permutation of ("cond", "weak").

    Raises:
        ValueError: as `CFG`.
    """

    order: tuple[str, ...] = ("cond", "weak")

    names: ClassVar[tuple[str, ...]] = ("cond", "weak")


@dataclass(frozen=True, eq=False)
class PerturbedCFG(CFG):
    """Classifier-free guidance with a second guide, the conditional branch of a perturbed model: m = CFG + s_p (cond -
    perturbed).

    Perturbed-attention guidance (Ahn et al. 2024, https://arxiv.org/abs/2403.17377), skip-layer guidance (Stable
    Diffusion 3.5) and their like; diffusers' PerturbedAttentionGuidance and SkipLayerGuidance. The branch "perturbed"
    is run by `Sampler(branch_models={"perturbed": ...})`: any callable, such as one that calls the model with its
    attention scores left out. Where only one of the two guides, only its branches are evaluated, and the base is that
    branch ("standard") or cond ("original"). Up to three forwards, one pass.

    Attributes:
        scale, interval, rescale: as `CFG`.
        formulation: as `CFG`; "sum" is "standard".
        order: a permutation of ("cond", "uncond", "perturbed").
        perturbed_scale: s_p, as `CFG.scale`; 0 for none.
        perturbed_interval: (start, stop): step i of N is inside if int(start*N) < i < int(stop*N), as in diffusers'
            guiders, the first one excluded.

    Raises:
        ValueError: as `CFG`, for both scales and intervals.
    """

    order: tuple[str, ...] = ("cond", "uncond", "perturbed")
    perturbed_scale: Scale = 2.8
    perturbed_interval: tuple[float, float] = (0.01, 0.2)

    names: ClassVar[tuple[str, ...]] = ("cond", "uncond", "perturbed")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("perturbed_scale", self.perturbed_scale)
        check_interval(self.perturbed_interval, "perturbed_interval")

    @property
    def base(self) -> int | None:
        return self.conditional

    def weights(self, table: StepTable, batch: int) -> NDArray[np.float64]:
        scale = scale_by_row("scale", self.scale, table, batch)
        perturbed = scale_by_row("perturbed_scale", self.perturbed_scale, table, batch)
        original = self.formulation == "original"
        guided = inside_interval(self.interval, table)[:, None] & ~close(scale, 1 - original)
        first = table.steps == int(self.perturbed_interval[0] * table.num_steps)
        pushed = (inside_interval(self.perturbed_interval, table) & ~first)[:, None] & (perturbed != 0)
        weights = np.zeros((table.num_rows, batch, 3))
        weights[..., self.other] = np.where(guided, (not original) - scale, 0)
        alone = pushed & ~guided & (not original)
        weights[..., self.branches.index("perturbed")] = np.where(pushed, alone - perturbed, 0)
        return weights

    def inside(self, table: StepTable) -> NDArray[np.bool_]:
        return np.ones(table.num_rows, dtype=bool)
