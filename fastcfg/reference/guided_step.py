"""The whole fused step on a run's buffers in torch, with row look-up, next model input and counter."""

from __future__ import annotations

import torch
from torch import Tensor

from ..step import StepBuffers, StepSpec
from ._row import RowReader
from .philox import STEP_STREAM, philox_normal
from .table_step import Scratch, table_step


class ReferenceStep:
    """A step bound to its buffers: calling it with the model's output advances the run by one row, in place.

    Nothing is read back to the host: like the kernel it can be captured in a CUDA graph.
    """

    def __init__(self, spec: StepSpec, buffers: StepBuffers) -> None:
        self.spec, self.buffers = spec, buffers
        # With a source the state is computed here, and rounded once to the buffers written.
        self._apart = buffers.source is not None
        self._x = x = torch.empty_like(buffers.x, dtype=buffers.table.dtype) if self._apart else buffers.x
        self._scratch = Scratch(
            m=torch.empty_like(x),
            difference=torch.empty_like(x) if spec.base is not None and (spec.branches > 2 or spec.scaled) else None,
            x0=buffers.x0 if spec.keep_x0 and not self._apart else torch.empty_like(x) if spec.predict_x0 else None,
            low=torch.empty(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device) if spec.clip else None,
            saved=torch.empty_like(x) if spec.history else None,
            sum=torch.empty_like(x),
            y=x,
        )
        self._reader = RowReader(buffers, weighted=spec.branches > 1)
        # Views are made once: at small sizes dispatches cost most.
        self._slot = torch.empty(1, dtype=torch.int64, device=x.device)
        self._history = buffers.history[:-1].unbind() if spec.history else ()  # type: ignore[index]
        if buffers.model_input is not None:
            self._slots = buffers.model_input.unflatten(0, (-1, len(x)))
            self._x_for_slots = x.expand_as(self._slots)
        self._output: Tensor | None = None

    def __call__(self, output: Tensor) -> None:
        """Args: output: the model's output [K*B, C or 2C, ...] in any floating dtype."""
        spec, buffers, x = self.spec, self.buffers, self._x
        reader = self._reader
        reader.read()
        if self._apart:
            x.copy_(buffers.source)  # type: ignore[arg-type]
        output = self._in_state_dtype(output)
        batch, channels = x.shape[:2]
        means = output if output.shape[1] == channels else output.narrow(1, 0, channels)
        variance = None
        if spec.learned_variance:
            variance = output.narrow(0, spec.conditional * batch, batch).narrow(1, channels, channels)
        noise = buffers.noise
        if spec.noise_source == "tensor":
            noise = noise.to(x.dtype)  # type: ignore[union-attr]
        if spec.noise_source == "philox":
            noise = philox_normal(buffers.seeds, x.shape[1:], row=reader.index[0], stream=STEP_STREAM).to(x.dtype)  # type: ignore[arg-type]
        _, x0, saved = table_step(
            reader.row,
            x,
            means.chunk(spec.branches),
            spec,
            weights=reader.weights,
            variance=variance,
            bound=buffers.bound,
            noise=noise,
            gradient=buffers.gradient,
            momentum=buffers.momentum,
            history=self._history,
            scratch=self._scratch,
        )
        if spec.history:
            self._slot.copy_(reader.row["slot"]).remainder_(len(buffers.history))  # type: ignore[arg-type]
            buffers.history.index_copy_(0, self._slot, saved[None])  # type: ignore[index, union-attr]
        if self._apart:
            buffers.x.copy_(x)
            if spec.keep_x0:
                buffers.x0.copy_(x0)  # type: ignore[union-attr, arg-type]
        if buffers.model_input is not None:
            torch.mul(self._x_for_slots, reader.next["c_in"], out=self._slots)
            buffers.time.copy_(reader.next["t"])  # type: ignore[union-attr]
        reader.count.add_(1)

    def _in_state_dtype(self, output: Tensor) -> Tensor:
        if output.dtype == self._x.dtype:
            return output
        if self._output is None:
            self._output = torch.empty_like(output, dtype=self._x.dtype)
        return self._output.copy_(output)
