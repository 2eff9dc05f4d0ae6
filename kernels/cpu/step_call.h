/* The guided step as a function of Python. Included after the table of instruction sets. */
#include <stdlib.h>

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
    if (count != 3 + POINTERS)
        return PyErr_Format(PyExc_TypeError, "got %zd arguments, expected %d", count, 3 + (int)POINTERS);
    const long number = set_of(arguments[0]);
    if (number < 0)
        return NULL;
    if (PyBytes_AsStringAndSize(arguments[1], &bytes, &length))
        return NULL;
    if (length != (Py_ssize_t)sizeof(Plan))
        return PyErr_Format(PyExc_ValueError, "plan: got %zd bytes, expected %zd", length, (Py_ssize_t)sizeof(Plan));
    const int64_t threads = PyLong_AsLongLong(arguments[2]);
    if (threads == -1 && PyErr_Occurred())
        return NULL;
    for (int i = 0; i < POINTERS; i++) {
        pointers[i] = PyLong_AsVoidPtr(arguments[3 + i]);
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
    share(SETS[number].step, &row, p->batch * row.blocks, threads);
    free(copy);
    write_times(p, p->table[(p->counter[0] + 1) * WIDTH + T]);
    p->counter[0]++;
    Py_RETURN_NONE;
}
