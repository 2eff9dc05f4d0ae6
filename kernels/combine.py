"""Several sums of the same tensors in one pass: what a step of a scheduler makes of its sample, the model's output and
the tensors it kept.

Bytes per element in float32: 4 for every input that any sum uses, 4 for every output; a DDIM step that also returns x0
moves 8 + 8.
"""

import triton
import triton.language as tl

from ._layout import locate
from ._math import clip
from .guided_step import LaunchConfig, launch_config

MAX_INPUTS = 8
MAX_OUTPUTS = 4

# Which terms a sum has, and in which order, is one number: a digit of 4 bits for each, the first term's lowest: the
# input (MAX_INPUTS for x0) plus 1. Its coefficients are a row of the table, followed by the factor of the whole sum.
_FACTOR = tl.constexpr(MAX_INPUTS + 1)
ROW = MAX_INPUTS + 2
_ROW = tl.constexpr(ROW)
# Rows: an output each, x0, and these numbers.
_OF_X0 = tl.constexpr(MAX_OUTPUTS)
_BOUND = tl.constexpr((MAX_OUTPUTS + 1) * ROW)
_L_0 = tl.constexpr((MAX_OUTPUTS + 1) * ROW + 1)
_L_V = tl.constexpr((MAX_OUTPUTS + 1) * ROW + 2)
SIZE = (MAX_OUTPUTS + 1) * ROW + 3


def encode(total, num_inputs):
    """The number of a sum's terms."""
    places = (MAX_INPUTS if index == num_inputs else index for index, _ in total.terms)
    return sum((place + 1) << (4 * k) for k, place in enumerate(places))


@triton.jit
def load(ptr, mask, USED: tl.constexpr, BLOCK: tl.constexpr):
    """The values at `ptr` in float32; zeros, and no load, where they are not used."""
    if USED:
        v = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    else:
        v = tl.zeros((BLOCK,), tl.float32)
    return v


@triton.jit
def pick(PLACE: tl.constexpr, v0, v1, v2, v3, v4, v5, v6, v7, x0):
    """The value at a place, counted from 1."""
    if PLACE == 1:
        v = v0
    elif PLACE == 2:
        v = v1
    elif PLACE == 3:
        v = v2
    elif PLACE == 4:
        v = v3
    elif PLACE == 5:
        v = v4
    elif PLACE == 6:
        v = v5
    elif PLACE == 7:
        v = v6
    elif PLACE == 8:
        v = v7
    else:
        v = x0
    return v


@triton.jit
def add_up(row_ptr, TERMS: tl.constexpr, FACTOR: tl.constexpr, v0, v1, v2, v3, v4, v5, v6, v7, x0):
    """The sum of a row's terms, times its factor."""
    zeros = tl.zeros_like(v0)
    y = zeros
    if TERMS:
        y = tl.load(row_ptr) * pick(TERMS & 15, v0, v1, v2, v3, v4, v5, v6, v7, x0)
    for k in tl.static_range(1, _FACTOR):
        if (TERMS >> (4 * k)) & 15:
            v = pick((TERMS >> (4 * k)) & 15, v0, v1, v2, v3, v4, v5, v6, v7, x0)
            y = tl.fma(tl.load(row_ptr + k) + zeros, v, y)
    if FACTOR:
        y = y * tl.load(row_ptr + _FACTOR)
    return y


@triton.jit(do_not_specialize=["blocks"])
def _combine_kernel(
    v0_ptr,
    v1_ptr,
    v2_ptr,
    v3_ptr,
    v4_ptr,
    v5_ptr,
    v6_ptr,
    v7_ptr,
    x0_ptr,
    variance_ptr,
    y0_ptr,
    y1_ptr,
    y2_ptr,
    y3_ptr,
    table_ptr,
    size,
    output_stride,
    blocks,
    USED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TERMS0: tl.constexpr,
    TERMS1: tl.constexpr,
    TERMS2: tl.constexpr,
    TERMS3: tl.constexpr,
    X0_TERMS: tl.constexpr,
    FACTORS: tl.constexpr,
    X0_GIVEN: tl.constexpr,
    CLIP: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, offs, mask = locate(size, blocks, BLOCK)
    output_offs = sample * output_stride + offs
    offs = sample * size + offs
    v0 = load(v0_ptr + offs, mask, USED & 1, BLOCK)
    v1 = load(v1_ptr + output_offs, mask, (USED >> 1) & 1, BLOCK)
    v2 = load(v2_ptr + offs, mask, (USED >> 2) & 1, BLOCK)
    v3 = load(v3_ptr + offs, mask, (USED >> 3) & 1, BLOCK)
    v4 = load(v4_ptr + offs, mask, (USED >> 4) & 1, BLOCK)
    v5 = load(v5_ptr + offs, mask, (USED >> 5) & 1, BLOCK)
    v6 = load(v6_ptr + offs, mask, (USED >> 6) & 1, BLOCK)
    v7 = load(v7_ptr + offs, mask, (USED >> 7) & 1, BLOCK)
    x0 = load(x0_ptr + offs, mask, X0_GIVEN, BLOCK)

    if X0_TERMS:
        row_ptr = table_ptr + _OF_X0 * _ROW
        x0 = add_up(row_ptr, X0_TERMS, (FACTORS >> 4) & 1, v0, v1, v2, v3, v4, v5, v6, v7, x0)
    if CLIP:
        x0 = clip(x0, tl.load(table_ptr + _BOUND))

    y0 = add_up(table_ptr, TERMS0, FACTORS & 1, v0, v1, v2, v3, v4, v5, v6, v7, x0)
    if NOISE:
        v = tl.load(variance_ptr + output_offs, mask=mask, other=0.0).to(tl.float32)
        exponent = tl.fma(tl.load(table_ptr + _L_V) + tl.zeros_like(v), v, tl.load(table_ptr + _L_0) + tl.zeros_like(v))
        y0 = tl.fma(tl.exp2(exponent), pick(NOISE, v0, v1, v2, v3, v4, v5, v6, v7, x0), y0)
    if OUTPUTS > 1:
        y1 = add_up(table_ptr + _ROW, TERMS1, (FACTORS >> 1) & 1, v0, v1, v2, v3, v4, v5, v6, v7, x0)
    if OUTPUTS > 2:
        y2 = add_up(table_ptr + 2 * _ROW, TERMS2, (FACTORS >> 2) & 1, v0, v1, v2, v3, v4, v5, v6, v7, x0)
    if OUTPUTS > 3:
        y3 = add_up(table_ptr + 3 * _ROW, TERMS3, (FACTORS >> 3) & 1, v0, v1, v2, v3, v4, v5, v6, v7, x0)
    # Stored last: the compiler moves no load of a coefficient up past a store.
    tl.store(y0_ptr + offs, y0.to(y0_ptr.dtype.element_ty), mask=mask)
    if OUTPUTS > 1:
        tl.store(y1_ptr + offs, y1.to(y1_ptr.dtype.element_ty), mask=mask)
    if OUTPUTS > 2:
        tl.store(y2_ptr + offs, y2.to(y2_ptr.dtype.element_ty), mask=mask)
    if OUTPUTS > 3:
        tl.store(y3_ptr + offs, y3.to(y3_ptr.dtype.element_ty), mask=mask)


def combine_config(size, batch):
    """The configuration for `batch` samples of `size` elements: eight inputs leave no room for 16 elements a thread."""
    config = launch_config(size, batch)
    return LaunchConfig(min(config.block, 1024), config.num_warps)


def combine_options(num_inputs, sums, x0, clipped, x0_given, noise):
    """What of a combination is compiled into the kernel, as its keyword arguments.

    Args:
        num_inputs: N, up to `MAX_INPUTS`.
        sums: a `Sum` for each output.
        x0: the `Sum` that x0 is; None without x0, and where it is given.
        clipped: whether x0 is clipped.
        x0_given: whether x0 is read.
        noise: the input that output 0 takes with its learned coefficient, or None.
    """
    rows = _rows(sums, x0)
    encoded = {row: encode(total, num_inputs) for row, total in rows.items()}
    used = {index for total in rows.values() for index, _ in total.terms} | ({noise} - {None})
    return {
        "USED": sum(1 << index for index in used if index < num_inputs),
        "OUTPUTS": len(sums),
        **{f"TERMS{j}": encoded.get(j, 0) for j in range(MAX_OUTPUTS)},
        "X0_TERMS": encoded.get(MAX_OUTPUTS, 0),
        "FACTORS": sum((total.factor != 1) << row for row, total in rows.items()),
        "X0_GIVEN": x0_given,
        "CLIP": clipped,
        "NOISE": 0 if noise is None else noise + 1,
    }


def _rows(sums, x0):
    """The sums by their rows of the table."""
    return dict(enumerate(sums)) | ({} if x0 is None else {MAX_OUTPUTS: x0})


def combine_table(sums, x0, bound, l_0, l_v):
    """The numbers of a combination, `SIZE` of them: of its sums as in `combine_options`, its clip bound or None, l_0
    and l_v."""
    table = [0.0] * SIZE
    for row, total in _rows(sums, x0).items():
        for place, (_, coefficient) in enumerate(total.terms):
            table[row * ROW + place] = coefficient
        table[row * ROW + MAX_INPUTS + 1] = total.factor
    table[-3:] = [0.0 if bound is None else bound, l_0, l_v]
    return table


def launch_combine(inputs, x0, variance, results, table, options, config=None):
    """Write the results; `ops` has checked shapes, dtypes and devices.

    Args:
        inputs: 1 to 8, float32, float16 or bfloat16, of one shape and dense in one layout. Only the model's output (the
            second) may have gaps between samples, where the layout is contiguous.
        x0: like the inputs; None if it is computed or not used.
        variance: like the model's output, with its strides; None without learned variances.
        results: 1 to 4, like the inputs.
        table: float32 [SIZE], `combine_table`.
        options: `combine_options`.
        config: a `LaunchConfig`; by default `combine_config`'s.
    """
    first, output = inputs[0], inputs[1] if len(inputs) > 1 else inputs[0]
    rows, size = 1, first.numel()
    stride = size
    if len(first) > 1 and output.stride(0) != first.stride(0):
        rows, size, stride = len(first), size // len(first), output.stride(0)
    config = config or combine_config(size, rows)
    blocks = -(-size // config.block)
    _combine_kernel[(rows * blocks,)](
        *inputs,
        *[first] * (MAX_INPUTS - len(inputs)),
        first if x0 is None else x0,
        first if variance is None else variance,
        *results,
        *[first] * (MAX_OUTPUTS - len(results)),
        table,
        size,
        stride,
        blocks,
        **options,
        BLOCK=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
