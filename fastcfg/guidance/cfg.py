"""Classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..table import StepTable
from ..utils.checks import check_count, check_one_of
from .base import Guidance, GuidancePlan
from .scales import Cosine, Count, Interval, Scale, Share, scale_by_row

FORMULATIONS = ("standard", "original", "sum")


@dataclass(frozen=True, eq=False)
class CFG(Guidance):
    """Classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598).

    A negative prompt is the conditioning given to the unconditional branch.

    Attributes:
        scale: s of m = uncond + s (cond - uncond); with formulation "original", w of m = cond + w (cond - uncond). A
            number; B numbers, one per sample; an array [R, 1] or [R, B] with one row per model evaluation; or a
            function of the progress through the run, 0 at the first step and below 1 at the last, that returns a number
            or B numbers. In a `Sampler` also an array that broadcasts to the samples [B, C, ...], with all of their
            dimensions: by channel, frame or place; one more in front is by row, [R, B, C, ...].
        interval: (start, stop) in fractions of the run's steps; outside it only the conditional branch is evaluated
            (Kynkäänniemi et al. 2024, https://arxiv.org/abs/2404.07724). Step i of N is inside if int(start*N) <= i <
            int(stop*N), as in diffusers' guiders.
        formulation: "standard", "original" (diffusers' `use_original_formulation`), or "sum": s*cond + (1 - s)*uncond;
            they agree up to rounding.
        order: of the branches along the batch: in GLIDE and guided-diffusion cond is first, in diffusers uncond.
        rescale: φ of the last factor φ std(cond)/std(m) + 1 - φ, against overexposure (Lin et al. 2023, section 3.4,
            https://arxiv.org/abs/2305.08891; diffusers' `guidance_rescale`). Above 0 it takes a second pass over the
            outputs per row. A prediction that hardly varies (a standard deviation below a thousandth of its root mean
            square, or zeros) is left as it is.
        channels: how many of the state's channels are guided, the first ones, in a `Sampler`; the others are the
            conditional branch's, as in the first half of DiT's `forward_with_cfg`, which guides 3 of 4. None for all.

    Raises:
        ValueError: non-finite scale, an interval not within 0 <= start < stop <= 1, unknown formulation, an order that
            is not a permutation of ("cond", "uncond"), a rescale outside 0 to 1, or channels below 1.

    Example:
        >>> CFG(3.0).branches
        ('cond', 'uncond')
    """

    scale: Scale = 3.0
    interval: Interval = (0.0, 1.0)
    formulation: str = "standard"
    order: tuple[str, ...] = ("cond", "uncond")
    rescale: Share = 0.0
    channels: Count | None = field(default=None, kw_only=True)

    names: ClassVar[tuple[str, ...]] = ("cond", "uncond")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels is not None:
            check_count("channels", self.channels)
        check_one_of("formulation", self.formulation, FORMULATIONS)
        if sorted(self.order) != sorted(self.names):
            raise ValueError(f"order: got {self.order!r}, expected a permutation of {self.names}")

    @property
    def branches(self) -> tuple[str, ...]:
        return tuple(self.order)

    @property
    def other(self) -> int:
        """Index of the branch that is guided away from."""
        return self.branches.index(self.names[1])

    @property
    def base(self) -> int | None:
        if self.uses_outputs:
            return self.other
        return {"standard": self.other, "original": self.conditional, "sum": None}[self.formulation]

    def weights(self, table: StepTable, batch: int) -> NDArray[np.float64]:
        scale = scale_by_row("scale", self.scale, table, batch)
        weights = np.zeros((table.num_rows, batch, len(self.branches)))
        if self.base == self.conditional:
            weights[..., self.other] = -scale
            return weights
        weights[..., self.conditional] = scale + (self.formulation == "original")
        if self.base is None:
            weights[..., self.other] = 1 - scale
        return weights


@dataclass(frozen=True, eq=False)
class AdaptiveCFG(CFG):
    """Adaptive guidance (Castillo et al. 2023, https://arxiv.org/abs/2312.12487): `CFG` that ends by itself, sample by
    sample, once the branches point the same way, since it then costs a forward that changes little.

    The cosine between the branches is taken on the device after every model evaluation; a sample that has reached the
    threshold is unguided from two rows later on, and once all are, the unconditional branch is no longer evaluated. The
    host reads that decision one row late, so that the device never waits for it.

    Attributes:
        threshold: the cosine, at most 1; the paper uses 0.991. Branches of norm 0 have none and do not agree.

    Raises:
        ValueError: as `CFG`, a threshold that is no cosine, or (when planned) a table with an unconditional output.
    """

    threshold: Cosine = 0.991

    def plan(self, table: StepTable, batch: int) -> GuidancePlan:
        if table.uses_unconditional:
            expected = "CFG: the table adds the unconditional output in every row"
            raise ValueError(f"guidance: got AdaptiveCFG with the table {table.name}, expected {expected}")
        plan = super().plan(table, batch)
        if not any(len(active) > 1 for active in plan.active):
            return plan
        weights = self.fallback_weights if plan.planned is None else self.planned_fallback(plan.planned.shape[-1])
        alone = (self.conditional,)
        return replace(plan, agreement=float(self.threshold), fallback_branches=alone, fallback_weights=weights)
