"""The Gram matrix and the sums of every sample's vectors, in one pass over the model's output: the base branch's, the
other branches' differences from it, and the momentum.

Differences are taken before products: computed from products of cond and uncond, the norm of their difference would be
lost to cancellation. A program adds up its block in a tree, the second kernel the blocks' results in float64 in a fixed
order; all blocks have one length. Bytes per element, bfloat16, K = 2: 2*2 read; momentum 4 read, 4 written.
"""

import triton
import triton.language as tl

from ._layout import locate, model_offsets

# Twice the other passes' block: adding up across threads costs a program as much as its elements.
BLOCK = 2048


@triton.jit
def _branch(output_ptr, k, sample, batch, stride, offs, mask):
    return tl.load(output_ptr + (k * batch + sample) * stride + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["batch", "blocks"])
def _gram_kernel(
    output_ptr,
    momentum_ptr,
    partial_ptr,
    batch,
    size,
    spatial,
    output_stride,
    blocks,
    decay,
    BRANCHES: tl.constexpr,
    BASE: tl.constexpr,
    CONDITIONAL: tl.constexpr,
    MOMENTUM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, offs, mask = locate(size, blocks, BLOCK)
    output_offs = model_offsets(offs, output_stride // spatial, spatial, CHANNELS_LAST)
    base = _branch(output_ptr, BASE, sample, batch, output_stride, output_offs, mask)
    vectors = tl.tuple([])
    for k in tl.static_range(BRANCHES):
        if k == BASE:
            vectors += (base,)
        else:
            m_k = _branch(output_ptr, k, sample, batch, output_stride, output_offs, mask)
            vectors += (m_k - base,)
    if MOMENTUM:
        momentum_ptrs = momentum_ptr + sample * size + offs
        h = tl.load(momentum_ptrs, mask=mask, other=0.0)
        h = tl.fma(decay + tl.zeros_like(h), h, vectors[CONDITIONAL])
        tl.store(momentum_ptrs, h, mask=mask)
        vectors += (h,)

    V: tl.constexpr = BRANCHES + MOMENTUM
    partial_ptr += tl.program_id(0).to(tl.int64) * (V * (V + 1))
    for i in tl.static_range(V):
        tl.store(partial_ptr + i * (V + 1) + V, tl.sum(vectors[i], 0))
        for j in tl.static_range(i + 1):
            product = tl.sum(vectors[i] * vectors[j], 0)
            tl.store(partial_ptr + i * (V + 1) + j, product)
            if i != j:
                tl.store(partial_ptr + j * (V + 1) + i, product)


@triton.jit(do_not_specialize=["blocks"])
def _gram_sum_kernel(partial_ptr, out_ptr, blocks, NUMBERS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    rows = tl.arange(0, BLOCK)[:, None]
    total = tl.zeros((BLOCK, COLUMNS), tl.float64)
    start = 0
    while start < blocks:  # Triton 3.6's interpreter cannot make a range of an argument
        there = (start + rows < blocks) & (column < NUMBERS)[None, :]
        ptrs = partial_ptr + (sample * blocks + start + rows) * NUMBERS + column[None, :]
        total += tl.load(ptrs, mask=there, other=0.0).to(tl.float64)
        start += BLOCK
    tl.store(out_ptr + sample * NUMBERS + column, tl.sum(total, 0), mask=column < NUMBERS)


def partial_shape(vectors, batch, size):
    """The shape of the float32 blocks' results, [B, blocks, V, V + 1]."""
    return batch, -(-size // BLOCK), vectors, vectors + 1


def launch_gram_partial(output, size, spatial, base, conditional, momentum, decay, partial):
    """The pass over the output; arguments as `launch_gram`."""
    batch, blocks, *_ = partial.shape
    _gram_kernel[(batch * blocks,)](
        output,
        output if momentum is None else momentum,
        partial,
        batch,
        size,
        spatial,
        output[0].numel(),
        blocks,
        decay,
        BRANCHES=len(output) // batch,
        BASE=base,
        CONDITIONAL=conditional,
        MOMENTUM=momentum is not None,
        CHANNELS_LAST=not output.is_contiguous(),
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )


def launch_gram_sum(partial, out):
    """Add the blocks' results up."""
    size = out[0].numel()
    columns = triton.next_power_of_2(size)
    _gram_sum_kernel[(len(out),)](partial, out, partial.shape[1], size, columns, BLOCK=64, enable_fp_fusion=False)


def launch_gram(output, size, spatial, base, conditional, momentum, decay, partial, out):
    """Write float64 `out` [B, V, V + 1]: the Gram matrix, and the vectors' sums as its last column.

    Args:
        output: the model's output [K*B, C or 2C, ...], contiguous or channels-last.
        size, spatial: elements of a sample's first C channels, and of one channel.
        base: the branch that differences are measured from.
        conditional: the branch whose difference the momentum accumulates.
        momentum: float32 [B, C, ...], contiguous, rewritten: decay*h + difference for a number decay; None for none.
        partial: memory of `partial_shape`.
        out: the result.
    """
    launch_gram_partial(output, size, spatial, base, conditional, momentum, decay, partial)
    launch_gram_sum(partial, out)
