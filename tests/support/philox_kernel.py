"""A kernel that runs the generator's ten rounds and nothing else."""

import triton
import triton.language as tl

from fastcfg.kernels._math import philox4x32


@triton.jit
def philox_kernel(counter_ptr, key_ptr, out_ptr, BLOCK: tl.constexpr):
    """Words of 32 bits in int64 tensors: counters [4, BLOCK], keys [2, BLOCK] -> [4, BLOCK]."""
    offs = tl.arange(0, BLOCK)
    c0 = tl.load(counter_ptr + offs).to(tl.uint32)
    c1 = tl.load(counter_ptr + BLOCK + offs).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * BLOCK + offs).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * BLOCK + offs).to(tl.uint32)
    k0 = tl.load(key_ptr + offs).to(tl.uint32)
    k1 = tl.load(key_ptr + BLOCK + offs).to(tl.uint32)
    r0, r1, r2, r3 = philox4x32(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + offs, r0.to(tl.int64))
    tl.store(out_ptr + BLOCK + offs, r1.to(tl.int64))
    tl.store(out_ptr + 2 * BLOCK + offs, r2.to(tl.int64))
    tl.store(out_ptr + 3 * BLOCK + offs, r3.to(tl.int64))
