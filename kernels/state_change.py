"""A change of the state between two rows, and what the model is given then, in one pass: a new state, or known pixels
put into the state and the noise of a jump back.

Bytes per element with float32 state and a bfloat16 model, K = 2: state 4 read, 4 + 2*2 written; with known pixels image
4 + hold 4 read.
"""

import triton
import triton.language as tl

from ._columns import C_IN, WIDTH, T
from ._math import normal4
from .guided_step import launch_config

# As in `fastcfg.state_change`.
NO_NORMALS = tl.constexpr(-2)
TENSOR = tl.constexpr(-1)
KNOWN_WIDTH = tl.constexpr(5)


@triton.jit
def _normals(ptr, offs, mask, group, row, seeds_ptr, sample, SOURCE: tl.constexpr):
    """Normals of a tensor, or of a stream of Philox: the start's has one row."""
    if SOURCE == TENSOR:
        return tl.load(ptr + offs, mask=mask, other=0.0)
    if SOURCE == 0:
        return normal4(group.to(tl.uint32), row * 0, SOURCE, tl.load(seeds_ptr + sample))
    return normal4(group.to(tl.uint32), row, SOURCE, tl.load(seeds_ptr + sample))


@triton.jit(do_not_specialize=["batch", "blocks"])
def _state_change_kernel(
    new_ptr,
    x_ptr,
    table_ptr,
    counter_ptr,
    seeds_ptr,
    image_ptr,
    hold_ptr,
    rows_ptr,
    noise_ptr,
    renoise_ptr,
    input_ptr,
    time_ptr,
    batch,
    size,
    spatial,
    blocks,
    BEFORE: tl.constexpr,
    KNOWN: tl.constexpr,
    HARD: tl.constexpr,
    NOISE: tl.constexpr,
    RENOISE: tl.constexpr,
    SLOTS: tl.constexpr,
    INPUT_CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = (pid // blocks).to(tl.int64)
    block = pid % blocks
    group = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    offs = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = offs < size
    state_offs = sample * size + offs

    following = tl.load(counter_ptr)
    row = following
    if not BEFORE:
        row = following - 1
    c_in = tl.load(table_ptr + following * WIDTH + C_IN)
    time = tl.load(table_ptr + following * WIDTH + T)
    x = tl.load(new_ptr + state_offs, mask=mask, other=0.0)
    zeros = tl.zeros_like(x)
    if KNOWN:
        row_ptr = rows_ptr + row * KNOWN_WIDTH
        signal = tl.load(row_ptr)
        gate = tl.load(row_ptr + 2)
        image = tl.load(image_ptr + state_offs, mask=mask, other=0.0)
        hold = tl.load(hold_ptr + state_offs, mask=mask, other=0.0)
        if RENOISE != NO_NORMALS:
            kept = tl.load(row_ptr + 3)
            added = tl.load(row_ptr + 4)
            if BEFORE:
                again = _normals(renoise_ptr, state_offs, mask, group, row, seeds_ptr, sample, RENOISE)
                x = tl.fma(kept + zeros, x, again * added)
        if NOISE != NO_NORMALS:
            z = _normals(noise_ptr, state_offs, mask, group, row, seeds_ptr, sample, NOISE)
            pixels = tl.fma(signal + zeros, image, z * tl.load(row_ptr + 1))
        else:
            pixels = image * signal
        if HARD:
            hold = tl.where(hold > gate, 1.0, 0.0)
        else:
            hold = hold * gate
        x = tl.fma(1.0 - hold, x, hold * pixels)
        if RENOISE != NO_NORMALS:
            if not BEFORE:
                again = _normals(renoise_ptr, state_offs, mask, group, row, seeds_ptr, sample, RENOISE)
                x = tl.fma(kept + zeros, x, again * added)
    tl.store(x_ptr + state_offs, x, mask=mask)

    model_x = (x * c_in).to(input_ptr.dtype.element_ty)
    input_offs = offs
    if INPUT_CHANNELS_LAST:
        channel = offs // spatial
        input_offs = (offs - channel * spatial) * (size // spatial) + channel
    for k in tl.static_range(SLOTS):
        tl.store(input_ptr + (k * batch + sample) * size + input_offs, model_x, mask=mask)
    if block == 0:
        for k in tl.static_range(SLOTS):
            tl.store(time_ptr + k * batch + sample, time.to(time_ptr.dtype.element_ty))


def launch_state_change(new, spec, buffers, known, config=None):
    """Write the changed state and the model's next input and time; `ops` has checked shapes, dtypes and devices.

    Args:
        new: the state to change, [B, C, ...], which may be the buffers' own.
        spec, buffers, known: a `StateSpec`, `StepBuffers`, and `KnownBuffers` or None.
        config: a `LaunchConfig`; by default the guided step's.
    """
    x, model_input = buffers.x, buffers.model_input
    batch, size = x.shape[0], x[0].numel()
    config = config or launch_config(size, batch)
    blocks = -(-size // config.block)
    tensors = (None,) * 5 if known is None else (known.image, known.hold, known.rows, known.noise, known.renoise)
    _state_change_kernel[(batch * blocks,)](
        new,
        x,
        buffers.table,
        buffers.counter,
        buffers.seeds if buffers.seeds is not None else buffers.counter,
        *(x if tensor is None else tensor for tensor in tensors),
        model_input,
        buffers.time,
        batch,
        size,
        size // x.shape[1],
        blocks,
        BEFORE=spec.before,
        KNOWN=spec.known,
        HARD=spec.hard,
        NOISE=spec.noise,
        RENOISE=spec.renoise,
        SLOTS=model_input.shape[0] // batch,
        INPUT_CHANNELS_LAST=not model_input.is_contiguous(),
        BLOCK=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
