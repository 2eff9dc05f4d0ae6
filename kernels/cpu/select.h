/* A quantile of a sample's magnitudes by radix selection on their bits, which are ordered as they are.
 *
 * Three passes over all magnitudes, each counting one digit of those that begin with the digits found so far. Mirrors
 * `fastcfg.reference.quantile.quantile_bound`. */
#pragma once
#include "convert.h"

enum { SELECT_PASSES = 3, SELECT_COUNTS = 2048 };
static const struct { int shift, bits; } DIGITS[SELECT_PASSES] = {{20, 11}, {10, 10}, {0, 10}};

typedef struct {
    int64_t rank;                      /* among the magnitudes that begin with the digits found, from 0 */
    uint32_t found, largest, beyond;   /* those digits; the largest magnitude; the least beyond all that begin so */
    uint32_t counts[SELECT_COUNTS];
} Selection;

static void count_digits(Selection *s, int pass, const float *x, int64_t count)
{
    const int shift = DIGITS[pass].shift, bits = DIGITS[pass].bits;
    const uint32_t mask = (1u << bits) - 1;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t magnitude = as_bits(x[i]) & 0x7fffffff, leading = magnitude >> shift >> bits;
        s->largest = magnitude > s->largest ? magnitude : s->largest;
        if (leading == s->found)
            s->counts[(magnitude >> shift) & mask]++;
        else if (leading > s->found && magnitude < s->beyond)
            s->beyond = magnitude;
    }
}

/* After a pass: the next digit, which is appended to those found. */
static void take_digit(Selection *s, int pass)
{
    uint32_t digit = 0;
    while (s->rank >= s->counts[digit])
        s->rank -= s->counts[digit++];
    s->found = s->found << DIGITS[pass].bits | digit;
}

/* After the last pass: the magnitude that follows the one found, or is as large. */
static uint32_t following(const Selection *s)
{
    const uint32_t mask = (1u << DIGITS[SELECT_PASSES - 1].bits) - 1, digit = s->found & mask;
    if (s->rank + 1 < s->counts[digit])
        return s->found;
    for (uint32_t next = digit + 1; next <= mask; next++)
        if (s->counts[next])
            return (s->found & ~mask) | next;
    return s->beyond;
}

/* torch.lerp with one rounding, limited: `share` is of the way from the magnitude found to the next one, or where
 * `from_high` is set its distance from 1. */
static float selected_bound(const Selection *s, float share, int from_high, int exact, float floor, float ceiling)
{
    if (s->largest > 255u << 23)
        return as_float(0x7fc00000);
    const float low = as_float(s->found), high = exact ? low : as_float(following(s));
    const float bound = __builtin_fmaf(share, high - low, from_high ? high : low);
    const float raised = bound < floor ? floor : bound;
    return raised > ceiling ? ceiling : raised;
}
