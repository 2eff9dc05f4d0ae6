/* Multiply-add of floats for x86-64 without the instruction: a*b + c, rounded once. */
#pragma once
#include <emmintrin.h>

#include "vectors.h"

VECTOR(double, 16) f64x2;
VECTOR(int64_t, 16) i64x2;

/* product + c rounded to odd: of the two neighbours of an inexact sum, the one whose last bit is set. With the double's
 * 29 bits more than a float's, rounding that to a float is rounding the exact sum. */
static inline f64x2 sum_to_odd(f64x2 product, f64x2 c)
{
    const f64x2 sum = product + c, part = sum - product;
    /* What rounding took from the sum (Knuth), times the sum for the direction; NaN where that is infinite. */
    const f64x2 error = ((product - (sum - part)) + (c - part)) * sum;
    const i64x2 bits = (i64x2)sum, is_even = (bits & 1) - 1;
    return (f64x2)(bits + (((i64x2)(error < 0) - (i64x2)(error > 0)) & is_even));
}

/* Products of floats are exact in double. */
#define WIDE(v) (f64x2) _mm_cvtps_pd((__m128)(v))
#define HIGH(v) _mm_movehl_ps((__m128)(v), (__m128)(v))
#define FLOATS(low, high) (f32x4) _mm_movelh_ps(_mm_cvtpd_ps((__m128d)(low)), _mm_cvtpd_ps((__m128d)(high)))

static inline f32x4 fma_sse2(f32x4 a, f32x4 b, f32x4 c)
{
    const f64x2 low = sum_to_odd(WIDE(a) * WIDE(b), WIDE(c));
    const f64x2 high = sum_to_odd(WIDE(HIGH(a)) * WIDE(HIGH(b)), WIDE(HIGH(c)));
    return FLOATS(low, high);
}

/* The sum is rounded to double first. */
static inline f32x4 near_fma_sse2(f32x4 a, f32x4 b, f32x4 c)
{
    return FLOATS(WIDE(a) * WIDE(b) + WIDE(c), WIDE(HIGH(a)) * WIDE(HIGH(b)) + WIDE(HIGH(c)));
}
#undef WIDE
#undef HIGH
#undef FLOATS
