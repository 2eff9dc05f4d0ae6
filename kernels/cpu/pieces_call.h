/* The kernels beside the step, as functions of Python. Included after the instruction sets. Nothing is checked but the
 * number of arguments, the set and that numbers are numbers. */

/* By number of the set. */
static const struct {
    Brownian *brownian;
} PIECES[] = {
#define PIECES_OF(set) {brownian_##set}
    [BASELINE] = PIECES_OF(baseline),
#if defined(__x86_64__)
    [AVX2] = PIECES_OF(avx2),
    [AVX512] = PIECES_OF(avx512),
#endif
#undef PIECES_OF
};

enum { MOST_NUMBERS = 24 };

/* The set, and the other arguments as integers: addresses, sizes and numbers. Below 0 with an exception. */
static long unpack_numbers(PyObject *const *arguments, Py_ssize_t count, Py_ssize_t expected, int64_t *numbers)
{
    if (count != 1 + expected) {
        PyErr_Format(PyExc_TypeError, "got %zd arguments, expected %zd", count, 1 + expected);
        return -1;
    }
    const long set = set_of(arguments[0]);
    for (Py_ssize_t i = 0; set >= 0 && i < expected; i++) {
        numbers[i] = PyLong_AsLongLong(arguments[1 + i]);
        if (numbers[i] == -1 && PyErr_Occurred())
            return -1;
    }
    return set;
}

/* Runs a call without the interpreter's lock where it works on many elements. */
#define CALL(elements, call)               \
    do {                                   \
        if ((elements) < LARGE)            \
            call;                          \
        else {                             \
            Py_BEGIN_ALLOW_THREADS         \
            call;                          \
            Py_END_ALLOW_THREADS           \
        }                                  \
    } while (0)
#define ADDRESS(number) (void *)(intptr_t)(number)

static PyObject *brownian(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t n[8];
    const long set = unpack_numbers(arguments, count, 8, n);
    if (set < 0)
        return NULL;
    CALL(n[1] * n[2] * n[5], PIECES[set].brownian(ADDRESS(n[0]), n[1], n[2], ADDRESS(n[3]), ADDRESS(n[4]), n[5],
                                                  (uint32_t)n[6], ADDRESS(n[7])));
    Py_RETURN_NONE;
}

#define PIECE_METHOD(name, arguments) \
    {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, #name "(number of the set, " arguments ")"}
#define PIECE_METHODS                                                                                              \
    PIECE_METHOD(brownian, "address of int64 seeds, samples, their size, addresses of int64 nodes and float factors, " \
                           "terms, stream, address to write to: Brownian noise.")
