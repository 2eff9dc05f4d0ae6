"""`Guidance`, the base of all specs, the plan that a sampler runs by, and `NoGuidance`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..table import StepTable
from .scales import check_fields, inside_interval

if TYPE_CHECKING:
    from .places import PlaceWeights


@dataclass(frozen=True, eq=False)
class GuidancePlan:
    """What a guidance spec comes to for one table and batch: what the sampler runs at every row.

    Attributes:
        weights: float64 [R, B, K].
        active: the branches evaluated at every row, ascending.
        planned: float64 [R, B, P], for guidance that uses the outputs: the weights of the K branches, the base's
            included, and what the method adds. None for other guidance.
        mix: (Gram matrix [B, V, V], planned [B, P]) -> a row's weights [B, V] of the vectors of `ops.gram`; None takes
            the planned ones.
        rescale, momentum: as `CFG.rescale`; the decay of the momentum, None for none.
        agreement: the cosine of cond and uncond at which adaptive guidance ends for a sample; None for other guidance.
        fallback_branches: the branches evaluated once guidance has ended for every sample.
        fallback_weights: float64 [K] or [P], the (planned) weights of a sample for which it has ended, but not for all.
        places: the weights, in place of `weights`, where they differ within a sample (`guidance.places`).
    """

    weights: NDArray[np.float64]
    active: tuple[tuple[int, ...], ...]
    planned: NDArray[np.float64] | None = None
    mix: Callable[..., Any] | None = None
    rescale: float = 0.0
    momentum: float | None = None
    agreement: float | None = None
    fallback_branches: tuple[int, ...] = ()
    fallback_weights: NDArray[np.float64] | None = None
    places: PlaceWeights | None = None


@dataclass(frozen=True)
class Guidance:
    """Base of the specs: branches with weights.

    Attributes:
        branches: their names in batch order, which name the conditionings given to `Sampler.sample`.
        base: index of the branch that the delta form starts from; None for the sum form.
        conditional: index of the branch that provides the variance channels.
        unconditional: index of the branch that a_u multiplies (CFG++), None if there is none.

    Fields that are not finite or out of their range raise ValueError.
    """

    # Fields of some specs, see `CFG`; the defaults of the others.
    interval = (0.0, 1.0)
    rescale = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

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
    def fallback_weights(self) -> NDArray[np.float64]:
        """float64 [K]: the weights that leave a sample unguided, as the conditional branch has it."""
        weights = np.zeros(len(self.branches))
        weights[self.conditional] = self.base != self.conditional
        return weights

    def weights(self, table: StepTable, batch: int) -> NDArray[np.float64]:
        """float64 [R, B, K]: the weights of each row and sample, in delta form, or in sum form without a base."""
        raise NotImplementedError

    def inside(self, table: StepTable) -> NDArray[np.bool_]:
        """bool [R]: the rows at which guidance applies; elsewhere the output is the conditional branch's."""
        return inside_interval(self.interval, table)

    def mixer(self) -> Callable[..., Any] | None:
        """`GuidancePlan.mix`. Partials of one function with equal numbers share captured programs."""
        return None

    def planned(self, table: StepTable, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """`GuidancePlan.planned` from weights in delta form: the base gets the weight 1."""
        planned = weights.copy()
        planned[..., self.base] = 1
        return planned

    @property
    def uses_outputs(self) -> bool:
        """Whether the weights depend on the outputs."""
        return self.rescale > 0 or self.mixer() is not None

    def plan(self, table: StepTable, batch: int) -> GuidancePlan:
        """Weights and evaluated branches of every row of a solver's table, for B = `batch` samples.

        Raises:
            ValueError: scales that are not finite, or of another length than the batch or the table; a table that adds
                the unconditional output (a_u) for guidance without that branch.
        """
        if getattr(self, "channels", None) is not None:
            raise ValueError(f"channels: got {self.channels}, expected None: they are a `Sampler`'s")  # type: ignore[attr-defined]
        if table.uses_unconditional and self.unconditional is None:
            expected = f"'uncond' among them: the table {table.name} adds its output"
            raise ValueError(f"guidance: got branches {', '.join(self.branches)}, expected {expected}")
        weights = self.weights(table, batch)
        weights[~self.inside(table)] = self.fallback_weights
        if self.mixer() is not None:
            # As math.isclose, with which diffusers' guiders decide that a scale guides nothing.
            unguided = np.asarray(np.isclose(weights, self.fallback_weights, rtol=1e-9, atol=0).all(axis=-1))
            weights[unguided] = self.fallback_weights
        active = [self.evaluated(weights[i], table, i) for i in range(table.num_rows)]
        if not self.uses_outputs:
            return GuidancePlan(weights, tuple(active))
        planned, mix = self.planned(table, weights), self.mixer()
        if mix is not None:
            planned[unguided] = self.planned_fallback(planned.shape[-1])
            # A method that uses the outputs uses those of all branches.
            for i in np.flatnonzero(~unguided.all(axis=1)):
                active[i] = tuple(range(len(self.branches)))
        return GuidancePlan(weights, tuple(active), planned, mix, self.rescale, getattr(self, "momentum", None))

    def planned_fallback(self, columns: int) -> NDArray[np.float64]:
        """float64 [P]: the planned weights that leave a sample unguided."""
        planned = np.zeros(columns)
        planned[self.base], planned[self.conditional] = 1, 1
        return planned

    def evaluated(self, weights: NDArray[np.float64], table: StepTable, row: int) -> tuple[int, ...]:
        """The branches to evaluate at a row with weights [B, K]."""
        # The weight of each branch once the delta form is multiplied out.
        total = weights.copy()
        if self.base is not None:
            total[:, self.base] = 1 - np.delete(weights, self.base, axis=1).sum(axis=1)
        needed = np.asarray(total.any(axis=0))
        if table.learned_variance or self.rescale:
            needed[self.conditional] = True
        if table["a_u"][row]:
            needed[self.unconditional] = True
        if needed.sum() > 1 and self.base is not None:
            needed[self.base] = True
        if needed.sum() == 0 or (needed.sum() == 1 and not (total[:, needed] == 1).all()):
            # A branch evaluated alone is not weighted, so one with a weight other than 1 needs a second.
            needed[:] = True
        return tuple(int(k) for k in np.flatnonzero(needed))


@dataclass(frozen=True)
class NoGuidance(Guidance):
    """One conditional branch, unblended."""

    branches = ("cond",)

    def weights(self, table: StepTable, batch: int) -> NDArray[np.float64]:
        return np.ones((table.num_rows, batch, 1))
