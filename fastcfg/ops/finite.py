"""The check of a row for NaN and infinity, bound to the buffers of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.finite import ReferenceFiniteCheck
from ..utils._torch_private import current_dispatch_mode
from .backend import interpreting, is_transformed, resolve_piece
from .checks import readable
from .native_rows import EXPONENTS, native_finite_check


class FiniteCheck:
    """Notes the first row, source and sample with NaN or infinity, on the device; called after the row's step with the
    model's output [K*B, C or 2C, ...]. Arguments as `fastcfg.reference.finite.ReferenceFiniteCheck`, and the backend as
    for `GuidedStep` ("inductor" runs the reference here; "auto" is "native" on a CPU where that can run)."""

    def __init__(
        self, x: Tensor, counter: Tensor, sources: Tensor, record: Tensor, every: int, backend: str = "auto"
    ) -> None:
        self._arguments = x, counter, sources, record, every
        self.backend = resolve_piece(backend, x.device, x.dtype, registered=True)
        self._reference: Any = None if self.backend == "triton" else ReferenceFiniteCheck(*self._arguments)
        self._run: Any = {"triton": self._kernel, "native": self._native}.get(self.backend, self._reference)

    def __call__(self, output: Tensor) -> None:
        """Check a row."""
        self._run(readable(output))

    def _kernel(self, output: Tensor) -> None:
        (_finite_op if interpreting() else _launch)(output, *self._arguments)

    def _native(self, output: Tensor) -> None:
        if output.dtype not in EXPONENTS or is_transformed() or current_dispatch_mode() is not None:
            self._reference(output)
        else:
            native_finite_check(output, *self._arguments)


def _launch(output: Tensor, x: Tensor, counter: Tensor, sources: Tensor, record: Tensor, every: int) -> None:
    from ..kernels.finite import launch_finite

    with torch.cuda.device_of(output):
        launch_finite(output, x, counter, sources, record, every)


_finite_op = torch.library.custom_op(
    "fastcfg::finite",
    _launch,
    mutates_args=("record",),
    schema="(Tensor output, Tensor x, Tensor counter, Tensor sources, Tensor(a!) record, int every) -> ()",
)
