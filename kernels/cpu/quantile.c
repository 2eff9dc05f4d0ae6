/* A quantile of every sample's magnitudes by radix selection on their bits, which are ordered as they are.
 *
 * The first pass counts leading bits; those magnitudes that begin as the one sought are kept, and counted on. */
#include "quantile.h"

#include <math.h>
#include <string.h>

/* Bits of each digit of a magnitude's 31, from the highest. */
#define FIRST_BITS 11
#define BITS 10
#define FIRST (1 << FIRST_BITS)
#define FIRST_SHIFT (31 - FIRST_BITS)
#define INFINITE 0x7f800000u

static uint32_t magnitude(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
}

static float as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static int has_nan(const float *x, int64_t size)
{
    for (int64_t i = 0; i < size; i++)
        if (magnitude(x[i]) > INFINITE)
            return 1;
    return 0;
}

/* The bits of a magnitude from `shift` on, as many as a digit has. */
static uint32_t digit_of(uint32_t value, int shift) { return value >> shift & ((1 << BITS) - 1); }

/* 1 if equal, else 0, without a branch, which would be predicted wrongly once for each that is kept. */
static int64_t equal(uint32_t a, uint32_t b) { return (int64_t)(((uint64_t)(a ^ b) - 1) >> 63); }

/* The digit at which the counts reach the rank, which becomes the rank among those with it. */
static uint32_t take_digit(const uint32_t *counts, int64_t *rank)
{
    uint32_t digit = 0;
    while (*rank >= counts[digit])
        *rank -= counts[digit++];
    return digit;
}

/* The least magnitude from `from` on. */
static uint32_t least(const float *x, int64_t size, uint32_t from)
{
    uint32_t found = INFINITE;
    for (int64_t i = 0; i < size; i++) {
        const uint32_t value = magnitude(x[i]);
        found = value >= from && value < found ? value : found;
    }
    return found;
}

/* The magnitude of a rank among `count`, which begin alike down to the bit `shift`, and where that is the last of them
 * `*next`: else the one that follows is written there. The magnitudes are overwritten. */
static uint32_t select_among(uint32_t *values, int64_t count, int64_t rank, int shift, uint32_t *next)
{
    uint32_t counts[1 << BITS];
    while (shift && count > 1) {
        shift -= BITS;
        memset(counts, 0, sizeof counts);
        for (int64_t i = 0; i < count; i++)
            counts[digit_of(values[i], shift)]++;
        const uint32_t digit = take_digit(counts, &rank);
        if (rank + 1 == counts[digit]) {
            uint32_t following = *next;
            for (int64_t i = 0; i < count; i++)
                if (digit_of(values[i], shift) > digit && values[i] < following)
                    following = values[i];
            *next = following;
        }
        int64_t kept = 0;
        for (int64_t i = 0; i < count; i++) {
            values[kept] = values[i];
            kept += equal(digit_of(values[i], shift), digit);
        }
        count = kept;
    }
    if (rank + 1 < count)
        *next = values[0];
    return values[0];
}

static float quantile_bound(const float *x, int64_t size, const Rank *r, uint32_t *scratch)
{
    /* Two tables: a magnitude that begins as the one before does not wait for its count. */
    uint32_t counts[FIRST] = {0}, others[FIRST] = {0};
    int64_t i = 0;
    for (; i + 2 <= size; i += 2) {
        counts[magnitude(x[i]) >> FIRST_SHIFT]++;
        others[magnitude(x[i + 1]) >> FIRST_SHIFT]++;
    }
    if (i < size)
        counts[magnitude(x[i]) >> FIRST_SHIFT]++;
    for (int digit = 0; digit < FIRST; digit++)
        counts[digit] += others[digit];
    uint32_t beyond = 0;
    for (int digit = INFINITE >> FIRST_SHIFT; digit < FIRST; digit++)
        beyond += counts[digit];
    if (beyond && has_nan(x, size))
        return as_float(0x7fc00000);

    int64_t rank = r->rank, kept = 0;
    const uint32_t first = take_digit(counts, &rank);
    for (i = 0; i < size; i++) {
        const uint32_t value = magnitude(x[i]);
        scratch[kept] = value;
        kept += equal(value >> FIRST_SHIFT, first);
    }
    uint32_t next = rank + 1 < kept || r->is_exact ? UINT32_MAX : least(x, size, (first + 1) << FIRST_SHIFT);
    const uint32_t found = select_among(scratch, kept, rank, FIRST_SHIFT, &next);
    const float low = as_float(found), high = r->is_exact ? low : as_float(next);
    const float bound = fmaf(r->share, high - low, r->from_next ? high : low);
    const float raised = bound < r->floor ? r->floor : bound;
    return raised > r->ceiling ? r->ceiling : raised;
}

void quantile_bounds(const float *x, int64_t samples, int64_t size, const Rank *rank, uint32_t *scratch, float *bounds)
{
    for (int64_t b = 0; b < samples; b++)
        bounds[b] = quantile_bound(x + b * size, size, rank, scratch);
}
