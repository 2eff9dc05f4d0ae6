"""The guided step's generator on its own: standard normals per sample, for the starting noise and tests."""

import triton
import triton.language as tl

from ._math import normal4


# A row of 1 is not specialised, as in the guided step.
@triton.jit(do_not_specialize=["row", "blocks"])
def _normal_kernel(out_ptr, seeds_ptr, row, size, blocks, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    sample = pid // blocks
    group = (pid % blocks) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    offs = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    z = normal4(group.to(tl.uint32), row, STREAM, tl.load(seeds_ptr + sample))
    tl.store(out_ptr + sample.to(tl.int64) * size + offs, z, mask=offs < size)


def launch_normal(out, seeds, row, stream):
    """Fill float32 `out` [B, ...] with the normals of int64 `seeds` [B] at a row of a stream."""
    size = out[0].numel()
    block = 1024
    blocks = -(-size // block)
    _normal_kernel[(len(out) * blocks,)](
        out, seeds, row, size, blocks, STREAM=stream, BLOCK=block, enable_fp_fusion=False
    )
