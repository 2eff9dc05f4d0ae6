/* The extension module: the guided step for every instruction set of this architecture, chosen when it is called. */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include "fma_sse2.h"

#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "combine.h"
#include "exp2.h"
#include "gram.h"
#include "guided_step.h"
#include "quantile.h"
#include "select.h"
#include "vectors.h"

/* Elements of a block: six arrays of them fill 12 KiB. */
#define BLOCK 512
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
    Step *step;
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

static int runs(long number)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (number == AVX2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (number == AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && runs(AVX2);
#endif
    return number == BASELINE;
}

static PyObject *instruction_sets(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    PyObject *names = PyList_New(0);
    for (long number = 0; names && number < NUM_SETS; number++) {
        if (!runs(number))
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
    if (number >= 0 && number < NUM_SETS && runs(number))
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

static int meet(const float *a, int64_t a_size, const float *b, int64_t b_size)
{
    const uintptr_t from = (uintptr_t)a, other = (uintptr_t)b;
    return b && from < other + (size_t)b_size * sizeof *b && other < from + (size_t)a_size * sizeof *a;
}

/* Whether the output lies where the step writes: a model may return its input. */
static int overlaps(const Spec *s, const Tensors *t)
{
    const int64_t output = s->branches * s->batch * s->output_size, all = s->batch * s->size;
    return meet(t->output, output, t->x, all) || meet(t->output, output, t->x0, all) ||
           meet(t->output, output, t->history, (s->history + 1) * all) ||
           meet(t->output, output, t->model_input, s->slots * all);
}

static PyObject *guided_step(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    enum { POINTERS = sizeof(Tensors) / sizeof(void *) };
    char *bytes;
    Py_ssize_t length;
    void *pointers[POINTERS];
    Tensors tensors;
    if (count != 2 + POINTERS)
        return PyErr_Format(PyExc_TypeError, "got %zd arguments, expected %d", count, 2 + (int)POINTERS);
    const long number = set_of(arguments[0]);
    if (number < 0)
        return NULL;
    if (PyBytes_AsStringAndSize(arguments[1], &bytes, &length))
        return NULL;
    if (length != (Py_ssize_t)sizeof(Spec))
        return PyErr_Format(PyExc_ValueError, "spec: got %zd bytes, expected %zd", length, (Py_ssize_t)sizeof(Spec));
    for (int i = 0; i < POINTERS; i++) {
        pointers[i] = PyLong_AsVoidPtr(arguments[2 + i]);
        if (!pointers[i] && PyErr_Occurred())
            return NULL;
    }
    memcpy(&tensors, pointers, sizeof tensors);
    Spec spec;
    memcpy(&spec, bytes, sizeof spec);
    float *copy = NULL;
    if (overlaps(&spec, &tensors)) {
        const size_t output = (size_t)(spec.branches * spec.batch * spec.output_size) * sizeof(float);
        copy = malloc(output);
        if (!copy)
            return PyErr_NoMemory();
        tensors.output = memcpy(copy, tensors.output, output);
    }
    if (spec.batch * spec.size < LARGE)
        SETS[number].step(&spec, &tensors);
    else {
        Py_BEGIN_ALLOW_THREADS
        SETS[number].step(&spec, &tensors);
        Py_END_ALLOW_THREADS
    }
    free(copy);
    Py_RETURN_NONE;
}

#include "combine_call.h"
#include "pieces_call.h"

static PyMethodDef METHODS[] = {
    {"instruction_sets", instruction_sets, METH_NOARGS, "Names of those that this CPU has, the widest last."},
    {"guided_step", (PyCFunction)(void (*)(void))guided_step, METH_FASTCALL,
     "guided_step(number of the set, spec, addresses of the tensors): one row, in place. Nothing is checked."},
    {"normal", (PyCFunction)(void (*)(void))normal, METH_FASTCALL,
     "normal(number of the set, address of int64 seeds, samples, their size, row, stream, address to write to): standard\n"
     "normals by Philox. Nothing is checked."},
    {"combine", (PyCFunction)(void (*)(void))combine, METH_FASTCALL,
     "combine(number of the set, combination, layout, addresses of inputs and results): all sums. Nothing is checked."},
    PIECE_METHODS,
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_native", "Native kernels for CPUs.", 0, METHODS,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&MODULE); }
