/* What standard normals are drawn for: whole samples of a size, in blocks of each. */
#pragma once
#include <stdint.h>

/* Elements of a block, in counters of four. */
enum { DRAWN = 4096 };

typedef struct {
    const int64_t *seeds;
    int64_t size, blocks; /* of a sample */
    uint32_t row, stream;
    float *out;
} Drawing;
