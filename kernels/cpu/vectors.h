/* Vectors in the notation of GCC and Clang: arithmetic, comparisons and shifts are the compiler's operators. */
#pragma once
#include <stdint.h>
#include <string.h>

#define VECTOR(type, bytes) typedef type __attribute__((vector_size(bytes)))
VECTOR(float, 16) f32x4;
VECTOR(float, 32) f32x8;
VECTOR(float, 64) f32x16;
VECTOR(int32_t, 16) i32x4;
VECTOR(int32_t, 32) i32x8;
VECTOR(int32_t, 64) i32x16;
VECTOR(uint32_t, 16) u32x4;
VECTOR(uint32_t, 32) u32x8;
VECTOR(uint32_t, 64) u32x16;
VECTOR(uint16_t, 8) u16x4;
VECTOR(uint16_t, 16) u16x8;
VECTOR(uint16_t, 32) u16x16;
VECTOR(uint64_t, 16) u64x2;
VECTOR(uint64_t, 32) u64x4;
VECTOR(uint64_t, 64) u64x8;

/* The instruction sets: numbers that the preprocessor compares. */
#define BASELINE 0
#define AVX2 1
#define AVX512 2

/* Within a set's functions: its own name, and what may have arguments as wide as its registers. */
#define JOIN_(name, set) name##_##set
#define JOIN(name, set) JOIN_(name, set)
#define NAME(name) JOIN(name, SET_NAME)
#define INLINE TARGET static inline __attribute__((always_inline))

/* All lanes of a number: subtracting zero keeps the sign of one. */
#define ALL(c) ((c) - (F){0})
