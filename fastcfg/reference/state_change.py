"""A change of the state between two rows in torch, with the kernel's operations and roundings."""

from __future__ import annotations

import torch
from torch import Tensor

from ..state_change import KNOWN_COLUMNS, NO_NORMALS, TENSOR, KnownBuffers, StateSpec
from ..step import StepBuffers
from ..table import DEVICE_COLUMNS
from ._fma import fma
from .philox import INITIAL_STREAM, philox_normal

_C_IN, _T = DEVICE_COLUMNS.index("c_in"), DEVICE_COLUMNS.index("t")


class ReferenceStateChange:
    """Writes the changed state, and what the model is given next, to a run's buffers; the run stays at its row.

    Args:
        spec: what to do.
        buffers: the run's: x, table, counter, model_input and time, and seeds if a stream draws.
        known: the known pixels' tensors; None where the spec has none.
    """

    def __init__(self, spec: StateSpec, buffers: StepBuffers, known: KnownBuffers | None) -> None:
        self._spec, self._buffers, self._known = spec, buffers, known

    def __call__(self, new: Tensor) -> None:
        """Args: new: the state to change, [B, C, ...], which may be the buffers' own."""
        spec, buffers = self._spec, self._buffers
        next_row = buffers.counter[:1]
        row = next_row if spec.before else next_row - 1
        if spec.known:
            new = self._with_known_pixels(new, row)
        buffers.x.copy_(new)
        following = buffers.table.index_select(0, next_row)[0]
        slots = buffers.model_input.unflatten(0, (-1, len(buffers.x)))  # type: ignore[union-attr]
        torch.mul(buffers.x.expand_as(slots), following[_C_IN], out=slots)
        buffers.time.copy_(following[_T])  # type: ignore[union-attr]

    def _with_known_pixels(self, x: Tensor, row: Tensor) -> Tensor:
        spec, known = self._spec, self._known
        values = known.rows.index_select(0, row)[0].unbind()  # type: ignore[union-attr]
        c = dict(zip(KNOWN_COLUMNS, values, strict=True))
        if spec.before:
            x = self._noised(x, c, row)
        if spec.noise == NO_NORMALS:
            pixels = known.image * c["signal"]  # type: ignore[union-attr]
        else:
            z = self._normals(spec.noise, known.noise, row)  # type: ignore[union-attr]
            pixels = fma(c["signal"], known.image, z * c["noise"])  # type: ignore[union-attr]
        hold = known.hold  # type: ignore[union-attr]
        hold = (hold > c["gate"]).to(x.dtype) if spec.hard else hold * c["gate"]
        x = fma(1 - hold, x, hold * pixels)
        return x if spec.before else self._noised(x, c, row)

    def _noised(self, x: Tensor, c: dict[str, Tensor], row: Tensor) -> Tensor:
        if self._spec.renoise == NO_NORMALS:
            return x
        z = self._normals(self._spec.renoise, self._known.renoise, row)  # type: ignore[union-attr]
        return fma(c["kept"], x, z * c["added"])

    def _normals(self, source: int, given: Tensor | None, row: Tensor) -> Tensor:
        if source == TENSOR:
            return given  # type: ignore[return-value]
        x = self._buffers.x
        which = 0 if source == INITIAL_STREAM else row[0]
        return philox_normal(self._buffers.seeds, x.shape[1:], row=which, stream=source).to(x.dtype)  # type: ignore[arg-type]
