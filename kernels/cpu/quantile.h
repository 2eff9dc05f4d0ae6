/* Quantiles of magnitudes. */
#pragma once
#include <stdint.h>

/* Of all samples. */
typedef struct {
    int64_t rank;               /* counted from 0: the magnitude that the bound begins at */
    float share;                /* of the way from there to the next one, added to the first (or to the second) */
    int from_next, is_exact;    /* whether to the second; whether the bound is that magnitude itself */
    float floor, ceiling;
} Rank;

/* Writes the bounds [samples] of dynamic thresholding: `fastcfg.reference.quantile.quantile_bound`. Scratch has room
 * for a sample. */
void quantile_bounds(const float *x, int64_t samples, int64_t size, const Rank *rank, uint32_t *scratch, float *bounds);
