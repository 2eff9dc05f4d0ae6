"""What a guidance spec comes to for one table and batch: the plan that a sampler runs by."""

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
        active: the branches evaluated at every row, ascending.
        planned: float64 [R, B, P], for guidance that uses the outputs: the weights of the K branches, the base's
            included, and what the method adds. None for other guidance.
        mix: (Gram matrix [B, V, V], planned [B, P]) -> a row's weights [B, V] of the vectors of `ops.gram`; None takes
            the planned ones.
        rescale: as `CFG.rescale`.
        momentum: the decay of the momentum; None for none.
        agreement: of adaptive guidance: the cosine between the conditional and the unconditional branch at which a
            sample's guidance ends; None for guidance that does not end by itself.
        fallback_branches: the branches evaluated once guidance has ended for every sample.
        fallback_weights: float64 [K] or [P], the (planned) weights of a sample whose guidance has ended while that of
            others has not.
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
