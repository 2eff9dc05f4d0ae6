"""A change of the state between two rows, bound to the buffers of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.state_change import ReferenceStateChange
from ..state_change import KNOWN_COLUMNS, TENSOR, KnownBuffers, StateSpec
from ..step import StepBuffers
from ..utils._torch_private import current_dispatch_mode
from .backend import interpreting, is_transformed, resolve_piece
from .checks import expect
from .native_rows import has_native_state_change, native_state_change


class StateChange:
    """Replaces a run's state, or puts known pixels into it, and writes what the model is given next, in one pass. The
    run stays at its row.

    Args:
        spec: what to do.
        buffers: the run's: x, table, counter, model_input and time, and seeds where a stream draws.
        known: the known pixels' tensors, if the spec has them.
        backend: as for `GuidedStep`; "inductor" runs the reference here, and "auto" is "native" on a CPU where that can
            run.

    Raises:
        ValueError: known pixels or their seeds that do not fit in shape, dtype, device or layout, or a backend that
            cannot run. The run's own buffers, and the state of a call, are not checked.
    """

    def __init__(
        self, spec: StateSpec, buffers: StepBuffers, known: KnownBuffers | None = None, backend: str = "auto"
    ) -> None:
        x = buffers.x
        if spec.known:
            if known is None:
                raise ValueError("known: got None, expected KnownBuffers")
            needed = {"image": True, "hold": True, "noise": spec.noise == TENSOR, "renoise": spec.renoise == TENSOR}
            for name, is_needed in needed.items():
                if is_needed:
                    expect(name, getattr(known, name), tuple(x.shape), x.dtype, x.device)
            expect("rows", known.rows, (len(buffers.table) - 1, len(KNOWN_COLUMNS)), x.dtype, x.device)
            if spec.draws_by_seed:
                expect("seeds", buffers.seeds, (len(x),), torch.int64, x.device)
        self._spec, self._buffers, self._known = spec, buffers, known if spec.known else None
        self.backend = resolve_piece(backend, x.device, x.dtype, registered=True)
        if self.backend == "native" and not has_native_state_change(buffers):
            self.backend = "reference"
        if self.backend != "triton":
            self._reference = ReferenceStateChange(spec, buffers, self._known)
            self._run: Any = self._native if self.backend == "native" else self._reference
        else:
            self._run = self._dispatched if interpreting() else self._launched

    def __call__(self, new: Tensor) -> None:
        """Args: new: the state to change, contiguous [B, C, ...] in the state's dtype; it may be the buffers' x."""
        self._run(new)

    def _native(self, new: Tensor) -> None:
        if is_transformed() or current_dispatch_mode() is not None:
            self._reference(new)
        else:
            native_state_change(new, self._spec, self._buffers, self._known)

    def _launched(self, new: Tensor) -> None:
        _launch(new, self._spec, self._buffers, self._known)

    def _dispatched(self, new: Tensor) -> None:
        spec, buffers, known = self._spec, self._buffers, self._known
        tensors = buffers.table, buffers.counter, buffers.seeds, buffers.x, buffers.model_input, buffers.time
        pixels = (None,) * 5 if known is None else tuple(vars(known).values())
        _state_change_op(new, *tensors, *pixels, *vars(spec).values())


def _launch(new: Tensor, spec: StateSpec, buffers: StepBuffers, known: KnownBuffers | None) -> None:
    from ..kernels.state_change import launch_state_change

    with torch.cuda.device_of(new):
        launch_state_change(new, spec, buffers, known)


def _run_registered(new: Tensor, *arguments: Any) -> None:
    table, counter, seeds, x, model_input, time, *others = arguments
    buffers = StepBuffers(x, table, counter, seeds=seeds, model_input=model_input, time=time)
    known = None if others[0] is None else KnownBuffers(*others[:5])
    _launch(new, StateSpec(*others[5:]), buffers, known)


_state_change_op = torch.library.custom_op(
    "fastcfg::state_change",
    _run_registered,
    mutates_args=("x", "model_input", "time"),
    schema="(Tensor new, Tensor table, Tensor counter, Tensor? seeds, Tensor(a!) x, Tensor(b!) model_input,"
    " Tensor(c!) time, Tensor? image, Tensor? hold, Tensor? rows, Tensor? noise, Tensor? renoise,"
    " bool before, bool known, bool hard, int noise_source, int renoise_source) -> ()",
)
