/* The extension module: the guided step for every instruction set of this architecture, chosen when it is called. */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include "fma_sse2.h"

#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "combine.h"
#include "exp2.h"
#include "finite.h"
#include "gram.h"
#include "guided_step.h"
#include "quantile.h"
#include "row_work.h"
#include "select.h"
#include "vectors.h"

/* Elements that are drawn at a time, and of a plane done before the next plane's. */
#define BLOCK 512
/* What passes through the registers at a time: with two vectors instead of four AVX2 takes a quarter longer. */
#define UNROLL 4
#define CHUNK (UNROLL * LANES)
#define EACH _Pragma("GCC unroll 4") for (int j = 0; j < UNROLL; j++)
/* States of fewer elements are done before another thread would have got the lock. */
#define LARGE 65536

#define SET BASELINE
#include "set.inc"
#undef SET

#if defined(__x86_64__)
#define SET AVX2
#include "set.inc"
#undef SET

#define SET AVX512
#include "set.inc"
#undef SET
#endif

typedef void Brownian(const int64_t *, int64_t, int64_t, const int64_t *, const float *, int64_t, uint32_t, float *);
typedef void Normal(const int64_t *, int64_t, int64_t, uint32_t, uint32_t, float *);

static const struct {
    const char *name;
    StepBlocks *step;
    Normal *normal;
    CombineRun *combine;
} SETS[] = {
    [BASELINE] = {"baseline", step_baseline, normal_baseline, combine_baseline},
#if defined(__x86_64__)
    [AVX2] = {"avx2", step_avx2, normal_avx2, combine_avx2},
    [AVX512] = {"avx512", step_avx512, normal_avx512, combine_avx512},
#endif
};
#define NUM_SETS ((long)(sizeof SETS / sizeof *SETS))

/* Asked once, when the module is loaded: CPUID takes microseconds in a virtual machine. */
static int has[sizeof SETS / sizeof *SETS];

static void ask_cpu(void)
{
    has[BASELINE] = 1;
#if defined(__x86_64__)
    unsigned a, b, c = 0, d;
    __builtin_cpu_init();
    /* Not every compiler's `__builtin_cpu_supports` knows F16C. */
    has[AVX2] = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
                c & bit_F16C;
    has[AVX512] = has[AVX2] && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
#endif
}

static PyObject *instruction_sets(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    PyObject *names = PyList_New(0);
    for (long number = 0; names && number < NUM_SETS; number++) {
        if (!has[number])
            continue;
        PyObject *name = PyUnicode_FromString(SETS[number].name);
        if (!name || PyList_Append(names, name))
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

/* The set of that number; below 0 with an exception. */
static long set_of(PyObject *argument)
{
    const long number = PyLong_AsLong(argument);
    if (number == -1 && PyErr_Occurred())
        return -1;
    if (number >= 0 && number < NUM_SETS && has[number])
        return number;
    PyErr_Format(PyExc_ValueError, "instruction set: got %ld, expected one that this CPU has", number);
    return -1;
}

static PyObject *normal(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    if (count != 7)
        return PyErr_Format(PyExc_TypeError, "got %zd arguments, expected 7", count);
    const long number = set_of(arguments[0]);
    if (number < 0)
        return NULL;
    const int64_t *seeds = PyLong_AsVoidPtr(arguments[1]);
    const int64_t batch = PyLong_AsLongLong(arguments[2]), size = PyLong_AsLongLong(arguments[3]);
    const uint32_t row = (uint32_t)PyLong_AsUnsignedLongMask(arguments[4]);
    const uint32_t stream = (uint32_t)PyLong_AsUnsignedLongMask(arguments[5]);
    float *out = PyLong_AsVoidPtr(arguments[6]);
    if (PyErr_Occurred())
        return NULL;
    if (batch * size < LARGE)
        SETS[number].normal(seeds, batch, size, row, stream, out);
    else {
        Py_BEGIN_ALLOW_THREADS
        SETS[number].normal(seeds, batch, size, row, stream, out);
        Py_END_ALLOW_THREADS
    }
    Py_RETURN_NONE;
}

static int64_t bytes_of(int64_t elements, int64_t dtype) { return elements * (dtype == FLOAT32 ? 4 : 2); }

static int meet(const void *a, int64_t a_bytes, const void *b, int64_t b_bytes)
{
    const uintptr_t from = (uintptr_t)a, other = (uintptr_t)b;
    return b && from < other + (size_t)b_bytes && other < from + (size_t)a_bytes;
}

/* Whether the output lies where the step writes: a model may return its input. */
static int overlaps(const Plan *p, const Moving *t, int64_t bytes)
{
    const int64_t all = p->batch * p->size, state = bytes_of(all, p->state_dtype);
    return meet(t->output, bytes, t->x, state) || meet(t->output, bytes, t->x0, state) ||
           meet(t->output, bytes, p->history_memory, bytes_of((p->history + 1) * all, FLOAT32)) ||
           meet(t->output, bytes, p->model_input, bytes_of(p->slots * all, p->input_dtype));
}

static void write_times(const Plan *p, float time)
{
    for (int64_t k = 0; k < p->slots * p->batch; k++) {
        if (p->time_dtype == TIME_INT64)
            ((int64_t *)p->time)[k] = (int64_t)time;
        else if (p->time_dtype == TIME_FLOAT64)
            ((double *)p->time)[k] = time;
        else
            ((float *)p->time)[k] = time;
    }
}

static PyObject *guided_step(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    enum { POINTERS = sizeof(Moving) / sizeof(void *) };
    char *bytes;
    Py_ssize_t length;
    void *pointers[POINTERS];
    if (count != 2 + POINTERS)
        return PyErr_Format(PyExc_TypeError, "got %zd arguments, expected %d", count, 2 + (int)POINTERS);
    const long number = set_of(arguments[0]);
    if (number < 0)
        return NULL;
    if (PyBytes_AsStringAndSize(arguments[1], &bytes, &length))
        return NULL;
    if (length != (Py_ssize_t)sizeof(Plan))
        return PyErr_Format(PyExc_ValueError, "plan: got %zd bytes, expected %zd", length, (Py_ssize_t)sizeof(Plan));
    for (int i = 0; i < POINTERS; i++) {
        pointers[i] = PyLong_AsVoidPtr(arguments[2 + i]);
        if (!pointers[i] && PyErr_Occurred())
            return NULL;
    }
    const Plan *p = (const Plan *)bytes;
    Row row = {.plan = p, .planes = 1, .positions = p->size};
    memcpy(&row.tensors, pointers, sizeof pointers);
    if (p->output_last || p->input_last || p->weights_by == BY_CHANNEL) {
        row.planes = p->channels;
        row.positions = p->size / p->channels;
    }
    row.blocks = (row.positions + BLOCK - 1) / BLOCK;

    row.outputs = p->size / p->channels * p->output_channels;
    const int64_t output_bytes = bytes_of(p->branches * p->batch * row.outputs, p->output_dtype);
    void *copy = NULL;
    if (overlaps(p, &row.tensors, output_bytes)) {
        copy = malloc((size_t)output_bytes);
        if (!copy)
            return PyErr_NoMemory();
        row.tensors.output = memcpy(copy, row.tensors.output, (size_t)output_bytes);
    }
    if (p->batch * p->size < LARGE)
        SETS[number].step(&row, 0, p->batch * row.blocks);
    else {
        Py_BEGIN_ALLOW_THREADS
        SETS[number].step(&row, 0, p->batch * row.blocks);
        Py_END_ALLOW_THREADS
    }
    free(copy);
    write_times(p, p->table[(p->counter[0] + 1) * WIDTH + T]);
    p->counter[0]++;
    Py_RETURN_NONE;
}

#include "combine_call.h"
#include "pieces_call.h"

static PyMethodDef METHODS[] = {
    {"instruction_sets", instruction_sets, METH_NOARGS, "Names of those that this CPU has, the widest last."},
    {"guided_step", (PyCFunction)(void (*)(void))guided_step, METH_FASTCALL,
     "guided_step(number of the set, plan, addresses of the moving tensors): one row, in place. Nothing is checked."},
    {"normal", (PyCFunction)(void (*)(void))normal, METH_FASTCALL,
     "normal(number of the set, address of int64 seeds, samples, their size, row, stream, address to write to):\n"
     "standard normals by Philox. Nothing is checked."},
    {"combine", (PyCFunction)(void (*)(void))combine, METH_FASTCALL,
     "combine(number of the set, combination, layout, addresses of inputs and results): all sums. Nothing is checked."},
    PIECE_METHODS,
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_native", "Native kernels for CPUs.", 0, METHODS,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void)
{
    ask_cpu();
    return PyModule_Create(&MODULE);
}
