"""The native kernels beside the step, on tensors of a CPU: contiguous float32 unless it says otherwise. Nothing is
checked. `instructions` is one of `instruction_sets`, by default the widest."""

from __future__ import annotations

from torch import Tensor

from ..reference.philox import BROWNIAN_STREAM
from .extension import native_module
from .native import set_number


def native_brownian(
    out: Tensor, seeds: Tensor, nodes: Tensor, factors: Tensor, terms: int, instructions: str | None = None
) -> Tensor:
    """Fill `out`, [B, ...], with the bits of `brownian_normal`; seeds are int64 [B], nodes int64 [K], factors [K]."""
    size = out.numel() // len(seeds)
    path = nodes.data_ptr(), factors.data_ptr(), terms, BROWNIAN_STREAM
    native_module().brownian(set_number(instructions), seeds.data_ptr(), len(seeds), size, *path, out.data_ptr())
    return out
