"""What a guidance spec comes to for a table and a batch: the plan that a sampler runs by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class GuidancePlan:
    """What the sampler runs at every row.

    Attributes:
        weights: float64 [R, B, K].
        active: for every row the branches that are evaluated, ascending.
        planned: of guidance that looks at the outputs: float64 [R, B, P], the weights of the K branches, the base's
            included, and what the method adds. None for guidance that does not look.
        mix: (Gram matrix [B, V, V], planned [B, P]) -> a row's weights [B, V] of the vectors of `ops.gram`; None takes
            those planned.
        rescale: as `CFG.rescale`.
        momentum: the decay of the momentum; None for none.
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
