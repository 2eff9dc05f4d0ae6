"""The step in C, for CPUs: an optional extension with the reference's bits."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ..reference.philox import STEP_STREAM
from ..step import NOISE_SOURCES, WEIGHTS_BY, StepBuffers, StepSpec
from .extension import instruction_sets, native_module

# Elements of a state which torch's number of threads share, without the interpreter's lock. Smaller ones are done
# before the others have woken (Zen 4, noise given, one thread and two: 65536 26 and 33 µs, 262144 102 and 97).
LARGE = 262144
# In the order of the kernels' numbers.
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_TIMES = (torch.float32, torch.int64, torch.float64)
# The tensors that stay in their places, in the order of `Plan`.
_KEPT = ("table", "counter", "weights", "bound", "seeds", "history", "gradient", "momentum", "model_input", "time")


def has_native_step(spec: StepSpec, buffers: StepBuffers) -> bool:
    """Whether the native kernel computes this step; the reference runs others, with the same bits: model inputs and
    times in unusual dtypes."""
    model_input, time = buffers.model_input, buffers.time
    if model_input is not None and model_input.dtype not in _FLOATS:
        return False
    if time is not None and time.dtype not in _TIMES:
        return False
    return buffers.table.dtype == torch.float32


def native_normal(
    out: Tensor, seeds: Tensor, *, row: int = 0, stream: int = STEP_STREAM, instructions: str | None = None
) -> Tensor:
    """Fill `out`, contiguous float32 [B, ...] on the CPU, with the bits of `philox_normal`: sample i depends on
    seeds[i] alone, contiguous int64 [B]. Nothing is checked; `instructions` is as in `NativeStep`."""
    number, batch = set_number(instructions), len(seeds)
    size, threads = out.numel() // batch, threads_for(out.numel() >= LARGE)
    native_module().normal(number, threads, seeds.data_ptr(), batch, size, row, stream, out.data_ptr())
    return out


class NativeStep:
    """A step bound to its buffers: calling it with the model's output advances the run by one row, in place. Only for
    what `has_native_step`; `instructions` is one of `instruction_sets`, by default the widest.

    Source, x, x0 and noise are those of the buffers at each call, all others those at the first.
    """

    def __init__(self, spec: StepSpec, buffers: StepBuffers, instructions: str | None = None) -> None:
        self.spec, self.buffers = spec, buffers
        self._set = set_number(instructions)
        self._run = native_module().guided_step
        self._is_large = buffers.x.numel() >= LARGE
        self._converted: Tensor | None = None
        self._planned: tuple[object, ...] = ()
        self._plan = b""
        # Their addresses are in the plan.
        self._kept = [getattr(buffers, name) for name in _KEPT]

    def __call__(self, output: Tensor) -> None:
        """Args: output: the model's output [K*B, C or 2C, ...], contiguous or channels-last, in any floating dtype no
        wider than float32."""
        if output.dtype not in _FLOATS:
            output = self._in_float32(output)
        signature = (output.shape, output.dtype, output.is_contiguous())
        if signature != self._planned:
            self._plan, self._planned = self._pack(output), signature
        b = self.buffers
        self._run(
            self._set,
            self._plan,
            threads_for(self._is_large),
            output.data_ptr(),
            (b.x if b.source is None else b.source).data_ptr(),
            b.x.data_ptr(),
            _address(b.x0),
            _address(b.noise),
        )

    def _in_float32(self, output: Tensor) -> Tensor:
        if self._converted is None or self._converted.shape != output.shape:
            self._converted = torch.empty_like(output, dtype=torch.float32)
        return self._converted.copy_(output)

    def _pack(self, output: Tensor) -> bytes:
        """The fields of `Plan` in `kernels/cpu/guided_step.h`."""
        spec, x, model_input, time = self.spec, self.buffers.x, self.buffers.model_input, self.buffers.time
        fields = (
            *(len(x), x.shape[1], x[0].numel(), output.shape[1]),
            *(_FLOATS.index(output.dtype), not output.is_contiguous()),
            0 if model_input is None else _FLOATS.index(model_input.dtype),
            model_input is not None and not model_input.is_contiguous(),
            _FLOATS.index(x.dtype),
            0 if model_input is None else len(model_input) // len(x),
            0 if time is None else _TIMES.index(time.dtype),
            spec.branches,
            -1 if spec.base is None or spec.branches == 1 else spec.base,
            spec.conditional,
            -1 if spec.unconditional is None else spec.unconditional,
            *(spec.scaled, spec.momentum, WEIGHTS_BY.index(spec.weights_by)),
            spec.weights_by != "sample" and self.buffers.weights.stride(0) == 0,  # type: ignore[union-attr]
            *(spec.learned_variance, spec.predict_x0, spec.raw_output, spec.gradient, spec.history),
            *(spec.saves_states, spec.clip, spec.rescale, NOISE_SOURCES.index(spec.noise_source)),
            spec.keep_x0,
            *(_address(tensor) for tensor in self._kept),
        )
        return struct.pack(f"={len(fields)}q", *fields)


def set_number(instructions: str | None) -> int:
    """The number of an instruction set, by default the widest."""
    names = instruction_sets()
    return names.index(instructions or names[-1])


def threads_for(is_large: bool) -> int:
    """What shares a large work; 0: it is done at once, holding the interpreter's lock."""
    return torch.get_num_threads() if is_large else 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
