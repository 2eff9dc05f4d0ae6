"""Guidance by several conditionings, or by several models: `Sampler(branch_models={"weak": ...})`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..table import StepTable
from .base import Guidance
from .cfg import CFG
from .scales import Interval, Scale, Scales, Share, inside_interval, scale_by_row


@dataclass(frozen=True, eq=False)
class Compose(Guidance):
    """Composable diffusion: several conditionings, each guided away from the unconditional one: m = uncond +
    Σ s_k (m_k - uncond) (Liu et al. 2022, https://arxiv.org/abs/2206.01714).

    Attributes:
        scales: by branch name, one of them "cond" (its variance channels are used); each as `CFG.scale`.
        interval, rescale: as `CFG`.

    Raises:
        ValueError: names without "cond" or with "uncond".
    """

    scales: Scales
    interval: Interval = (0.0, 1.0)
    rescale: Share = 0.0

    def __post_init__(self) -> None:
        if "cond" not in self.scales or "uncond" in self.scales:
            raise ValueError(f"scales: got {sorted(self.scales)}, expected names with 'cond' and without 'uncond'")
        super().__post_init__()

    @property
    def branches(self) -> tuple[str, ...]:
        return (*self.scales, "uncond")

    @property
    def base(self) -> int | None:
        return len(self.scales)

    def weights(self, table: StepTable, batch: int) -> NDArray[np.float64]:
        scales = [scale_by_row(f"scales[{name!r}]", scale, table, batch) for name, scale in self.scales.items()]
        return np.stack([*scales, np.zeros_like(scales[0])], axis=-1)


@dataclass(frozen=True, eq=False)
class InstructPix2Pix(Guidance):
    """Editing by instruction: m = uncond + s_image (image - uncond) + s_text (cond - image) (Brooks et al. 2022,
    https://arxiv.org/abs/2211.09800). The branch "cond" has text and image, "image" the image alone, "uncond" neither.
    Three forwards, one pass.

    Attributes:
        text_scale, image_scale: s_text and s_image, as `CFG.scale`.
        interval, rescale: as `CFG`.
    """

    text_scale: Scale = 7.5
    image_scale: Scale = 1.5
    interval: Interval = (0.0, 1.0)
    rescale: Share = 0.0

    branches = ("cond", "image", "uncond")
    base = 2

    def weights(self, table: StepTable, batch: int) -> NDArray[np.float64]:
        text = scale_by_row("text_scale", self.text_scale, table, batch)
        image = scale_by_row("image_scale", self.image_scale, table, batch)
        return np.stack([text, image - text, np.zeros_like(text)], axis=-1)


@dataclass(frozen=True, eq=False)
class AutoGuidance(CFG):
    """Guidance by a weaker version of the model: m = weak + s (cond - weak) (Karras et al. 2024,
    https://arxiv.org/abs/2406.02507; diffusers' AutoGuidance).

    The branch "weak" is run by `Sampler(branch_models={"weak": model})`, with the conditional branch's conditioning
    unless it is given its own. A forward of each model, one pass. Attributes as `CFG`.
    """

    order: tuple[str, ...] = ("cond", "weak")

    names: ClassVar[tuple[str, ...]] = ("cond", "weak")


@dataclass(frozen=True, eq=False)
class PerturbedCFG(CFG):
    """Classifier-free guidance with a second guide, the conditional branch of a perturbed model: m = CFG + s_p (cond -
    perturbed).

    Perturbed-attention guidance (Ahn et al. 2024, https://arxiv.org/abs/2403.17377), skip-layer guidance (Stable
    Diffusion 3.5) and others; diffusers' PerturbedAttentionGuidance and SkipLayerGuidance. The branch "perturbed" is
    run by `Sampler(branch_models={"perturbed": ...})`: any callable, as the model without its attention scores. Where
    only one of the two guides, only its branches are evaluated, and the base is that branch ("standard") or cond
    ("original"). Up to three forwards, one pass.

    Attributes (with those of `CFG`; formulation "sum" is "standard"):
        perturbed_scale: s_p, as `CFG.scale`; 0 for none.
        perturbed_interval: step i of N is inside if int(start*N) < i < int(stop*N), as in diffusers' guiders.
    """

    order: tuple[str, ...] = ("cond", "uncond", "perturbed")
    perturbed_scale: Scale = 2.8
    perturbed_interval: Interval = (0.01, 0.2)

    names: ClassVar[tuple[str, ...]] = ("cond", "uncond", "perturbed")

    @property
    def base(self) -> int | None:
        return self.conditional

    def weights(self, table: StepTable, batch: int) -> NDArray[np.float64]:
        scale = scale_by_row("scale", self.scale, table, batch)
        perturbed = scale_by_row("perturbed_scale", self.perturbed_scale, table, batch)
        original = self.formulation == "original"
        guided = inside_interval(self.interval, table)[:, None] & ~np.isclose(scale, 1 - original, rtol=1e-9, atol=0)
        first = table.steps == int(self.perturbed_interval[0] * table.num_steps)
        pushed = (inside_interval(self.perturbed_interval, table) & ~first)[:, None] & (perturbed != 0)
        weights = np.zeros((table.num_rows, batch, 3))
        weights[..., self.other] = np.where(guided, (not original) - scale, 0)
        alone = pushed & ~guided & (not original)
        weights[..., self.branches.index("perturbed")] = np.where(pushed, alone - perturbed, 0)
        return weights

    def inside(self, table: StepTable) -> NDArray[np.bool_]:
        return np.ones(table.num_rows, dtype=bool)
