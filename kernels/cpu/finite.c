/* NaN and infinity have an exponent of ones. All of a sample is read: numbers are finite as a rule. */
#include "finite.h"

static int is_finite(const void *sample, int64_t size, uint32_t exponent)
{
    uint32_t found = 0;
    if (exponent < 1u << 16) {
        const uint16_t *x = sample, wanted = (uint16_t)exponent;
        uint16_t narrow = 0;
        for (int64_t i = 0; i < size; i++)
            narrow |= (uint16_t)((x[i] & wanted) == wanted);
        found = narrow;
    } else {
        const uint32_t *x = sample;
        for (int64_t i = 0; i < size; i++)
            found |= (x[i] & exponent) == exponent;
    }
    return !found;
}

void check_finite(const Finite *f)
{
    const int64_t row = f->counter[0] - 1, sources = f->sources[f->branches] + 1;
    if ((row + 1) % f->every)
        return;
    for (int64_t k = 0; k <= f->branches; k++)
        for (int64_t b = 0; b < f->batch; b++) {
            const int64_t code = (row * sources + f->sources[k]) * f->batch + b;
            if (code >= *f->record)
                continue;
            const int is_state = k == f->branches;
            const uint32_t exponent = (uint32_t)(is_state ? f->exponent : f->output_exponent);
            const int64_t size = is_state ? f->size : f->output_size;
            const int64_t first = (is_state ? b : k * f->batch + b) * size * (exponent < 1u << 16 ? 2 : 4);
            if (!is_finite((const char *)(is_state ? f->x : f->output) + first, size, exponent))
                *f->record = code;
        }
}
