"""The stop at NaN or infinity: where in a run they first are, noted on the device and read late."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import FiniteCheck
from ..reference.finite import FINITE
from ..step import StepBuffers
from ..utils.caller import warn_caller
from .call import ProgramOptions
from .readback import Readback

# The code of a start that is not finite.
_START = -1


class FiniteRecord:
    """What a run's checks have found: one number on the device, which rows lower."""

    def __init__(self, options: ProgramOptions) -> None:
        self.tensor = torch.full((1,), FINITE, dtype=torch.int64, device=options.device)
        self._branches, self._every = options.branches, options.config.check_every

    def reset(self, x: Tensor) -> None:
        """Begin a run from a state."""
        self.tensor.copy_(torch.where(x.isfinite().all(), FINITE, _START))

    def check(self, active: tuple[int, ...], buffers: StepBuffers, backend: str) -> FiniteCheck:
        """The check of rows that evaluate some branches."""
        sources = torch.tensor([*active, len(self._branches)], dtype=torch.int32).to(buffers.x.device)
        return FiniteCheck(buffers.x, buffers.counter, sources, self.tensor, self._every, backend)


class FiniteWatch:
    """Reads a run's record when later rows are enqueued, and at the end, and stops or warns once."""

    def __init__(self, record: FiniteRecord, options: ProgramOptions, batch: int) -> None:
        self._record, self._options, self._batch = record.tensor, options, batch
        self._every, self._sources = options.config.check_every, len(options.branches) + 1
        self._readback = Readback(record.tensor)
        self._sent = self._found = False

    def after_rows(self, first: int, count: int) -> None:
        """Rows were enqueued: take what the rows before them have found, and send what these find."""
        self._take()
        if (first + count) // self._every > first // self._every:
            self._send()

    def finish(self, row: int, x: Tensor) -> None:
        """The run has ended after a row, in a state: wait for what is still to be found. If the last rows were not
        checked, their state is."""
        self._take()
        if (row + 1) % self._every:
            first = (row * self._sources + self._sources - 1) * self._batch
            codes = first + torch.arange(self._batch, device=x.device)
            found = codes.masked_fill(x.isfinite().flatten(1).all(1), FINITE).amin()
            torch.minimum(self._record, found, out=self._record)
            self._send()
            self._take()

    def _send(self) -> None:
        if not self._found:
            self._readback.push(self._record)
            self._sent = True

    def _take(self) -> None:
        if not self._sent:
            return
        self._sent = False
        if (code := int(self._readback.take())) == FINITE:
            return
        self._found, message = True, f"check_finite: {self._message(code)}"
        if self._options.config.check_finite == "raise":
            raise FloatingPointError(message)
        warn_caller(message, RuntimeWarning)

    def _message(self, code: int) -> str:
        if code == _START:
            return "the run starts from NaN or infinity"
        place, sample = divmod(code, self._batch)
        row, source = divmod(place, self._sources)
        options, state = self._options, source == self._sources - 1
        where = "the state" if state else f"the model's output in branch {options.branches[source]!r}"
        if self._every == 1:
            time, step = options.table["t"][row], "the step" if options.change is None else "the step or state_fn"
            maker = f"{step}, of finite outputs" if state else "the model, of a finite state"
            return f"row {row} (t = {time:g}), sample {sample}: NaN or infinity in {where}, made by {maker}"
        rows = f"rows {row - row % self._every} to {row}" if row % self._every else f"row {row}"
        return f"{rows}, sample {sample}: NaN or infinity, found in {where} of row {row} (check_every={self._every})"
