/* float16 and bfloat16 to float32 and back, with the bits of torch: to the nearest, ties to even, on any instruction
 * set. Written for vectors: no branches, and no float32 that a CPU set to flush denormals would change. */
#pragma once
#include <stdint.h>
#include <string.h>

enum { FLOAT32, FLOAT16, BFLOAT16 };

/* Of no set: inlined into functions of any. */
#define ANY_INLINE static inline __attribute__((always_inline))

ANY_INLINE float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

ANY_INLINE uint32_t as_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

ANY_INLINE float from_bfloat16(uint16_t bits) { return as_float((uint32_t)bits << 16); }

ANY_INLINE uint16_t to_bfloat16(float value)
{
    const uint32_t bits = as_bits(value), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : rounded);
}

ANY_INLINE float from_float16(uint16_t bits)
{
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = (uint32_t)(bits & 0x7fff) << 13;
    const uint32_t exponent = magnitude & (0x1fu << 23);
    /* The exponent's bias is 127 instead of 15; that of infinity and NaN is the largest. */
    const uint32_t normal = magnitude + (112u << 23) + (exponent == 0x1fu << 23 ? 112u << 23 : 0);
    const float denormal = as_float(magnitude + (113u << 23)) - as_float(113u << 23);
    return as_float((exponent ? normal : as_bits(denormal)) | sign);
}

ANY_INLINE uint16_t to_float16(float value)
{
    const uint32_t bits = as_bits(value), sign = bits & 0x80000000u, magnitude = bits ^ sign;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    /* The sum's last place is that of the smallest float16: the addition rounds. */
    const uint32_t denormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    const uint32_t beyond = magnitude > 255u << 23 ? 0x7e00 : 0x7c00;
    const uint32_t finite = magnitude < 113u << 23 ? denormal : normal;
    return (uint16_t)((magnitude >= 143u << 23 ? beyond : finite) | sign >> 16);
}
