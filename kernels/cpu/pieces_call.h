/* The kernels beside the step, as functions of Python. Included after that of the combination. Nothing is checked but
 * the number of arguments, the set and that numbers are numbers. */

/* By number of the set. */
static const struct {
    Range *brownian, *gram, *noise_sums, *state_change, *blend_outputs, *predict, *threshold;
    StepBoundRun *step_bound;
} PIECES[] = {
#define OF(set, name) .name = name##_##set
#define PIECES_OF(set)                                                                    \
    {OF(set, brownian),      OF(set, gram),    OF(set, noise_sums), OF(set, state_change), \
     OF(set, blend_outputs), OF(set, predict), OF(set, threshold),  OF(set, step_bound)}
    [BASELINE] = PIECES_OF(baseline),
#if defined(__x86_64__)
    [AVX2] = PIECES_OF(avx2),
    [AVX512] = PIECES_OF(avx512),
#endif
#undef PIECES_OF
#undef OF
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

/* A kernel whose arguments Python packed into a struct. */
#define PACKED_PIECE(name, Struct, ...)                                                       \
    static PyObject *name(PyObject *self, PyObject *const *arguments, Py_ssize_t count)        \
    {                                                                                          \
        (void)self;                                                                            \
        Struct s;                                                                              \
        if (count != 3)                                                                        \
            return PyErr_Format(PyExc_TypeError, "got %zd arguments, expected 3", count);      \
        const long set = set_of(arguments[0]);                                                 \
        const int64_t threads = set < 0 ? -1 : PyLong_AsLongLong(arguments[1]);                \
        if (PyErr_Occurred() || unpack(#name, arguments[2], &s, sizeof s))                     \
            return NULL;                                                                       \
        __VA_ARGS__;                                                                           \
        Py_RETURN_NONE;                                                                        \
    }
/* The samples are shared among threads. */
#define SHARED_PIECE(name, Struct) PACKED_PIECE(name, Struct, share(PIECES[set].name, &s, s.batch, threads))
SHARED_PIECE(brownian, Brownian)
SHARED_PIECE(gram, Gram)
SHARED_PIECE(noise_sums, NoiseSums)
SHARED_PIECE(state_change, StateChange)
SHARED_PIECE(blend_outputs, Blend)
SHARED_PIECE(predict, Predict)
SHARED_PIECE(threshold, Threshold)
PACKED_PIECE(step_bound, StepBound, CALL(threads ? LARGE : 0, PIECES[set].step_bound(&s)))

/* For all sets, as is the next. */
static PyObject *quantile(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    int64_t n[5];
    Rank rank;
    (void)self;
    if (count != 6)
        return PyErr_Format(PyExc_TypeError, "got %zd arguments, expected 6", count);
    if (unpack("rank", arguments[0], &rank, sizeof rank) || unpack_integers(arguments + 1, 5, n))
        return NULL;
    CALL(n[1] * n[2], quantile_bounds(ADDRESS(n[0]), n[1], n[2], &rank, ADDRESS(n[3]), ADDRESS(n[4])));
    Py_RETURN_NONE;
}

static PyObject *finite_check(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    Finite f;
    (void)self;
    if (count != 1)
        return PyErr_Format(PyExc_TypeError, "got %zd arguments, expected 1", count);
    if (unpack("finite_check", arguments[0], &f, sizeof f))
        return NULL;
    CALL(f.batch * f.size, check_finite(&f));
    Py_RETURN_NONE;
}

#define PIECE_METHOD(name, arguments) \
    {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, #name "(" arguments ")"}
#define PIECE_METHODS                                                             \
    PIECE_METHOD(brownian, "number of the set, threads, packed Brownian"),        \
    PIECE_METHOD(blend_outputs, "number of the set, threads, packed Blend"),      \
    PIECE_METHOD(predict, "number of the set, threads, packed Predict"),          \
    PIECE_METHOD(threshold, "number of the set, threads, packed Threshold"),      \
    PIECE_METHOD(step_bound, "number of the set, threads, packed StepBound"),     \
    PIECE_METHOD(finite_check, "packed Finite"),                                  \
    PIECE_METHOD(noise_sums, "number of the set, threads, packed NoiseSums"),     \
    PIECE_METHOD(state_change, "number of the set, threads, packed StateChange"), \
    PIECE_METHOD(gram, "number of the set, threads, packed Gram"),                \
    PIECE_METHOD(quantile, "packed Rank, address, samples, their size, addresses of scratch and bounds")
