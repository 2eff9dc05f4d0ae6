"""The fused guided step: guidance, x0, update, noise and the next model input in one pass over the state.

Bytes per element with float32 state, bfloat16 model, K = 2, learned variance and in-kernel noise: x 4 + outputs 2*2 +
variance 2 read, x 4 + model inputs 2*2 written = 18.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from ._columns import (
    A_0,
    A_G,
    A_H0,
    A_M,
    A_U,
    A_X,
    A_X_REST,
    C_IN,
    K_0,
    K_M,
    K_X,
    L_0,
    L_V,
    P_G,
    P_M,
    P_M_REST,
    P_X,
    P_X_REST,
    SLOT,
    WIDTH,
    S,
    T,
)
from ._guidance import blend
from ._math import clip, normal4, predict_x0_closely, threshold

STEP_STREAM = 1


@dataclass(frozen=True)
class LaunchConfig:
    """Elements and warps per program."""

    block: int
    num_warps: int


def launch_config(size: int, batch: int) -> LaunchConfig:
    """The configuration for `batch` samples of `size` elements."""
    # Small states need many programs more than long ones: 264 fill an H200 twice.
    for block, num_warps in ((2048, 4), (1024, 4)):
        if batch * size >= 264 * block:
            return LaunchConfig(block, num_warps)
    return LaunchConfig(512, 4)


@triton.jit
def add_saved(y, coefficients_ptr, history_ptr, stride, mask, HISTORY: tl.constexpr):
    """y plus the saved tensors, which are `stride` apart, times their coefficients."""
    for j in tl.static_range(HISTORY):
        h = tl.load(history_ptr + j * stride, mask=mask, other=0.0)
        y = tl.fma(tl.load(coefficients_ptr + j) + tl.zeros_like(y), h, y)
    return y


# A batch of 1 is not specialised: it would be a constant without `.to`, and compile separate code.
@triton.jit(do_not_specialize=["batch", "blocks"])
def _guided_step_kernel(
    x_ptr,
    source_ptr,
    output_ptr,
    table_ptr,
    counter_ptr,
    weights_ptr,
    bound_ptr,
    noise_ptr,
    seeds_ptr,
    history_ptr,
    gradient_ptr,
    momentum_ptr,
    x0_ptr,
    input_ptr,
    time_ptr,
    batch,
    size,
    spatial,
    output_stride,
    blocks,
    BRANCHES: tl.constexpr,
    BASE: tl.constexpr,
    CONDITIONAL: tl.constexpr,
    UNCONDITIONAL: tl.constexpr,
    SCALED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    WEIGHTS_BY: tl.constexpr,
    ONE_ROW: tl.constexpr,
    LEARNED: tl.constexpr,
    PREDICT: tl.constexpr,
    RAW: tl.constexpr,
    GRADIENT: tl.constexpr,
    HISTORY: tl.constexpr,
    STATES: tl.constexpr,
    CLIP: tl.constexpr,
    RESCALE: tl.constexpr,
    NOISE: tl.constexpr,
    KEEP_X0: tl.constexpr,
    SLOTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INPUT_CHANNELS_LAST: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = pid // blocks
    block = pid % blocks
    group = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    offs = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = offs < size

    # One row of the table; rows past the last hold defaults.
    row = tl.load(counter_ptr)
    row_ptr = table_ptr + row * WIDTH
    a_x = tl.load(row_ptr + A_X)
    a_x_rest = tl.load(row_ptr + A_X_REST)
    if PREDICT:
        p_x = tl.load(row_ptr + P_X)
        p_m = tl.load(row_ptr + P_M)
        p_x_rest = tl.load(row_ptr + P_X_REST)
        p_m_rest = tl.load(row_ptr + P_M_REST)
        a_0 = tl.load(row_ptr + A_0)
    # Used late, but the compiler moves no load up past a store or out of a branch.
    if HISTORY > 0:
        k_x = tl.load(row_ptr + K_X)
        k_0 = tl.load(row_ptr + K_0)
        k_m = tl.load(row_ptr + K_M)
        slot = tl.load(row_ptr + SLOT).to(tl.int32)
    if SLOTS > 0:
        c_in = tl.load(row_ptr + WIDTH + C_IN)

    channels = size // spatial
    if CHANNELS_LAST or INPUT_CHANNELS_LAST or WEIGHTS_BY == 1:
        channel = offs // spatial
        # With % 120 instructions per element instead of 112 (sm_90, Triton 3.9).
        position = offs - channel * spatial
    if CHANNELS_LAST:
        output_offs = position * (output_stride // spatial) + channel
        variance_shift = channels
    else:
        output_offs = offs
        variance_shift = size
    sample_offset = sample.to(tl.int64) * size

    if WEIGHTS_BY == 0:
        row_weights_ptr = weights_ptr + (row * batch + sample) * (BRANCHES + MOMENTUM)
        place = 0
        places = 0
    else:
        if WEIGHTS_BY == 1:
            place = channel
            places = channels
        else:
            place = offs
            places = size
        weights_row = sample.to(tl.int64) if ONE_ROW else row.to(tl.int64) * batch + sample
        row_weights_ptr = weights_ptr + weights_row * (BRANCHES * places)
    m, unconditional = blend(
        output_ptr,
        output_offs,
        mask,
        row_weights_ptr,
        sample,
        batch,
        output_stride,
        momentum_ptr + sample_offset + offs,
        BRANCHES,
        BASE,
        UNCONDITIONAL,
        SCALED,
        MOMENTUM,
        place,
        places,
        WEIGHTS_BY != 0,
    )

    # x0.
    x = tl.load(source_ptr + sample_offset + offs, mask=mask, other=0.0).to(tl.float32)
    zeros = tl.zeros_like(x)
    if PREDICT:
        x0 = predict_x0_closely(x, m, p_x, p_m, p_x_rest, p_m_rest)
    if RESCALE:
        x0 = threshold(x0, tl.load(bound_ptr + sample))
    elif CLIP:
        x0 = clip(x0, tl.load(bound_ptr + sample))
    if GRADIENT:
        g = tl.load(gradient_ptr + sample_offset + offs, mask=mask, other=0.0)
        x0 = tl.fma(tl.load(row_ptr + P_G) + zeros, g, x0)

    # The update: small terms first, mostly, which takes a third off the rounding of methods with saved tensors; states
    # last.
    y = a_x_rest * x
    history_stride = batch.to(tl.int64) * size
    if not STATES:
        y = add_saved(y, row_ptr + A_H0, history_ptr + sample_offset + offs, history_stride, mask, HISTORY)
    if PREDICT:
        y = tl.fma(a_0 + zeros, x0, y)
    if RAW:
        y = tl.fma(tl.load(row_ptr + A_M) + zeros, m, y)
    if UNCONDITIONAL >= 0:
        y = tl.fma(tl.load(row_ptr + A_U) + zeros, unconditional, y)
    y = tl.fma(a_x + zeros, x, y)
    if STATES:
        y = add_saved(y, row_ptr + A_H0, history_ptr + sample_offset + offs, history_stride, mask, HISTORY)

    if LEARNED:
        branch_ptr = output_ptr + (CONDITIONAL * batch + sample).to(tl.int64) * output_stride + variance_shift
        v = tl.load(branch_ptr + output_offs, mask=mask, other=0.0).to(tl.float32)
    if GRADIENT:
        scale = tl.load(row_ptr + A_G) + zeros
        if LEARNED:
            l_v = tl.load(row_ptr + L_V)
            scale = tl.exp2(v * (l_v + l_v)) * scale
        y = tl.fma(scale, g, y)
    if NOISE > 0:
        if LEARNED:
            std = tl.exp2(tl.fma(tl.load(row_ptr + L_V) + zeros, v, tl.load(row_ptr + L_0) + zeros))
        else:
            std = tl.load(row_ptr + S) + zeros
        if NOISE == 1:
            z = tl.load(noise_ptr + sample_offset + offs, mask=mask, other=0.0).to(tl.float32)
        else:
            z = normal4(group.to(tl.uint32), row, STREAM, tl.load(seeds_ptr + sample))
        y = tl.fma(std, z, y)

    if SLOTS > 0:
        # In L1 with c_in. Loaded above, its registers make sm_80 spill without learned variance.
        time = tl.load(row_ptr + WIDTH + T)
    if KEEP_X0:
        tl.store(x0_ptr + sample_offset + offs, x0, mask=mask)
    if HISTORY > 0:
        if slot >= 0:
            h = k_x * x
            if PREDICT:
                h = tl.fma(k_0 + zeros, x0, h)
            h = tl.fma(k_m + zeros, m, h)
            tl.store(history_ptr + slot * history_stride + sample_offset + offs, h, mask=mask)
    tl.store(x_ptr + sample_offset + offs, y, mask=mask)

    # The next row's model input.
    if SLOTS > 0:
        model_x = (y * c_in).to(input_ptr.dtype.element_ty)
        if INPUT_CHANNELS_LAST:
            input_offs = position * channels + channel
        else:
            input_offs = offs
        for k in tl.static_range(SLOTS):
            tl.store(input_ptr + (k * batch + sample).to(tl.int64) * size + input_offs, model_x, mask=mask)
        if block == 0:
            for k in tl.static_range(SLOTS):
                tl.store(time_ptr + k * batch + sample, time.to(time_ptr.dtype.element_ty))

    # The last program to finish advances the row. The barrier keeps this program's slow warps from reading the row
    # afterwards (Triton 3.9 puts one before the atomic by itself, 3.6 does not).
    tl.debug_barrier()
    ticket = tl.atomic_add(counter_ptr + 1, 1, sem="acq_rel")
    if ticket == batch * blocks - 1:
        tl.store(counter_ptr + 1, 0)
        tl.store(counter_ptr, row + 1)


def launch_guided_step(output, spec, buffers, config=None):
    """Run one step on `buffers` in place; `ops` has checked shapes, dtypes and devices.

    Args:
        output: the model's output [K*B, C or 2C, ...], contiguous or channels-last.
        spec: a `StepSpec`.
        buffers: a `StepBuffers`.
        config: a `LaunchConfig`; by default `launch_config`'s.
    """
    x = buffers.x
    batch = x.shape[0]
    size = x[0].numel()
    spatial = size // x.shape[1]
    config = config or launch_config(size, batch)
    blocks = -(-size // config.block)
    model_input = buffers.model_input
    _guided_step_kernel[(batch * blocks,)](
        x,
        x if buffers.source is None else buffers.source,
        output,
        buffers.table,
        buffers.counter,
        *(t if t is not None else x for t in (buffers.weights, buffers.bound, buffers.noise)),
        buffers.seeds if buffers.seeds is not None else buffers.counter,
        *(t if t is not None else x for t in (buffers.history, buffers.gradient)),
        *(t if t is not None else x for t in (buffers.momentum, buffers.x0, model_input)),
        buffers.time if buffers.time is not None else buffers.counter,
        batch,
        size,
        spatial,
        output[0].numel(),
        blocks,
        BRANCHES=spec.branches,
        BASE=-1 if spec.base is None or spec.branches == 1 else spec.base,
        CONDITIONAL=spec.conditional,
        UNCONDITIONAL=-1 if spec.unconditional is None else spec.unconditional,
        SCALED=spec.scaled,
        MOMENTUM=spec.momentum,
        WEIGHTS_BY=("sample", "channel", "element").index(spec.weights_by),
        ONE_ROW=spec.weights_by != "sample" and buffers.weights.stride(0) == 0,
        LEARNED=spec.learned_variance,
        PREDICT=spec.predict_x0,
        RAW=spec.raw_output,
        GRADIENT=spec.gradient,
        HISTORY=spec.history,
        STATES=spec.saves_states,
        CLIP=spec.clip,
        RESCALE=spec.rescale,
        NOISE=("none", "tensor", "philox").index(spec.noise_source),
        KEEP_X0=spec.keep_x0,
        SLOTS=0 if model_input is None else model_input.shape[0] // batch,
        CHANNELS_LAST=not output.is_contiguous(),
        INPUT_CHANNELS_LAST=model_input is not None and not model_input.is_contiguous(),
        STREAM=STEP_STREAM,
        BLOCK=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
