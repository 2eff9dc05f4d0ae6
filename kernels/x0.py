"""x0 from the state and the model's output: p_x*x + p_m*m, limited to a bound per sample."""

import triton
import triton.language as tl

from ._layout import BLOCK, blocks_per_sample, locate, model_offsets
from ._math import clip, predict_x0, predict_x0_closely


@triton.jit
def _x0_kernel(
    x_ptr,
    output_ptr,
    p_x_ptr,
    p_m_ptr,
    p_x_rest_ptr,
    p_m_rest_ptr,
    bound_ptr,
    out_ptr,
    size,
    channels,
    spatial,
    blocks,
    CLOSELY: tl.constexpr,
    CLIP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, offs, mask = locate(size, blocks, BLOCK)
    output_ptrs = output_ptr + sample * size + model_offsets(offs, channels, spatial, CHANNELS_LAST)
    x = tl.load(x_ptr + sample * size + offs, mask=mask).to(tl.float32)
    m = tl.load(output_ptrs, mask=mask).to(tl.float32)
    p_x = tl.load(p_x_ptr + sample)
    p_m = tl.load(p_m_ptr + sample)
    if CLOSELY:
        x0 = predict_x0_closely(x, m, p_x, p_m, tl.load(p_x_rest_ptr + sample), tl.load(p_m_rest_ptr + sample))
    else:
        x0 = predict_x0(x, m, p_x, p_m)
    if CLIP:
        x0 = clip(x0, tl.load(bound_ptr + sample))
    tl.store(out_ptr + sample * size + offs, x0, mask=mask)


def launch_x0(x, output, p_x, p_m, bound, rest, out):
    """Write float32 `out` [B, C, ...].

    Args:
        x: [B, C, ...], contiguous.
        output: [B, C, ...], contiguous or channels-last.
        p_x, p_m: float32 [B].
        bound: float32 [B], or None for no clip.
        rest: float32 [B] twice, what rounding took from p_x and p_m, or None.
        out: x0.
    """
    size = x[0].numel()
    channels = x.shape[1]
    blocks = blocks_per_sample(size)
    _x0_kernel[(len(x) * blocks,)](
        x,
        output,
        p_x,
        p_m,
        *((p_x, p_m) if rest is None else rest),
        p_x if bound is None else bound,
        out,
        size,
        channels,
        size // channels,
        blocks,
        CLOSELY=rest is not None,
        CLIP=bound is not None,
        CHANNELS_LAST=not output.is_contiguous(),
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
