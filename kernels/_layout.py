"""The elementwise kernels' way through a batch: a flat grid, some programs per sample, offsets within the sample."""

import triton
import triton.language as tl

# 8 elements for each of 128 threads: one 16-byte access in float16 and bfloat16, two in float32.
BLOCK = 1024


def blocks_per_sample(size):
    """Programs needed for a sample of `size` elements."""
    return -(-size // BLOCK)


@triton.jit
def locate(size, blocks, BLOCK: tl.constexpr):
    """This program's sample (int64), its elements' offsets within the sample, and the mask of those that exist."""
    pid = tl.program_id(0)
    offs = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    return (pid // blocks).to(tl.int64), offs, offs < size


@triton.jit
def model_offsets(offs, channels, spatial, CHANNELS_LAST: tl.constexpr):
    """The elements' offsets in a sample of `channels` channels in the model's layout, for `offs` in [C, ...]."""
    if CHANNELS_LAST:
        offs = (offs % spatial) * channels + offs // spatial
    return offs
