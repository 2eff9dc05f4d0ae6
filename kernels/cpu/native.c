/* The extension module: the guided step for every instruction set of this architecture, chosen when it is called. */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
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
#include "parallel.h"
#include "philox.h"
#include "pieces.h"
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

/* What works on fewer elements is done before another thread would have got the lock. */
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


static const struct {
    const char *name;
    Range *step, *normal;
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
    /* `__builtin_cpu_supports` knows F16C, or any of them, only with some compilers. */
    const unsigned avx512 = bit_AVX512F | bit_AVX512VL | bit_AVX512DQ | bit_AVX512BW;
    const unsigned basic = bit_OSXSAVE | bit_FMA | bit_F16C;
    unsigned a, b, c, d, saved, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & basic) != basic || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return;
    /* The registers that the system saves: 128 and 256 bits, and for AVX-512 masks, upper halves and upper registers. */
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    has[AVX2] = b & bit_AVX2 && (saved & 0x06) == 0x06;
    has[AVX512] = has[AVX2] && (b & avx512) == avx512 && (saved & 0xE6) == 0xE6;
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

/* Do a work in so many threads, without the interpreter's lock; 0: at once, holding it. */
static void share(Range *range, void *work, int64_t blocks, int64_t threads)
{
    if (!threads) {
        range(work, 0, blocks);
        return;
    }
    Py_BEGIN_ALLOW_THREADS
    run_parallel(range, work, blocks, threads);
    Py_END_ALLOW_THREADS
}

static PyObject *normal(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    if (count != 8)
        return PyErr_Format(PyExc_TypeError, "got %zd arguments, expected 8", count);
    const long number = set_of(arguments[0]);
    if (number < 0)
        return NULL;
    const int64_t threads = PyLong_AsLongLong(arguments[1]);
    const int64_t *seeds = PyLong_AsVoidPtr(arguments[2]);
    const int64_t batch = PyLong_AsLongLong(arguments[3]), size = PyLong_AsLongLong(arguments[4]);
    const uint32_t row = (uint32_t)PyLong_AsUnsignedLongMask(arguments[5]);
    const uint32_t stream = (uint32_t)PyLong_AsUnsignedLongMask(arguments[6]);
    float *out = PyLong_AsVoidPtr(arguments[7]);
    if (PyErr_Occurred())
        return NULL;
    const int64_t blocks = (size + DRAWN - 1) / DRAWN;
    Drawing drawing = {seeds, size, blocks, row, stream, out};
    share(SETS[number].normal, &drawing, batch * blocks, threads);
    Py_RETURN_NONE;
}

#include "step_call.h"

#include "combine_call.h"
#include "pieces_call.h"

static PyMethodDef METHODS[] = {
    {"instruction_sets", instruction_sets, METH_NOARGS, "Names of those that this CPU has, the widest last."},
    {"guided_step", (PyCFunction)(void (*)(void))guided_step, METH_FASTCALL,
     "guided_step(number of the set, plan, threads, addresses of the moving tensors): one row, in place. Nothing is\n"
     "checked."},
    {"normal", (PyCFunction)(void (*)(void))normal, METH_FASTCALL,
     "normal(number of the set, threads, address of int64 seeds, samples, their size, row, stream, address to write\n"
     "to): standard normals by Philox. Nothing is checked."},
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
