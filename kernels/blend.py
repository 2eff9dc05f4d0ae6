"""The guided output of K branches: the delta form from a base branch, or the weighted sum."""

import triton
import triton.language as tl

from ._guidance import blend
from ._layout import BLOCK, blocks_per_sample, locate, model_offsets


@triton.jit
def _blend_kernel(
    output_ptr,
    weights_ptr,
    momentum_ptr,
    out_ptr,
    batch,
    size,
    channels,
    spatial,
    blocks,
    BRANCHES: tl.constexpr,
    BASE: tl.constexpr,
    SCALED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, offs, mask = locate(size, blocks, BLOCK)
    output_offs = model_offsets(offs, channels, spatial, CHANNELS_LAST)
    weights_ptr += sample * (BRANCHES + MOMENTUM)
    momentum_ptrs = momentum_ptr + sample * size + offs
    blended, _ = blend(
        output_ptr,
        output_offs,
        mask,
        weights_ptr,
        sample,
        batch,
        size,
        momentum_ptrs,
        BRANCHES,
        BASE,
        -1,
        SCALED,
        MOMENTUM,
        0,
        0,
        False,
    )
    tl.store(out_ptr + sample * size + offs, blended, mask=mask)


def launch_blend(output, weights, base, scaled, momentum, out):
    """Write float32 `out` [B, C, ...] from `output` [K*B, C, ...], contiguous or channels-last.

    Args:
        output: the branches along the batch.
        weights: float32 [B, K], or [B, K + 1] with momentum.
        base: index of the branch that differences are measured from; -1 for the weighted sum.
        scaled: whether the base is weighted too.
        momentum: float32 [B, C, ...], contiguous; None for none.
        out: the blend.
    """
    size = out[0].numel()
    channels = out.shape[1]
    blocks = blocks_per_sample(size)
    _blend_kernel[(len(out) * blocks,)](
        output,
        weights,
        out if momentum is None else momentum,
        out,
        len(out),
        size,
        channels,
        size // channels,
        blocks,
        BRANCHES=len(output) // len(out),
        BASE=base,
        SCALED=scaled,
        MOMENTUM=momentum is not None,
        CHANNELS_LAST=not output.is_contiguous(),
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
