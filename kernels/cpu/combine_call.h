/* The combination as a function of Python. Included after the table of instruction sets. */

/* A struct that Python packed; NULL with an error for another size. */
static int unpack(const char *name, PyObject *packed, void *to, Py_ssize_t size)
{
    char *bytes;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(packed, &bytes, &length))
        return -1;
    if (length != size) {
        PyErr_Format(PyExc_ValueError, "%s: got %zd bytes, expected %zd", name, length, size);
        return -1;
    }
    memcpy(to, bytes, (size_t)size);
    return 0;
}

/* An address, which is NULL only where the tensor is not used. */
static int unpack_address(PyObject *number, int used, void **to)
{
    *to = PyLong_AsVoidPtr(number);
    if (*to || !used)
        return PyErr_Occurred() ? -1 : 0;
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "address: got 0, expected that of a tensor's memory");
    return -1;
}

static PyObject *combine(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    Combination combination;
    Layout layout;
    Addresses addresses = {{0}, {0}};
    void *address;
    if (count < 3)
        return PyErr_Format(PyExc_TypeError, "got %zd arguments, expected 3 and the addresses", count);
    const long number = set_of(arguments[0]);
    if (number < 0)
        return NULL;
    if (unpack("combination", arguments[1], &combination, sizeof combination) ||
        unpack("layout", arguments[2], &layout, sizeof layout))
        return NULL;
    const int32_t inputs = combination.inputs, outputs = combination.outputs;
    if (inputs < 1 || inputs > MOST_INPUTS || outputs < 1 || outputs > MOST_OUTPUTS)
        return PyErr_Format(PyExc_ValueError, "combination: got %d inputs and %d outputs, expected up to %d and %d",
                            inputs, outputs, MOST_INPUTS, MOST_OUTPUTS);
    if (count != 3 + inputs + outputs)
        return PyErr_Format(PyExc_TypeError, "got %zd arguments, expected %d", count, 3 + inputs + outputs);
    for (int32_t k = 0; k < inputs; k++) {
        const int used = combination.used >> k & 1 || (k == 1 && combination.noise >= 0);
        if (unpack_address(arguments[3 + k], used, &address))
            return NULL;
        addresses.inputs[k] = address;
    }
    for (int32_t j = 0; j < outputs; j++)
        if (unpack_address(arguments[3 + inputs + j], 1, &addresses.results[j]))
            return NULL;
    if (layout.batch * layout.size < LARGE)
        SETS[number].combine(&combination, &layout, &addresses);
    else {
        Py_BEGIN_ALLOW_THREADS
        SETS[number].combine(&combination, &layout, &addresses);
        Py_END_ALLOW_THREADS
    }
    Py_RETURN_NONE;
}
