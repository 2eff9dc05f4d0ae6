/* What a guided step works on: one row of a table applied to a contiguous float32 state. */
#pragma once
#include <stdint.h>

/* Columns of `fastcfg.table.DEVICE_COLUMNS`, in order (a test compares the two). */
enum {
    C_IN, T, P_X, P_M, A_X, A_0, A_M, A_U, A_H0, A_H1, A_H2, S, L_0, L_V, K_X, K_0, K_M, SLOT, P_G, A_G,
    P_X_REST, P_M_REST, A_X_REST, WIDTH
};

/* What is the same in every row of a run: int64 in the order that `fastcfg.ops.native` packs. */
typedef struct {
    int64_t batch, size;        /* samples, and elements of one */
    int64_t output_size;        /* elements of a sample of the output: of its variance channels too */
    int64_t slots, time_is_int; /* copies of the model input, and whether time is int64 or float32 */
    int64_t branches, base, unconditional, scaled, momentum; /* -1: none */
    int64_t predict_x0, raw_output, gradient, history, saves_states, clip, rescale, noise, keep_x0;
} Spec;

/* The tensors of a row, in the order that `fastcfg.ops.native` passes; those that are not used are NULL. */
typedef struct {
    const float *output, *source;
    float *x;
    const float *table;
    int32_t *counter;
    const float *weights, *bound, *noise;
    float *history;
    const float *gradient, *momentum;
    float *x0, *model_input;
    void *time;
} Tensors;

typedef void Step(const Spec *, const Tensors *);
