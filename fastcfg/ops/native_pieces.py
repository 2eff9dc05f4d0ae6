"""The native kernels beside the step, on tensors of a CPU: contiguous float32 unless it says otherwise. Nothing is
checked. `instructions` is one of `instruction_sets`, by default the widest."""

from __future__ import annotations

import ctypes
import struct

from torch import Tensor

from ..clip import QuantileRank
from ..reference.philox import BROWNIAN_STREAM
from .extension import native_module
from .native import set_number

# GRAM_VECTORS of kernels/cpu/gram.h.
MAX_VECTORS = 4


def native_brownian(
    out: Tensor, seeds: Tensor, nodes: Tensor, factors: Tensor, terms: int, instructions: str | None = None
) -> Tensor:
    """Fill `out`, [B, ...], with the bits of `brownian_normal`; seeds are int64 [B], nodes int64 [K], factors [K]."""
    size = out.numel() // len(seeds)
    path = nodes.data_ptr(), factors.data_ptr(), terms, BROWNIAN_STREAM
    native_module().brownian(set_number(instructions), seeds.data_ptr(), len(seeds), size, *path, out.data_ptr())
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
    address = 0 if momentum is None else momentum.data_ptr()
    size = stride // output.shape[1] * channels
    sizes = branches, base, conditional, batch, size, stride
    packed = struct.pack("=9qf4x", output.data_ptr(), address, out.data_ptr(), *sizes, _float32(decay))
    native_module().gram(set_number(instructions), packed)


def native_quantile(x: Tensor, rank: QuantileRank, scratch: Tensor, out: Tensor) -> Tensor:
    """Fill `out`, [B], with the bits of `fastcfg.reference.quantile_bound`; scratch is int32, as long as a sample of x,
    [B, ...]."""
    index, weight, floor, ceiling = rank
    from_next = weight >= 0.5
    numbers = weight - 1 if from_next else weight, from_next, not weight > 0, _float32(floor), _float32(ceiling)
    packed = struct.pack("=qf2i2f4x", index, *numbers)
    size = x.numel() // len(x)
    native_module().quantile(packed, x.data_ptr(), len(x), size, scratch.data_ptr(), out.data_ptr())
    return out


def _float32(value: float) -> float:
    """Rounded, to infinity where it is too large: `struct.pack` refuses such numbers."""
    return ctypes.c_float(value).value
