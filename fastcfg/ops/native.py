"""The step in C, for CPUs: an optional extension with the reference's bits."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ..reference.philox import STEP_STREAM
from ..step import StepBuffers, StepSpec
from .extension import instruction_sets, native_module


def has_native_step(spec: StepSpec, buffers: StepBuffers) -> bool:
    """Whether the native kernel computes this step; the reference runs others, with the same bits."""
    model_input, time = buffers.model_input, buffers.time
    if model_input is not None and not (model_input.dtype == torch.float32 and model_input.is_contiguous()):
        return False
    if time is not None and time.dtype not in (torch.int64, torch.float32):
        return False
    plain = spec.weights_by == "sample" and not spec.learned_variance and spec.noise_source != "philox"
    return plain and buffers.x.dtype == torch.float32


def native_normal(
    out: Tensor, seeds: Tensor, *, row: int = 0, stream: int = STEP_STREAM, instructions: str | None = None
) -> Tensor:
    """Fill `out`, contiguous float32 [B, ...] on the CPU, with the bits of `philox_normal`: sample i depends on
    seeds[i] alone, contiguous int64 [B]. Nothing is checked; `instructions` is as in `NativeStep`."""
    number, batch = set_number(instructions), len(seeds)
    size = out.numel() // batch
    native_module().normal(number, seeds.data_ptr(), batch, size, row, stream, out.data_ptr())
    return out


class NativeStep:
    """A step bound to its buffers: calling it with the model's output advances the run by one row, in place. Only for
    what `has_native_step`; `instructions` is one of `instruction_sets`, by default the widest."""

    def __init__(self, spec: StepSpec, buffers: StepBuffers, instructions: str | None = None) -> None:
        self.spec, self.buffers = spec, buffers
        self._set = set_number(instructions)
        self._run = native_module().guided_step
        self._output: Tensor | None = None
        self._width, self._packed = 0, b""

    def __call__(self, output: Tensor) -> None:
        """Args: output: the model's output [K*B, C or 2C, ...] in any floating dtype no wider than float32."""
        output = self._plain(output)
        if output.numel() != self._width:
            self._width, self._packed = output.numel(), self._pack(output)
        # Read at each call: the caller may have put others in their places.
        b = self.buffers
        self._run(
            self._set,
            self._packed,
            output.data_ptr(),
            (b.x if b.source is None else b.source).data_ptr(),
            b.x.data_ptr(),
            b.table.data_ptr(),
            b.counter.data_ptr(),
            _address(b.weights),
            _address(b.bound),
            _address(b.noise),
            _address(b.history),
            _address(b.gradient),
            _address(b.momentum),
            _address(b.x0),
            _address(b.model_input),
            _address(b.time),
        )

    def _plain(self, output: Tensor) -> Tensor:
        if output.dtype == torch.float32 and output.is_contiguous():
            return output
        if self._output is None or self._output.shape != output.shape:
            self._output = torch.empty(output.shape, dtype=torch.float32, device=output.device)
        return self._output.copy_(output)

    def _pack(self, output: Tensor) -> bytes:
        """The fields of `Spec` in `kernels/cpu/guided_step.h`."""
        spec, x, model_input = self.spec, self.buffers.x, self.buffers.model_input
        fields = (
            *(len(x), x[0].numel(), output[0].numel()),
            0 if model_input is None else len(model_input) // len(x),
            self.buffers.time is not None and self.buffers.time.dtype == torch.int64,
            spec.branches,
            -1 if spec.base is None or spec.branches == 1 else spec.base,
            -1 if spec.unconditional is None else spec.unconditional,
            *(spec.scaled, spec.momentum, spec.predict_x0, spec.raw_output, spec.gradient),
            *(spec.history, spec.saves_states, spec.clip, spec.rescale),
            spec.noise_source == "tensor",
            spec.keep_x0,
        )
        return struct.pack(f"={len(fields)}q", *fields)


def set_number(instructions: str | None) -> int:
    """The number of an instruction set, by default the widest."""
    names = instruction_sets()
    return names.index(instructions or names[-1])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
