/* The kernels beside the step, as functions of Python. Included after the instruction sets. Nothing is checked but the
 * number of arguments, the set and that numbers are numbers. */

/* By number of the set. */
static const struct {
    Brownian *brownian;
    GramRun *gram;
} PIECES[] = {
#define PIECES_OF(set) {brownian_##set, gram_##set}
    [BASELINE] = PIECES_OF(baseline),
#if defined(__x86_64__)
    [AVX2] = PIECES_OF(avx2),
    [AVX512] = PIECES_OF(avx512),
#endif
#undef PIECES_OF
};

/* Addresses, sizes and numbers; below 0 with an exception. */
static int unpack_integers(PyObject *const *arguments, Py_ssize_t count, int64_t *to)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        to[i] = PyLong_AsLongLong(arguments[i]);
        if (to[i] == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
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
    if (count != 9)
        return PyErr_Format(PyExc_TypeError, "got %zd arguments, expected 9", count);
    const long set = set_of(arguments[0]);
    if (set < 0 || unpack_integers(arguments + 1, 8, n))
        return NULL;
    CALL(n[1] * n[2] * n[5], PIECES[set].brownian(ADDRESS(n[0]), n[1], n[2], ADDRESS(n[3]), ADDRESS(n[4]), n[5],
                                                  (uint32_t)n[6], ADDRESS(n[7])));
    Py_RETURN_NONE;
}

/* A struct that Python packed; below 0 with an exception for another size. */
static int unpack_struct(PyObject *packed, void *to, Py_ssize_t size)
{
    char *bytes;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(packed, &bytes, &length))
        return -1;
    if (length != size) {
        PyErr_Format(PyExc_ValueError, "packed arguments: got %zd bytes, expected %zd", length, size);
        return -1;
    }
    memcpy(to, bytes, (size_t)size);
    return 0;
}

static PyObject *gram(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    Gram g;
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "got %zd arguments, expected 2", count);
    const long set = set_of(arguments[0]);
    if (set < 0 || unpack_struct(arguments[1], &g, sizeof g))
        return NULL;
    CALL(g.batch * g.size * g.branches, PIECES[set].gram(&g));
    Py_RETURN_NONE;
}

/* No instruction set is faster at it than another. */
static PyObject *quantile(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    int64_t n[5];
    Rank rank;
    (void)self;
    if (count != 6)
        return PyErr_Format(PyExc_TypeError, "got %zd arguments, expected 6", count);
    if (unpack_struct(arguments[0], &rank, sizeof rank) || unpack_integers(arguments + 1, 5, n))
        return NULL;
    CALL(n[1] * n[2], quantile_bounds(ADDRESS(n[0]), n[1], n[2], &rank, ADDRESS(n[3]), ADDRESS(n[4])));
    Py_RETURN_NONE;
}

#define PIECE_METHOD(name, arguments) \
    {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, #name "(" arguments ")"}
#define PIECE_METHODS                                                                                                 \
    PIECE_METHOD(brownian, "number of the set, address of int64 seeds, samples, their size, addresses of int64 nodes " \
                           "and float factors, terms, stream, address to write to"),                                  \
    PIECE_METHOD(gram, "number of the set, packed Gram"),                                                              \
    PIECE_METHOD(quantile, "packed Rank, address, samples, their size, addresses of scratch and bounds")
