"""Brownian noise of a row: a sum of normals with given factors (`fastcfg.reference.brownian`), per sample."""

import triton
import triton.language as tl

from ._math import normal4


@triton.jit(do_not_specialize=["terms", "blocks"])
def _brownian_kernel(
    out_ptr, seeds_ptr, nodes_ptr, factors_ptr, terms, size, blocks, STREAM: tl.constexpr, BLOCK: tl.constexpr
):
    pid = tl.program_id(0)
    sample = pid // blocks
    group = (pid % blocks) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    offs = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    seed = tl.load(seeds_ptr + sample)
    y = tl.zeros((BLOCK // 4, 4), tl.float32)
    k = 0
    while k < terms:  # Triton 3.6's interpreter cannot make a range of an argument
        z = normal4(group.to(tl.uint32), tl.load(nodes_ptr + k), STREAM, seed)
        y = tl.fma(tl.load(factors_ptr + k) + tl.zeros_like(y), z, y)
        k += 1
    tl.store(out_ptr + sample.to(tl.int64) * size + offs, y, mask=offs < size)


def launch_brownian(out, seeds, nodes, factors, terms, stream):
    """Fill float32 `out` [B, ...] with the sum of the first `terms` of `nodes`, int64 [K], times `factors`, float32
    [K], for int64 `seeds` [B]."""
    size = out[0].numel()
    block = 1024
    blocks = -(-size // block)
    _brownian_kernel[(len(out) * blocks,)](
        out, seeds, nodes, factors, terms, size, blocks, STREAM=stream, BLOCK=block, enable_fp_fusion=False
    )
