"""What every guidance spec says, and the plan that a sampler runs by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..table import StepTable
from .scales import check_interval, check_number, close, inside_interval

__all__ = ["Guidance", "GuidancePlan", "NoGuidance"]


@dataclass(frozen=True, eq=False)
class GuidancePlan:
    """What the sampler runs at every row.

    Attributes:
        weights: float64 [R, B, K].
        active: for every row the branches that are evaluated, ascending.
        planned: of guidance that looks at the outputs: float64 [R, B, P], from which the row's weights are computed:
            those of the K branches, the base's included, then what the method adds. None for guidance that does not
            look.
        mix: computes them: (Gram matrix [B, V, V], planned [B, P]) -> weights [B, V], for the V vectors of `ops.gram`;
            None takes those planned.
        rescale: as `CFG.rescale`, the last factor of the weights.
        momentum: the decay of the momentum, which the conditional branch's difference is added to; None for none.
        threshold: of adaptive guidance: the cosine between the conditional and the unconditional branch from which on a
            sample is not guided any more; None for guidance that does not end by itself.
        alone: the branch evaluated when no sample is.
        unguided: float64 [K] or [P], the (planned) weights of such a sample while others are.
    """

    weights: NDArray[np.float64]
    active: tuple[tuple[int, ...], ...]
    planned: NDArray[np.float64] | None = None
    mix: Callable[..., Any] | None = None
    rescale: float = 0.0
    momentum: float | None = None
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

    # What specs may have as fields, described at `CFG`.
    interval = (0.0, 1.0)
    rescale = 0.0

    def __post_init__(self) -> None:
        check_interval(self.interval)
        check_number("rescale", self.rescale, 0, 1)

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
        return inside_interval(self.interval, table)

    @property
    def decay(self) -> float | None:
        """`GuidancePlan.momentum`."""
        return None

    def mixer(self) -> Callable[..., Any] | None:
        """`GuidancePlan.mix`: the same (or a partial of the same function with the same numbers) keeps captured
        programs."""
        return None

    def planned(self, table: StepTable, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """`GuidancePlan.planned` of weights in delta form: here with the base's, 1."""
        planned = weights.copy()
        planned[..., self.base] = 1
        return planned

    @property
    def looks(self) -> bool:
        """Whether the weights depend on the outputs."""
        return self.rescale > 0 or self.mixer() is not None

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
        active = [self._active(weights[i], table, i) for i in range(table.num_rows)]
        if not self.looks:
            return GuidancePlan(weights, tuple(active))
        planned, mix = self.planned(table, weights), self.mixer()
        if mix is not None:
            unguided = np.asarray(close(weights, self.unguided).all(axis=-1))
            planned[unguided] = self.planned_unguided(planned.shape[-1])
            weights[unguided] = self.unguided
            # A method that looks at the branches looks at all of them.
            active = [
                self._active(weights[i], table, i) if unguided[i].all() else tuple(range(len(self.branches)))
                for i in range(table.num_rows)
            ]
        return GuidancePlan(weights, tuple(active), planned, mix, self.rescale, self.decay)

    def planned_unguided(self, columns: int) -> NDArray[np.float64]:
        """float64 [P]: what is planned for a sample that is the conditional branch's alone."""
        planned = np.zeros(columns)
        planned[self.base], planned[self.conditional] = 1, 1
        return planned

    def _active(self, weights: NDArray[np.float64], table: StepTable, row: int) -> tuple[int, ...]:
        """The branches to evaluate at a row with weights [B, K]."""
        # What each branch counts for once the delta form is multiplied out.
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
