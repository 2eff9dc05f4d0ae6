"""A model's output [N, 2C, ...] to its mean and its variance channels."""

import triton
import triton.language as tl

from ._layout import BLOCK, blocks_per_sample, locate, model_offsets


@triton.jit
def _split_kernel(
    output_ptr,
    mean_ptr,
    variance_ptr,
    size,
    channels,
    spatial,
    blocks,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, offs, mask = locate(size, blocks, BLOCK)
    output_ptrs = output_ptr + sample * 2 * size + model_offsets(offs, 2 * channels, spatial, CHANNELS_LAST)
    shift = channels if CHANNELS_LAST else size
    mean = tl.load(output_ptrs, mask=mask)
    variance = tl.load(output_ptrs + shift, mask=mask)
    tl.store(mean_ptr + sample * size + offs, mean.to(tl.float32), mask=mask)
    tl.store(variance_ptr + sample * size + offs, variance.to(tl.float32), mask=mask)


def launch_split(output, mean, variance):
    """Write float32 `mean` and `variance` [N, C, ...] from `output` [N, 2C, ...], contiguous or channels-last."""
    size = mean[0].numel()
    channels = mean.shape[1]
    blocks = blocks_per_sample(size)
    _split_kernel[(len(mean) * blocks,)](
        output,
        mean,
        variance,
        size,
        channels,
        size // channels,
        blocks,
        CHANNELS_LAST=not output.is_contiguous(),
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
