"""What the log-probability of a step's draw is made of: per sample, the sum of the squares of its normals, and of the
variance channels. Normals that the step draws itself are drawn again, and nothing is read.

Every program writes its own sums, so that they do not depend on the order in which programs finish. Bytes per element
with a bfloat16 model: recorded noise 4, variance 2.
"""

import triton
import triton.language as tl

from ._math import normal4
from .guided_step import STEP_STREAM, launch_config


@triton.jit(do_not_specialize=["batch", "blocks"])
def _noise_sums_kernel(
    noise_ptr,
    seeds_ptr,
    output_ptr,
    counter_ptr,
    sums_ptr,
    batch,
    size,
    spatial,
    output_stride,
    blocks,
    CONDITIONAL: tl.constexpr,
    LEARNED: tl.constexpr,
    DRAWN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = pid // blocks
    block = pid % blocks
    group = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    offs = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = offs < size
    row = tl.load(counter_ptr)
    if DRAWN:
        z = normal4(group.to(tl.uint32), row, STREAM, tl.load(seeds_ptr + sample))
        z = tl.where(mask, z, 0.0)
    else:
        z = tl.load(noise_ptr + sample.to(tl.int64) * size + offs, mask=mask, other=0.0)
    place = sums_ptr + (row.to(tl.int64) * 2 * batch + sample) * blocks + block
    tl.store(place, tl.sum(tl.sum(z * z, axis=1), axis=0))
    if LEARNED:
        output_offs = offs + size
        if CHANNELS_LAST:
            channel = offs // spatial
            output_offs = (offs - channel * spatial) * (output_stride // spatial) + channel + size // spatial
        first = (CONDITIONAL * batch + sample).to(tl.int64) * output_stride
        v = tl.load(output_ptr + first + output_offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(place + batch * blocks, tl.sum(tl.sum(v, axis=1), axis=0))


def parts_of(size, batch):
    """Programs for a sample: the last dimension of the sums."""
    return -(-size // launch_config(size, batch).block)


def launch_noise_sums(output, noise, seeds, counter, sums, channels, conditional, learned):
    """Write a row's sums, before its step.

    Args:
        output: the model's [K*B, C or 2C, ...], contiguous or channels-last.
        noise: the row's normals, float32 [B, C, ...], or None to draw them from `seeds`, int64 [B].
        counter: the run's.
        sums: float32 [R, 2, B, P] with P = `parts_of` a sample's size.
        channels: C.
        conditional, learned: as in a `StepSpec`.
    """
    batch, parts = sums.shape[2:]
    spatial = output[0, 0].numel()
    size = channels * spatial
    config = launch_config(size, batch)
    _noise_sums_kernel[(batch * parts,)](
        sums if noise is None else noise,
        counter if seeds is None else seeds,
        output,
        counter,
        sums,
        batch,
        size,
        spatial,
        output[0].numel(),
        parts,
        CONDITIONAL=conditional,
        LEARNED=learned,
        DRAWN=noise is None,
        CHANNELS_LAST=not output.is_contiguous(),
        STREAM=STEP_STREAM,
        BLOCK=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
