"""Guidance by several conditionings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..table import StepTable
from .base import Guidance
from .scales import Scale, check_scale, scale_by_row

__all__ = ["Compose", "InstructPix2Pix"]


@dataclass(frozen=True, eq=False)
class Compose(Guidance):
    """Several conditionings, each guided away from the unconditional one: m = uncond + Σ s_k (m_k - uncond).

    Composable diffusion (Liu et al. 2022, https://arxiv.org/abs/2206.01714).

    Attributes:
        scales: by branch name, one of them "cond" (whose variance channels are used); each as `CFG.scale`.
        interval: as `CFG.interval`.
        rescale: as `CFG.rescale`.

    Raises:
        ValueError: no "cond" among the names, "uncond" among them, non-finite scales, a bad interval or rescale.
    """

    scales: Mapping[str, Scale]
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if "cond" not in self.scales or "uncond" in self.scales:
            raise ValueError(f"scales: got {sorted(self.scales)}, expected names with 'cond' and without 'uncond'")
        for name, scale in self.scales.items():
            check_scale(f"scales[{name!r}]", scale)
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
    """Editing by instruction: m = uncond + s_image (image - uncond) + s_text (cond - image).

    InstructPix2Pix (Brooks et al. 2022, https://arxiv.org/abs/2211.09800). The branch "cond" has text and image,
    "image" the image alone, "uncond" neither. Three forwards, one pass.

    Attributes:
        text_scale: s_text, as `CFG.scale`.
        image_scale: s_image, likewise.
        interval: as `CFG.interval`.
        rescale: as `CFG.rescale`.

    Raises:
        ValueError: non-finite scales, a bad interval or rescale.
    """

    text_scale: Scale = 7.5
    image_scale: Scale = 1.5
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def __post_init__(self) -> None:
        check_scale("text_scale", self.text_scale)
        check_scale("image_scale", self.image_scale)
        super().__post_init__()

    @property
    def branches(self) -> tuple[str, ...]:
        return ("cond", "image", "uncond")

    @property
    def base(self) -> int | None:
        return 2

    def weights(self, table: StepTable, batch: int) -> NDArray[np.float64]:
        text = scale_by_row("text_scale", self.text_scale, table, batch)
        image = scale_by_row("image_scale", self.image_scale, table, batch)
        return np.stack([text, image - text, np.zeros_like(text)], axis=-1)
