/* What a guided step works on: one row of a table applied to a float32 state. */
#pragma once
#include "convert.h"

#include <stdint.h>

/* Columns of `fastcfg.table.DEVICE_COLUMNS`, in order (a test compares the two). */
enum {
    C_IN, T, P_X, P_M, A_X, A_0, A_M, A_U, A_H0, A_H1, A_H2, S, L_0, L_V, K_X, K_0, K_M, SLOT, P_G, A_G,
    P_X_REST, P_M_REST, A_X_REST, WIDTH
};

enum { TIME_FLOAT32, TIME_INT64, TIME_FLOAT64 };
/* How a chunk's elements lie: in any way; a whole chunk beside each other; and so in float32. */
enum { ANY, WHOLE, PLAIN };
enum { NO_NOISE, TENSOR, PHILOX };
enum { STEP_STREAM = 1 }; /* of Philox */
enum { BY_SAMPLE, BY_CHANNEL, BY_ELEMENT };

/* What is the same in every row of a run, int64 each: `fastcfg.ops.native` packs them in this order, and then the
 * addresses of the tensors that stay, NULL for those that are not used. */
typedef struct {
    int64_t batch, channels, size; /* samples, and channels and elements of one */
    int64_t output_channels;       /* with variance channels twice as many */
    int64_t output_dtype, output_last, input_dtype, input_last; /* last: the channels lie innermost */
    int64_t state_dtype;           /* of source, x, noise and x0 */
    int64_t slots, time_dtype;     /* copies of the model input */
    int64_t branches, base, conditional, unconditional; /* -1: none */
    int64_t scaled, momentum, weights_by, one_row;      /* one_row: all rows read the same weights */
    int64_t learned_variance, predict_x0, raw_output, gradient, history, saves_states, clip, rescale, noise_source;
    int64_t keep_x0;

    const float *table;
    int32_t *counter;
    const float *weights, *bound;
    const int64_t *seeds;
    float *history_memory;
    const float *gradient_memory, *momentum_memory;
    void *model_input, *time;
} Plan;

/* The tensors that may be others in every row. */
typedef struct {
    const void *output, *source;
    void *x, *x0;
    const void *noise;
} Moving;

/* A row at work. Any block of a sample's positions can be done beside the others. */
typedef struct {
    const Plan *plan;
    Moving tensors;
    int64_t outputs;           /* of a branch's sample, with variances */
    int64_t planes, positions; /* a sample in planes of positions; one plane where all channels lie alike */
    int64_t blocks;            /* of a sample */
} Row;
