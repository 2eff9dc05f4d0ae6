/* The pieces of the step, each on contiguous float32 tensors: blended outputs, predicted x0, limited x0. */
#pragma once
#include "quantile.h"

/* In the order that `fastcfg.ops.native_pieces` packs, as below. What is not used is NULL. */
typedef struct {
    const float *output, *weights, *momentum;
    float *m;                       /* the result; not used in a StepBound */
    int64_t batch, size, stride;    /* samples, elements of one, and of one of the output */
    int64_t branches, base, scaled; /* base: -1 for none */
} Blend;

typedef struct {
    const float *x, *m;
    const float *p_x, *p_m, *p_x_rest, *p_m_rest, *bound; /* by sample */
    float *x0;
    int64_t batch, size;
} Predict;

typedef struct {
    const float *x0, *bound;
    float *out;
    int64_t batch, size;
} Threshold;

/* The bound of x0 in a run's next row. */
typedef struct {
    Blend blend;
    Rank rank;
    const float *x, *table;
    const int32_t *counter;
    float *x0, *bound;
    uint32_t *scratch;
} StepBound;

typedef void StepBoundRun(const StepBound *);
