/* The check of a row for NaN and infinity. */
#pragma once
#include <stdint.h>

/* In the order that `fastcfg.ops.native_rows` packs. */
typedef struct {
    const void *output, *x;
    const int32_t *counter, *sources; /* the run's, already at the next row; of every branch, and of the state */
    int64_t *record;                  /* the smallest code so far */
    int64_t branches, batch, every;
    int64_t output_size, size;        /* elements of a sample */
    int32_t output_exponent, exponent; /* the bits of an exponent: floats of 16 bits have fewer than 1 << 16 */
} Finite;

/* `fastcfg.reference.finite.ReferenceFiniteCheck`. */
void check_finite(const Finite *f);
