"""A quantile of every sample's magnitudes, limited to a range: radix selection on their bits.

Magnitudes are ordered like their bits read as integers. Each pass counts one digit of the magnitudes that begin with
the digits found so far; a sample's last program to finish reads the counts, finds the next digit and clears them.
Counts are integers: the order of arrival does not matter. Nothing waits for the host.
"""

import triton
import triton.language as tl

from ._layout import locate
from .guided_step import launch_config

# Lowest bit and width of each pass's digit, of a magnitude's 31 bits. Wider digits would save a pass where Triton
# counts with atomics in shared memory (3.9 on NVIDIA); elsewhere it counts with ballots, and each bit doubles their
# cost.
PASSES = ((23, 8), (15, 8), (7, 8), (0, 7))

# A sample's selection, zeros at first: the digits found, the rank among the magnitudes that begin with them, and three
# parts that every pass leaves at zero: an extreme (see `narrow`), the ticket that identifies the last program, the
# counts.
SELECTION = 4 + 256
_RANK = tl.constexpr(1)
_EXTREME = tl.constexpr(2)
_TICKET = tl.constexpr(3)
_COUNTS = tl.constexpr(4)

_INFINITY = tl.constexpr(0x7F800000)
_LARGEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def magnitude(x):
    """The bits of |x| as int32."""
    return x.to(tl.int32, bitcast=True) & _LARGEST


@triton.jit
def take(ptr, clear):
    """The values at `ptr`, which are set to 0; `clear` is a 0 of their shape and type. (Triton 3.6 cannot compile an
    exchange for AMD.)"""
    return tl.atomic_and(ptr, clear, sem="relaxed")


@triton.jit
def narrow(
    magnitudes,
    mask,
    selection_ptr,
    bound_ptr,
    size,
    blocks,
    rank,
    weight,
    floor,
    ceiling,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
):
    """One pass over a block of a sample's `size` magnitudes; `blocks` programs do a block each.

    The last pass stores the bound: the magnitude of this rank, counted from 0, plus `weight` times the distance to the
    next one (`torch.lerp`), at least floor and at most ceiling; NaN if any magnitude is NaN.
    """
    FIRST: tl.constexpr = SHIFT + BITS == 31
    LAST: tl.constexpr = SHIFT == 0
    if FIRST:
        found = 0
        counted = mask
        # The largest magnitude: beyond infinity's bits there is a NaN.
        extreme = tl.where(mask, magnitudes, 0)
    else:
        found = tl.load(selection_ptr)
        rank = tl.load(selection_ptr + _RANK)
        counted = mask & ((magnitudes >> (SHIFT + BITS)) == found)
        # The nearest magnitude beyond the digits found, as its distance from the largest integer.
        extreme = tl.where(mask & ((magnitudes >> BITS) > found), _LARGEST - magnitudes, 0)
    if FIRST or LAST:
        tl.atomic_max(selection_ptr + _EXTREME, tl.max(extreme, 0), sem="relaxed")
    digits = (magnitudes >> SHIFT) & ((1 << BITS) - 1)
    counts = tl.histogram(digits, 1 << BITS, mask=counted)
    bins = tl.arange(0, 1 << BITS)
    tl.atomic_add(selection_ptr + _COUNTS + bins, counts, mask=counts > 0, sem="relaxed")

    # Every warp has read the selection and added its counts before the ticket is drawn, as in the guided step.
    tl.debug_barrier()
    ticket = tl.atomic_add(selection_ptr + _TICKET, 1, sem="acq_rel")
    if ticket == blocks - 1:
        tl.store(selection_ptr + _TICKET, 0)
        up_to = tl.cumsum(take(selection_ptr + _COUNTS + bins, tl.zeros_like(bins)), 0)
        if FIRST:
            rank = tl.where(take(selection_ptr + _EXTREME, 0) > _INFINITY, size - 1, rank)
        digit = tl.sum((up_to <= rank).to(tl.int32), 0)
        found = (found << BITS) | digit
        if LAST:
            above = found - digit + tl.sum((up_to <= rank + 1).to(tl.int32), 0)
            beyond = _LARGEST - take(selection_ptr + _EXTREME, 0)
            above = tl.where(rank + 1 < tl.max(up_to, 0), above, beyond)
            low = found.to(tl.float32, bitcast=True)
            high = tl.where(weight > 0, above, found).to(tl.float32, bitcast=True)
            # Rounded once, like torch's on GPUs and in a CPU's vectors.
            from_low = tl.fma(weight, high - low, low)
            from_high = tl.fma(weight - 1.0, high - low, high)
            bound = tl.where(weight < 0.5, from_low, from_high)
            bound = tl.maximum(bound, floor, propagate_nan=tl.PropagateNan.ALL)
            tl.store(bound_ptr, tl.minimum(bound, ceiling, propagate_nan=tl.PropagateNan.ALL))
        else:
            tl.store(selection_ptr, found)
            tl.store(selection_ptr + _RANK, rank - tl.max(tl.where(up_to <= rank, up_to, 0), 0))


# A rank of 1 and a single block are not specialised.
@triton.jit(do_not_specialize=["blocks", "rank"])
def _quantile_kernel(
    x_ptr,
    selection_ptr,
    bound_ptr,
    size,
    blocks,
    rank,
    weight,
    floor,
    ceiling,
    SELECTION: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, offs, mask = locate(size, blocks, BLOCK)
    x = tl.load(x_ptr + sample * size + offs, mask=mask, other=0.0).to(tl.float32)
    selection_ptr += sample * SELECTION
    bound_ptr += sample
    narrow(
        magnitude(x), mask, selection_ptr, bound_ptr, size, blocks, rank, weight, floor, ceiling, SHIFT=SHIFT, BITS=BITS
    )


def launch_pass(index, x, selection, bound, rank, config=None):
    """Pass `index` of `PASSES`; arguments as `launch_quantile`."""
    size = x[0].numel()
    config = config or launch_config(size, len(x))
    blocks = -(-size // config.block)
    shift, bits = PASSES[index]
    _quantile_kernel[(len(x) * blocks,)](
        x,
        selection,
        bound,
        size,
        blocks,
        # The last three as float32 scalars: they are the same in every step of a run.
        *rank,
        SELECTION=SELECTION,
        SHIFT=shift,
        BITS=bits,
        BLOCK=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )


def launch_quantile(x, selection, bound, rank, config=None, first=0):
    """Write float32 `bound` [B].

    Args:
        x: [B, ...], contiguous, at most 2**24 elements in a sample.
        selection: int32 [B, SELECTION]: zeros, or left by an earlier quantile.
        bound: the bound.
        rank: a `QuantileRank`, as in `narrow`, the same for every sample.
        config: a `LaunchConfig`; by default `launch_config`'s.
        first: the first pass to run, if an earlier kernel ran the passes before.
    """
    for index in range(first, len(PASSES)):
        launch_pass(index, x, selection, bound, rank, config)
