"""The native kernels beside the step, on tensors of a CPU: contiguous float32 unless it says otherwise. Nothing is
checked. `instructions` is one of `instruction_sets`, by default the widest."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from ..clip import DynamicThreshold, QuantileRank
from ..reference.philox import BROWNIAN_STREAM
from ..step import StepBuffers, StepSpec
from .extension import native_module
from .native import LARGE, set_number, threads_for

# GRAM_VECTORS of kernels/cpu/gram.h.
MAX_VECTORS = 4


def native_brownian(
    out: Tensor, seeds: Tensor, nodes: Tensor, factors: Tensor, terms: int, instructions: str | None = None
) -> Tensor:
    """Fill `out`, [B, ...], with the bits of `brownian_normal`; seeds are int64 [B], nodes int64 [K], factors [K]."""
    tensors = map(address, (seeds, nodes, factors, out))
    packed = struct.pack("=8q", *tensors, len(seeds), out.numel() // len(seeds), terms, BROWNIAN_STREAM)
    native_module().brownian(set_number(instructions), threads_for(out.numel() * terms >= LARGE), packed)
    return out


def native_gram(
    output: Tensor,
    momentum: Tensor | None,
    branches: int,
    base: int,
    channels: int,
    conditional: int,
    decay: float,
    out: Tensor,
    instructions: str | None = None,
) -> None:
    """Fill `out`, float64 [B, V, V + 1], V at most `MAX_VECTORS`, with what `fastcfg.reference.gram` computes, added in
    another order; momentum is rewritten."""
    batch, stride = len(out), output[0].numel()
    size = stride // output.shape[1] * channels
    sizes = branches, base, conditional, batch, size, stride
    packed = struct.pack("=9qf4x", output.data_ptr(), address(momentum), out.data_ptr(), *sizes, _float32(decay))
    native_module().gram(set_number(instructions), threads_for(output.numel() >= LARGE), packed)


def native_quantile(x: Tensor, rank: QuantileRank, scratch: Tensor, out: Tensor) -> Tensor:
    """Fill `out`, [B], with the bits of `fastcfg.reference.quantile_bound`; scratch is int32, as long as a sample of x,
    [B, ...]."""
    size = x.numel() // len(x)
    native_module().quantile(_packed_rank(rank), x.data_ptr(), len(x), size, scratch.data_ptr(), out.data_ptr())
    return out


def native_blend(
    output: Tensor,
    weights: Tensor,
    base: int | None,
    scaled: bool,
    momentum: Tensor | None,
    out: Tensor,
    instructions: str | None = None,
) -> Tensor:
    """Fill `out`, [B, ...], with the bits of `fastcfg.reference.blend` of an output [K*B, ...] with weights [B, K], or
    [B, K + 1] with momentum."""
    packed = _packed_blend(output, weights, momentum, out, len(output) // len(out), base, scaled)
    native_module().blend_outputs(set_number(instructions), threads_for(output.numel() >= LARGE), packed)
    return out


def native_x0(
    x: Tensor,
    m: Tensor,
    p_x: Tensor,
    p_m: Tensor,
    bound: Tensor | None,
    rest: tuple[Tensor, Tensor] | None,
    out: Tensor,
    instructions: str | None = None,
) -> Tensor:
    """Fill `out`, like x and m, [B, ...], with the bits of `reference.pieces.predict_x0`; the others are [B]."""
    addresses = (address(tensor) for tensor in (x, m, p_x, p_m, *(rest or (None, None)), bound, out))
    packed = struct.pack("=10q", *addresses, len(x), x.numel() // len(x))
    native_module().predict(set_number(instructions), threads_for(x.numel() >= LARGE), packed)
    return out


def native_threshold(x0: Tensor, bound: Tensor, out: Tensor, instructions: str | None = None) -> Tensor:
    """Fill `out`, like x0, [B, ...], with the bits of `fastcfg.reference.pieces.threshold`; bound is [B]."""
    packed = struct.pack("=5q", x0.data_ptr(), bound.data_ptr(), out.data_ptr(), len(x0), x0.numel() // len(x0))
    native_module().threshold(set_number(instructions), threads_for(x0.numel() >= LARGE), packed)
    return out


class NativeBound:
    """`ReferenceBound` in C, for a float32 state, with its bits."""

    def __init__(
        self, threshold: DynamicThreshold, spec: StepSpec, buffers: StepBuffers, instructions: str | None = None
    ) -> None:
        self._spec, self._buffers = spec, buffers
        size = buffers.x[0].numel()
        self._rank, self._set = _packed_rank(threshold.rank(size)), set_number(instructions)
        self._scratch = torch.empty(size, dtype=torch.int32)
        self._output: Tensor | None = None

    def __call__(self, output: Tensor) -> None:
        """Args: output: the model's output [K*B, C or 2C, ...] in any floating dtype no wider than float32."""
        spec, b = self._spec, self._buffers
        if output.dtype != torch.float32 or not output.is_contiguous():
            if self._output is None or self._output.shape != output.shape:
                self._output = torch.empty(output.shape)
            output = self._output.copy_(output)
        weights, momentum = b.weights if spec.branches > 1 else None, b.momentum if spec.momentum else None
        blend = _packed_blend(output, weights, momentum, b.x, spec.branches, spec.base, spec.scaled)
        addresses = map(address, (b.x, b.table, b.counter, b.x0, b.bound, self._scratch))
        threads = threads_for(b.x.numel() >= LARGE)
        native_module().step_bound(self._set, threads, blend + self._rank + struct.pack("=6q", *addresses))


def address(tensor: Tensor | None) -> int:
    """Where a tensor's memory begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def _packed_blend(
    output: Tensor,
    weights: Tensor | None,
    momentum: Tensor | None,
    like: Tensor,
    branches: int,
    base: int | None,
    scaled: bool,
) -> bytes:
    """`Blend` of kernels/cpu/pieces.h, to be written to `like`, [B, ...]."""
    sizes = len(like), like.numel() // len(like), output.numel() // len(output)
    form = branches, -1 if base is None else base, scaled
    return struct.pack("=10q", *map(address, (output, weights, momentum, like)), *sizes, *form)


def _packed_rank(rank: QuantileRank) -> bytes:
    """`Rank` of kernels/cpu/quantile.h."""
    index, weight, floor, ceiling = rank
    from_next = weight >= 0.5
    share = weight - 1 if from_next else weight
    return struct.pack("=qf2i2f4x", index, share, from_next, not weight > 0, _float32(floor), _float32(ceiling))


def _float32(value: float) -> float:
    """Rounded, to infinity where it is too large: `struct.pack` refuses such numbers."""
    return ctypes.c_float(value).value
