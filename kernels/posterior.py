"""Mean, variance and log variance of one step's posterior; the variance is fixed per sample, or interpolated by the
model's variance channels."""

import triton
import triton.language as tl

from ._layout import BLOCK, blocks_per_sample, locate, model_offsets


@triton.jit
def _exp(x):
    """e**x to less than 1 ulp.

    The library's exp multiplies by log2(e) first, which loses 16 ulp at the log variances of the last steps, -20.
    """
    x = tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, 89.0, propagate_nan=tl.PropagateNan.ALL)
    # x = k ln 2 + r with ln 2 in two parts, the first short enough for k times it to be exact.
    k = tl.floor(tl.fma(x, 1.4426950408889634, 0.5))
    r = tl.fma(k, -0.693359375, x)
    r = tl.fma(k, 0.00021219444170128554, r)
    # Minimax fit of (e**r - 1 - r) / r**2 on |r| <= ln(2)/2; the fit's relative error in e**r is 3e-9.
    p = tl.fma(r, 0.001381459878757596, 0.008368716575205326)
    p = tl.fma(p, r, 0.04166838899254799)
    p = tl.fma(p, r, 0.1666652113199234)
    p = tl.fma(p, r, 0.4999999403953552)
    p = tl.fma(r * r, p, r) + 1.0
    # 2**k in two factors, which reach subnormal results.
    n = k.to(tl.int32)
    half = n >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((n - half + 127) << 23).to(tl.float32, bitcast=True)
    return p * first * second


@triton.jit
def _posterior_kernel(
    x0_ptr,
    x_ptr,
    coef_x0_ptr,
    coef_x_ptr,
    min_log_ptr,
    max_log_ptr,
    channels_ptr,
    mean_ptr,
    variance_ptr,
    log_variance_ptr,
    size,
    channels,
    spatial,
    blocks,
    LEARNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, offs, mask = locate(size, blocks, BLOCK)
    elements = sample * size + offs
    x0 = tl.load(x0_ptr + elements, mask=mask).to(tl.float32)
    x = tl.load(x_ptr + elements, mask=mask).to(tl.float32)
    coef_x = tl.broadcast_to(tl.load(coef_x_ptr + sample), x.shape)
    tl.store(mean_ptr + elements, tl.fma(coef_x, x, tl.load(coef_x0_ptr + sample) * x0), mask=mask)

    min_log = tl.load(min_log_ptr + sample)
    if LEARNED:
        v_ptrs = channels_ptr + sample * size + model_offsets(offs, channels, spatial, CHANNELS_LAST)
        v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float32)
        fraction = (v + 1.0) * 0.5
        max_log = tl.broadcast_to(tl.load(max_log_ptr + sample), v.shape)
        log_variance = tl.fma(fraction, max_log, (1.0 - fraction) * min_log)
        tl.store(log_variance_ptr + elements, log_variance, mask=mask)
        tl.store(variance_ptr + elements, _exp(log_variance), mask=mask)
    elif tl.program_id(0) % blocks == 0:
        tl.store(log_variance_ptr + sample, min_log)
        tl.store(variance_ptr + sample, _exp(min_log))


def launch_posterior(x0, x, coef_x0, coef_x, min_log, max_log, channels, mean, variance, log_variance):
    """Write the float32 results.

    Args:
        x0, x: [B, C, ...], contiguous.
        coef_x0, coef_x, min_log, max_log: float32 [B].
        channels: the model's variance channels [B, C, ...], contiguous or channels-last; None for min_log itself.
        mean: [B, C, ...].
        variance, log_variance: [B, C, ...], or [B, 1, ...] without channels.
    """
    size = x[0].numel()
    blocks = blocks_per_sample(size)
    _posterior_kernel[(len(x) * blocks,)](
        x0,
        x,
        coef_x0,
        coef_x,
        min_log,
        max_log,
        x if channels is None else channels,
        mean,
        variance,
        log_variance,
        size,
        x.shape[1],
        size // x.shape[1],
        blocks,
        LEARNED=channels is not None,
        CHANNELS_LAST=channels is not None and not channels.is_contiguous(),
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
