"""Guidance as per-sample weights over branches, one branch per conditioning.

A guidance spec says which branches the model runs, in which order along the batch, and how they are blended, row by row
of the run:

    delta form (base = b):     m = m_b + sum over k != b of w_k (m_k - m_b)
    sum form (base = None):    m = sum over k of w_k m_k

A branch whose weight is zero for every sample of a row is not evaluated there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .table import StepTable

__all__ = ["CFG", "AdaptiveCFG", "Compose", "Guidance", "GuidancePlan", "NoGuidance"]

Scale = float | Sequence[float] | NDArray[np.float64] | Callable[[float], ArrayLike]
FORMULATIONS = ("standard", "original", "sum")


@dataclass(frozen=True, eq=False)
class GuidancePlan:
    """What the sampler runs at every row.

    Attributes:
        weights: float64 [R, B, K].
        active: for every row the branches that are evaluated, ascending.
        threshold: of adaptive guidance: the cosine between the conditional and the unconditional branch from which on a
            sample is not guided any more; None for guidance that does not look.
        alone: the branch evaluated when no sample is.
        unguided: float64 [K], the weights of such a sample while others are.
    """

    weights: NDArray[np.float64]
    active: tuple[tuple[int, ...], ...]
    threshold: float | None = None
    alone: tuple[int, ...] = ()
    unguided: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Guidance:
    """Base of the specs: branches with weights.

    Attributes:
        branches: their names in batch order; those of the conditionings given to `Sampler.sample`.
        base: index of the branch that the delta form starts from; None for the sum form.
        conditional: index of the branch whose variance channels are used.
        unconditional: index of the branch that a_u multiplies (CFG++), None if there is none.
    """

    @property
    def branches(self) -> tuple[str, ...]:
        raise NotImplementedError

    @property
    def base(self) -> int | None:
        return None

    @property
    def conditional(self) -> int:
        return self.branches.index("cond")

    @property
    def unconditional(self) -> int | None:
        return self.branches.index("uncond") if "uncond" in self.branches else None

    @property
    def unguided(self) -> NDArray[np.float64]:
        """float64 [K]: the weights of a sample that is the conditional branch's alone."""
        weights = np.zeros(len(self.branches))
        weights[self.conditional] = self.base != self.conditional
        return weights

    def weights(self, table: StepTable, batch: int) -> NDArray[np.float64]:
        """float64 [R, B, K]: the weights of each row and sample, in the form `base` says."""
        raise NotImplementedError

    def inside(self, table: StepTable) -> NDArray[np.bool_]:
        """bool [R]: the rows at which guidance applies; elsewhere the output is the conditional branch's."""
        return np.ones(table.num_rows, dtype=bool)

    def plan(self, table: StepTable, batch: int) -> GuidancePlan:
        """Weights and evaluated branches of every row.

        Args:
            table: the solver's table.
            batch: B, the number of samples.

        Raises:
            ValueError: scales that are not finite, or of another length than the batch or the table; a table that adds
                the unconditional output (a_u) for guidance without that branch.
        """
        if table.uses_unconditional and self.unconditional is None:
            raise ValueError(
                f"guidance: got branches {', '.join(self.branches)}, expected 'uncond' among them: "
                f"the table {table.name} adds its output"
            )
        weights = self.weights(table, batch)
        weights[~self.inside(table)] = self.unguided
        return GuidancePlan(weights, tuple(self._active(weights[i], table, i) for i in range(table.num_rows)))

    def _active(self, weights: NDArray[np.float64], table: StepTable, row: int) -> tuple[int, ...]:
        """The branches to evaluate at a row with weights [B, K]."""
        # What each branch counts for once the delta form is multiplied out.
        total = weights.copy()
        if self.base is not None:
            total[:, self.base] = 1 - np.delete(weights, self.base, axis=1).sum(axis=1)
        needed = np.asarray(total.any(axis=0))
        if table.learned_variance:
            needed[self.conditional] = True
        if table["a_u"][row]:
            needed[self.unconditional] = True
        if needed.sum() > 1 and self.base is not None:
            needed[self.base] = True
        if needed.sum() == 0 or (needed.sum() == 1 and not (total[:, needed] == 1).all()):
            # A branch that is evaluated alone is not weighted, so one with another weight than 1 needs company.
            needed[:] = True
        return tuple(int(k) for k in np.flatnonzero(needed))


@dataclass(frozen=True)
class NoGuidance(Guidance):
    """One conditional branch, unblended."""

    @property
    def branches(self) -> tuple[str, ...]:
        return ("cond",)

    def weights(self, table: StepTable, batch: int) -> NDArray[np.float64]:
        return np.ones((table.num_rows, batch, 1))


@dataclass(frozen=True, eq=False)
class CFG(Guidance):
    """Classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598).

    A negative prompt is the conditioning given to the unconditional branch.

    Attributes:
        scale: s of m = uncond + s (cond - uncond); with formulation "original", w of m = cond + w (cond - uncond). A
            number; B numbers, one per sample; an array [R, 1] or [R, B] with one row per model evaluation; or a
            function of the progress through the run, 0 at the first step and below 1 at the last, that returns a number
            or B numbers.
        interval: (start, stop) in fractions of the run's steps. Outside it only the conditional branch is evaluated
            (Kynkäänniemi et al. 2024, https://arxiv.org/abs/2404.07724); step i of N is inside if int(start*N) <= i <
            int(stop*N), as in diffusers' guiders.
        formulation: "standard", "original" (diffusers' `use_original_formulation`), or "sum": s*cond + (1 - s)*uncond.
            They agree but for rounding.
        order: the branches along the batch. GLIDE and guided-diffusion put the conditional half first, diffusers the
            unconditional.

    Raises:
        ValueError: non-finite scale, an interval not within 0 <= start < stop <= 1, unknown formulation, or an order
            that is not a permutation of ("cond", "uncond").

    Example:
        >>> CFG(3.0).branches
        ('cond', 'uncond')
    """

    scale: Scale = 3.0
    interval: tuple[float, float] = (0.0, 1.0)
    formulation: str = "standard"
    order: tuple[str, str] = ("cond", "uncond")

    def __post_init__(self) -> None:
        if not callable(self.scale):
            _finite("scale", self.scale)
        _check_interval(self.interval)
        if self.formulation not in FORMULATIONS:
            raise ValueError(f"formulation: got {self.formulation!r}, expected one of {', '.join(FORMULATIONS)}")
        if sorted(self.order) != ["cond", "uncond"]:
            raise ValueError(f"order: got {self.order!r}, expected a permutation of ('cond', 'uncond')")

    @property
    def branches(self) -> tuple[str, ...]:
        return tuple(self.order)

    @property
    def base(self) -> int | None:
        return {"standard": self.unconditional, "original": self.conditional, "sum": None}[self.formulation]

    def weights(self, table: StepTable, batch: int) -> NDArray[np.float64]:
        scale = scale_by_row("scale", self.scale, table, batch)
        weights = np.zeros((table.num_rows, batch, 2))
        if self.formulation == "original":
            weights[..., self.unconditional] = -scale
        else:
            weights[..., self.conditional] = scale
            if self.formulation == "sum":
                weights[..., self.unconditional] = 1 - scale
        return weights

    def inside(self, table: StepTable) -> NDArray[np.bool_]:
        return inside_interval(self.interval, table)


@dataclass(frozen=True, eq=False)
class AdaptiveCFG(CFG):
    """Classifier-free guidance that ends by itself, sample by sample, once the branches agree.

    Adaptive guidance (Castillo et al. 2023, https://arxiv.org/abs/2312.12487): late in a run the two branches point the
    same way, and guidance costs a forward that changes little. Until then it equals `CFG`. The cosine between the
    branches is taken on the device after every model evaluation; a sample in which it has reached the threshold is
    unguided from two rows later on, and when all samples are, the unconditional branch is not evaluated any more. The
    host reads that decision one row late, so that the device never waits for it.

    Attributes:
        threshold: the cosine, at most 1; the paper uses 0.991.

    Raises:
        ValueError: as `CFG`, a threshold that is no cosine, or (when planned) a table that adds the unconditional
            output.
    """

    threshold: float = 0.991

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.threshold, int | float) or not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold: got {self.threshold!r}, expected a cosine, -1 to 1")

    def plan(self, table: StepTable, batch: int) -> GuidancePlan:
        if table.uses_unconditional:
            raise ValueError(
                f"guidance: got AdaptiveCFG with the table {table.name}, "
                "expected CFG: the table adds the unconditional output in every row"
            )
        plan = super().plan(table, batch)
        if not any(len(active) > 1 for active in plan.active):
            return plan
        return replace(plan, threshold=float(self.threshold), alone=(self.conditional,), unguided=self.unguided)


@dataclass(frozen=True, eq=False)
class Compose(Guidance):
    """Several conditionings, each guided away from the unconditional one: m = uncond + Σ s_k (m_k - uncond).

    Composable diffusion (Liu et al. 2022, https://arxiv.org/abs/2206.01714). InstructPix2Pix (Brooks et al. 2022) is
    `Compose({"cond": s_text, "image": s_image - s_text})`, where "cond" has text and image, "image" the image alone.

    Attributes:
        scales: by branch name, one of them "cond" (whose variance channels are used); each as `CFG.scale`.
        interval: as `CFG.interval`.

    Raises:
        ValueError: no "cond" among the names, "uncond" among them, non-finite scales, or a bad interval.
    """

    scales: Mapping[str, Scale]
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if "cond" not in self.scales or "uncond" in self.scales:
            raise ValueError(f"scales: got {sorted(self.scales)}, expected names with 'cond' and without 'uncond'")
        for name, scale in self.scales.items():
            if not callable(scale):
                _finite(f"scales[{name!r}]", scale)
        _check_interval(self.interval)

    @property
    def branches(self) -> tuple[str, ...]:
        return (*self.scales, "uncond")

    @property
    def base(self) -> int | None:
        return len(self.scales)

    def weights(self, table: StepTable, batch: int) -> NDArray[np.float64]:
        scales = [scale_by_row(f"scales[{name!r}]", scale, table, batch) for name, scale in self.scales.items()]
        return np.stack([*scales, np.zeros_like(scales[0])], axis=-1)

    def inside(self, table: StepTable) -> NDArray[np.bool_]:
        return inside_interval(self.interval, table)


def scale_by_row(name: str, scale: Scale, table: StepTable, batch: int) -> NDArray[np.float64]:
    """float64 [R, B] of a scale in any of the spellings of `CFG.scale`."""
    if callable(scale):
        steps: Any = table.steps
        rows = [_finite(name, scale(i / table.num_steps)) for i in steps]
        if bad := {row.shape for row in rows} - {(), (1,), (batch,)}:
            raise ValueError(
                f"{name}: the function returned shapes {sorted(bad)}, expected a number or {batch} numbers"
            )
        return np.stack([np.broadcast_to(row, batch) for row in rows])
    values = _finite(name, scale)
    if values.ndim == 1 and len(values) not in (1, batch):
        raise ValueError(f"{name}: got {len(values)} values, expected 1 or one per sample ({batch})")
    if values.ndim == 2 and (len(values) != table.num_rows or values.shape[1] not in (1, batch)):
        raise ValueError(
            f"{name}: got shape {values.shape}, expected ({table.num_rows}, 1) or ({table.num_rows}, {batch})"
        )
    return np.broadcast_to(values, (table.num_rows, batch)).copy()


def inside_interval(interval: tuple[float, float], table: StepTable) -> NDArray[np.bool_]:
    """bool [R]: rows whose step lies in the interval."""
    first, last = (int(edge * table.num_steps) for edge in interval)
    inside: NDArray[np.bool_] = (table.steps >= first) & (table.steps < last)
    return inside


def _finite(name: str, scale: Any) -> NDArray[np.float64]:
    try:
        values = np.asarray(scale.detach().cpu() if hasattr(scale, "detach") else scale, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.array(np.nan)
    if values.ndim > 2 or not np.isfinite(values).all():
        raise ValueError(f"{name}: got {scale!r}, expected finite numbers in at most two dimensions")
    return values


def _check_interval(interval: tuple[float, float]) -> None:
    if not isinstance(interval, Sequence) or len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"interval: got {interval!r}, expected 0 <= start < stop <= 1")
