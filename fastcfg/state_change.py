"""What changes the state between two rows, and the tensors it works on: the vocabulary of the reference, kernels and
engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["FRESH_STREAM", "KNOWN_COLUMNS", "NO_NORMALS", "RENOISE_STREAM", "TENSOR", "KnownBuffers", "StateSpec"]

# Where the normals of a change come from, if not from one of Philox's streams.
NO_NORMALS, TENSOR = -2, -1
# Streams of Philox beside those of the start (0), of the steps (1) and of Brownian noise (4).
FRESH_STREAM, RENOISE_STREAM = 2, 3
# A row of `KnownBuffers.rows`: known pixels are signal*image + noise*z; gate as in `StateSpec.hard`; re-noising is
# x <- kept*x + added*z'.
KNOWN_COLUMNS = ("signal", "noise", "gate", "kept", "added")


@dataclass(frozen=True)
class StateSpec:
    """Everything that changes the code of a change of the state; equal specs run the same kernel.

    Attributes:
        before: whether the change comes before its row, else after it. Known pixels are then put in after re-noising,
            else before it: both are in the order of time.
        known: whether known pixels are put in; else the state is replaced by a given one.
        hard: whether a pixel is known where hold > gate; else it is known by the share gate*hold.
        noise: what draws the known pixels' normals: `NO_NORMALS`, `TENSOR` or a stream. That of the start has one draw
            for all rows.
        renoise: the same for re-noising.
    """

    before: bool = False
    known: bool = False
    hard: bool = False
    noise: int = NO_NORMALS
    renoise: int = NO_NORMALS

    @property
    def draws_by_seed(self) -> bool:
        """Whether normals are drawn from the samples' seeds."""
        return max(self.noise, self.renoise) >= 0


@dataclass(eq=False)
class KnownBuffers:
    """The tensors of known pixels, in the state's dtype and contiguous.

    Attributes:
        image, hold: [B, C, ...]: the known pixels without noise; how far each is known, 0 to 1.
        rows: [R, 5], the columns `KNOWN_COLUMNS`.
        noise, renoise: [B, C, ...]: normals, where a spec reads them.
    """

    image: torch.Tensor
    hold: torch.Tensor
    rows: torch.Tensor
    noise: torch.Tensor | None = None
    renoise: torch.Tensor | None = None
