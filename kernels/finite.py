"""Whether a row left numbers that are not finite: the model's outputs and the state in one pass, and none in rows that
are not checked.

Bytes per element with float32 state and a bfloat16 model, K = 2, learned variance: x 4 + outputs 2*2*2 read = 12.
"""

import triton
import triton.language as tl

from ._layout import BLOCK, blocks_per_sample, locate


@triton.jit
def _note(values, mask, record_ptr, code):
    """Lower the record to a code if some value is not finite: if its exponent has all bits."""
    bits = values.to(tl.float32).to(tl.int32, bitcast=True)
    bad = ((bits & 0x7F800000) == 0x7F800000) & mask
    if tl.max(bad.to(tl.int32), axis=0) > 0:
        tl.atomic_min(record_ptr, code)


@triton.jit(do_not_specialize=["batch", "blocks", "every"])
def _finite_kernel(
    x_ptr,
    output_ptr,
    counter_ptr,
    sources_ptr,
    record_ptr,
    batch,
    size,
    blocks,
    every,
    BRANCHES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.load(counter_ptr) - 1
    if (row + 1) % every == 0:
        sample, offs, mask = locate(size, blocks, BLOCK)
        first = row.to(tl.int64) * (tl.load(sources_ptr + BRANCHES) + 1)
        for k in tl.static_range(BRANCHES):
            code = (first + tl.load(sources_ptr + k)) * batch + sample
            for part in tl.static_range(PARTS):
                place = ((k * batch + sample) * PARTS + part) * size
                _note(tl.load(output_ptr + place + offs, mask=mask, other=0.0), mask, record_ptr, code)
        code = (first + tl.load(sources_ptr + BRANCHES)) * batch + sample
        _note(tl.load(x_ptr + sample * size + offs, mask=mask, other=0.0), mask, record_ptr, code)


def launch_finite(output, x, counter, sources, record, every):
    """Lower `record`, int64 [1], to the first code of a sample with NaN or infinity; see
    `fastcfg.reference.finite.ReferenceFiniteCheck` for the arguments. The output is contiguous or channels-last."""
    size = x[0].numel()
    blocks = blocks_per_sample(size)
    _finite_kernel[(len(x) * blocks,)](
        x,
        output,
        counter,
        sources,
        record,
        len(x),
        size,
        blocks,
        every,
        BRANCHES=len(output) // len(x),
        PARTS=output[0].numel() // size,
        BLOCK=BLOCK,
    )
