"""Value functions shared by the kernels: no loads, no stores.

They mirror `fastcfg.reference` operation by operation. Multiply-adds are explicit `tl.fma` and kernels are launched
with contraction off: the compiler rounds where these lines round and nowhere else.
"""

import triton
import triton.language as tl


@triton.jit
def clip(x, bound):
    """x limited to [-bound, bound]; NaN stays NaN."""
    low = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def threshold(x, bound):
    """x limited to [-bound, bound], then divided by the bound, correctly rounded."""
    return tl.div_rn(clip(x, bound), bound + tl.zeros_like(x))


@triton.jit
def predict_x0(x, m, p_x, p_m):
    """p_x*x + p_m*m for scalar coefficients."""
    return tl.fma(p_x + tl.zeros_like(x), x, p_m * m)


@triton.jit
def predict_x0_closely(x, m, p_x, p_m, p_x_rest, p_m_rest):
    """`predict_x0` for coefficients in two parts: a rest is what rounding took from the first part."""
    zeros = tl.zeros_like(x)
    rest = tl.fma(p_x_rest + zeros, x, p_m_rest * m)
    return tl.fma(p_x + zeros, x, tl.fma(p_m + zeros, m, rest))


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds of Philox4x32 on uint32 values."""
    for _ in tl.static_range(10):
        # One widening multiply gives both words.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(radius_word, angle_word):
    """Two float32 normals from two uint32 words; the constants are those of `fastcfg.reference.philox`."""
    u = tl.fma(radius_word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    log = tl.fma(tl.full(t.shape, 0.20213566720485687, tl.float32), t, -0.3244510889053345)
    log = tl.fma(log, t, 0.34501707553863525)
    log = tl.fma(log, t, -0.39800339937210083)
    log = tl.fma(log, t, 0.4993981420993805)
    log = tl.fma(log, t, -0.6667011976242065)
    log = tl.fma(log, t, 1.0000072717666626)
    log = tl.fma(log, t, -1.9999998807907104)
    radius = tl.sqrt_rn(tl.fma(exponent.to(tl.float32), -1.3862943649291992, t * log))

    a = angle_word.to(tl.int32, bitcast=True).to(tl.float32) * 3.65729529994141e-10
    square = a * a
    sin = tl.fma(tl.full(a.shape, -0.00019501821952871978, tl.float32), square, 0.008332016877830029)
    sin = tl.fma(sin, square, -0.16666650772094727)
    sin = a * tl.fma(sin, square, 1.0)
    cos = tl.fma(tl.full(a.shape, -0.0013579403748735785, tl.float32), square, 0.04165441915392876)
    cos = tl.fma(cos, square, -0.49999842047691345)
    cos = tl.fma(cos, square, 0.9999999403953552)
    mirrored = (angle_word & 1) != 0
    sign = (angle_word << 30) & 0x80000000
    radius = (radius.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return tl.where(mirrored, sin, cos) * radius, tl.where(mirrored, cos, sin) * radius


@triton.jit
def normal4(group, row, stream, seed):
    """[G, 4] float32 normals of the elements 4*group ... 4*group + 3, for uint32 [G] groups and a scalar int64 seed."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    zero = tl.zeros_like(group)
    r0, r1, r2, r3 = philox4x32(group, zero + row.to(tl.uint32), zero + stream, zero, k0, k1)
    z0, z1 = box_muller(r0, r1)
    z2, z3 = box_muller(r2, r3)
    # The four columns are in one thread's registers: these selections cost nothing.
    column = tl.arange(0, 4)[None, :]
    low = tl.where(column == 0, z0[:, None], z1[:, None])
    high = tl.where(column == 2, z2[:, None], z3[:, None])
    return tl.where(column < 2, low, high)
