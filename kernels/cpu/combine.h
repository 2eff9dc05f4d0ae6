/* Sums of the same tensors (`fastcfg.combination.Combination`), and the tensors of a call. */
#pragma once
#include "convert.h"

enum { MOST_INPUTS = 12, MOST_OUTPUTS = 6, MOST_TERMS = MOST_INPUTS + 1 };
enum { NO_CLIP, CLIP, THRESHOLD };

/* The terms in turn, each an input (`MOST_INPUTS`: x0) and its coefficient, then the factor of the whole sum. */
typedef struct {
    int32_t terms, inputs[MOST_TERMS];
    float coefficients[MOST_TERMS], factor;
} Sum;

/* Packed by `fastcfg.ops.native_combine`, as is the layout. */
typedef struct {
    int32_t inputs, outputs, used; /* used: a bit for each input that is read */
    int32_t has_x0, clip, noise;   /* noise: the input with the learned coefficient; -1: none */
    float bound, l_0, l_v, floor, ceiling;
    Sum x0, sums[MOST_OUTPUTS];
} Combination;

typedef struct {
    int64_t batch, size, stride; /* samples, elements of one, and those between two of the model's output (input 1) */
    int64_t variance;            /* bytes from the model's output to its variance channels */
    int64_t rank;                /* of the threshold's bound, as in select.h */
    float share;
    int32_t from_high, exact;
    int32_t dtypes[MOST_INPUTS], results[MOST_OUTPUTS];
} Layout;

typedef struct {
    const void *inputs[MOST_INPUTS];
    void *results[MOST_OUTPUTS];
} Addresses;

typedef void CombineRun(const Combination *, const Layout *, const Addresses *);
