/* What works on a run's buffers between its rows: a change of the state, Brownian noise, the sums of a
 * log-probability. */
#pragma once
#include <stdint.h>

/* As in `fastcfg.state_change`: where normals come from, if not from a stream, and the columns of a row. */
enum { NO_NORMALS = -2, FROM_TENSOR = -1 };
enum { SIGNAL, NOISE, GATE, KEPT, ADDED, KNOWN_WIDTH };

/* In the order that `fastcfg.ops.native_rows` packs, as below. */
typedef struct {
    const float *new;
    float *x, *model_input;
    const float *table;
    const int32_t *counter;
    const int64_t *seeds;
    void *time;
    const float *image, *hold, *rows, *given, *again; /* the last two: normals of known pixels and of re-noising */
    int64_t before, known, hard, noise, renoise;      /* the fields of `StateSpec` */
    int64_t batch, size, slots, time_is_int;
} StateChange;

typedef struct {
    const float *noise, *variance; /* NULL to draw from the seeds; NULL for none */
    const int64_t *seeds;
    const int32_t *counter;
    double *sums;                  /* [R, 2, B] */
    int64_t batch, size, stride;   /* elements between two samples' variance channels */
    int64_t stream;
} NoiseSums;

typedef struct {
    const int64_t *seeds, *nodes;
    const float *factors;
    float *out;
    int64_t batch, size, terms, stream;
} Brownian;
