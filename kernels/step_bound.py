"""Dynamic thresholding's bound of x0 in a row of the table: a quantile of the magnitudes of the x0 that the guided step
is about to predict.

The first kernel predicts x0 with the guided step's operations, keeps it, and makes the selection's first pass; the
other passes read x0 back. Bytes per element with float32 state and a bfloat16 model, K = 2: x 4 + outputs 2*2 read, x0
4 written, 3*4 read = 24. Predicting x0 again in every pass would move 32, and 48 from a float32 model.
"""

import triton
import triton.language as tl

from ._columns import P_M, P_M_REST, P_X, P_X_REST, WIDTH
from ._guidance import blend
from ._layout import locate, model_offsets
from ._math import predict_x0_closely
from .guided_step import launch_config
from .quantile import PASSES, SELECTION, launch_quantile, magnitude, narrow


@triton.jit(do_not_specialize=["batch", "blocks", "rank"])
def _step_bound_kernel(
    x_ptr,
    output_ptr,
    table_ptr,
    counter_ptr,
    weights_ptr,
    momentum_ptr,
    x0_ptr,
    selection_ptr,
    batch,
    size,
    spatial,
    output_stride,
    blocks,
    rank,
    BRANCHES: tl.constexpr,
    BASE: tl.constexpr,
    SCALED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SELECTION: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, offs, mask = locate(size, blocks, BLOCK)
    row = tl.load(counter_ptr)
    row_ptr = table_ptr + row * WIDTH
    output_offs = model_offsets(offs, output_stride // spatial, spatial, CHANNELS_LAST)
    m, _ = blend(
        output_ptr,
        output_offs,
        mask,
        weights_ptr + (row * batch + sample) * (BRANCHES + MOMENTUM),
        sample,
        batch,
        output_stride,
        momentum_ptr + sample * size + offs,
        BRANCHES,
        BASE,
        -1,
        SCALED,
        MOMENTUM,
        0,
        0,
        False,
    )
    x = tl.load(x_ptr + sample * size + offs, mask=mask, other=0.0)
    p_x = tl.load(row_ptr + P_X)
    p_m = tl.load(row_ptr + P_M)
    x0 = predict_x0_closely(x, m, p_x, p_m, tl.load(row_ptr + P_X_REST), tl.load(row_ptr + P_M_REST))
    tl.store(x0_ptr + sample * size + offs, x0, mask=mask)
    # Only the last pass stores a bound.
    narrow(
        magnitude(x0), mask, selection_ptr + sample * SELECTION, x0_ptr, size, blocks, rank, 0.0, 0.0, 0.0, SHIFT, BITS
    )


def launch_first_pass(output, spec, buffers, selection, rank, config=None):
    """Write `buffers.x0` and make the first pass, for an integer rank; other arguments as `launch_step_bound`."""
    x = buffers.x
    batch = x.shape[0]
    size = x[0].numel()
    config = config or launch_config(size, batch)
    blocks = -(-size // config.block)
    shift, bits = PASSES[0]
    _step_bound_kernel[(batch * blocks,)](
        x,
        output,
        buffers.table,
        buffers.counter,
        *(x if t is None else t for t in (buffers.weights, buffers.momentum)),
        buffers.x0,
        selection,
        batch,
        size,
        size // x.shape[1],
        output[0].numel(),
        blocks,
        rank,
        BRANCHES=spec.branches,
        BASE=-1 if spec.base is None or spec.branches == 1 else spec.base,
        SCALED=spec.scaled,
        MOMENTUM=spec.momentum,
        CHANNELS_LAST=not output.is_contiguous(),
        SELECTION=SELECTION,
        SHIFT=shift,
        BITS=bits,
        BLOCK=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )


def launch_step_bound(output, spec, buffers, selection, rank, config=None):
    """Write `buffers.bound`, and the unlimited x0 to `buffers.x0`; the run stays at its row.

    Args:
        output, spec, buffers: as in `launch_guided_step`.
        selection, rank, config: as in `launch_quantile`.
    """
    launch_first_pass(output, spec, buffers, selection, rank[0], config)
    launch_quantile(buffers.x0, selection, buffers.bound, rank, config, first=1)
