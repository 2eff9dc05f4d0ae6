/* 2**x in float32, within 1.2 ulp; NaN, infinities, overflow and denormal results as usual. */
#pragma once
#include "convert.h"

ANY_INLINE float exp2_of(float x)
{
    /* Beyond these all results are 0 or infinity; comparisons leave NaN as it is. */
    const float low = x < -151.0f ? -151.0f : x, limited = low > 129.0f ? 129.0f : low;
    /* The sum's last place is 1: its low bits are the nearest integer. */
    const float shifted = limited + 0x1.8p23f, rest = limited - (shifted - 0x1.8p23f);
    const int32_t n = (int32_t)(as_bits(shifted) - as_bits(0x1.8p23f)), half = n >> 1;
    /* Minimax over [-1/2, 1/2], to 2**-28.9. */
    float y = 0x1.41fbbcp-13f;
    y = __builtin_fmaf(y, rest, 0x1.5f3e54p-10f);
    y = __builtin_fmaf(y, rest, 0x1.3b2d4cp-7f);
    y = __builtin_fmaf(y, rest, 0x1.c6aee8p-5f);
    y = __builtin_fmaf(y, rest, 0x1.ebfbdcp-3f);
    y = __builtin_fmaf(y, rest, 0x1.62e430p-1f);
    y = __builtin_fmaf(y, rest, 1.0f);
    /* Two factors, each a normal number: the product rounds once, also where it is denormal. */
    const float first = as_float((uint32_t)(half + 127) << 23), second = as_float((uint32_t)(n - half + 127) << 23);
    return y * first * second;
}
