/* What a Gram matrix is made of. */
#pragma once
#include <stdint.h>

/* Vectors that there is room for, and the numbers of so many: a triangle, and a sum each. */
#define GRAM_VECTORS 4
#define GRAM_NUMBERS (GRAM_VECTORS * (GRAM_VECTORS + 3) / 2)
/* Elements of a block: four vectors of them fill 4 KiB. */
#define GRAM_BLOCK 256
/* Sums that are kept apart. */
#define GRAM_SUMS 8

/* int64, addresses and a float, in the order that `fastcfg.ops.native_pieces` packs. */
typedef struct {
    const float *output;
    float *momentum; /* NULL for none */
    double *out;
    int64_t branches, base, conditional, batch, size;
    int64_t stride; /* elements of a sample of the output */
    float decay; /* the momentum becomes decay*h + the difference of the branch `conditional` */
} Gram;
