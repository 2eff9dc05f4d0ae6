"""x0 limited to a bound per sample, then divided by it."""

import triton
import triton.language as tl

from ._layout import BLOCK, blocks_per_sample, locate
from ._math import threshold


@triton.jit
def _threshold_kernel(x0_ptr, bound_ptr, out_ptr, size, blocks, BLOCK: tl.constexpr):
    sample, offs, mask = locate(size, blocks, BLOCK)
    x0 = tl.load(x0_ptr + sample * size + offs, mask=mask).to(tl.float32)
    tl.store(out_ptr + sample * size + offs, threshold(x0, tl.load(bound_ptr + sample)), mask=mask)


def launch_threshold(x0, bound, out):
    """Write float32 `out` [B, ...] from `x0` [B, ...], contiguous, and float32 `bound` [B]."""
    size = x0[0].numel()
    blocks = blocks_per_sample(size)
    _threshold_kernel[(len(x0) * blocks,)](x0, bound, out, size, blocks, BLOCK=BLOCK, enable_fp_fusion=False)
