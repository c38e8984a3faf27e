/* entry.c - the hot calls of the Python package, written by hand: the module xccl._entry.
 *
 * A call through cffi costs about a microsecond of argument checks in Python, more than a small message takes. Here
 * a call is a record (call_t) of the operation and its arguments as 64-bit words, and there are three ways to one:
 *
 *   all_to_all(comm, x, out, timeout), ...   takes the ordinary call: contiguous NumPy arrays of the right shapes. It
 *                                            declines anything else, before doing anything, with None or False; the
 *                                            caller then checks in Python, where errors get their texts, and uses
 *   run(code, arguments, ...)                which makes the call with addresses as numbers
 *   Prepared(comm, code, arguments, ...)     keeps the record and makes the call whenever it is called
 *
 * The interpreter lock is released during every call. */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdbool.h>
#include <structmember.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

#include "../xccl.h"

/* ---- references ---- */

/* Replaces the object that *place holds a reference to. Takes over the reference to `object`. */
static void replace(PyObject **place, PyObject *object) {
    PyObject *old = *place;
    *place = object;
    Py_XDECREF(old);
}

static void *new_reference(void *object) {
    Py_INCREF((PyObject *)object);
    return object;
}

/* ---- calls ---- */

typedef enum code_t {
    BARRIER,
    BROADCAST,
    ALL_GATHER,
    ALL_REDUCE,
    REDUCE_SCATTER,
    ALL_TO_ALL,
    SEND,
    RECV,
    PUT,
    GET,
    PUT_SIGNAL,
    SIGNAL_OP,
    WAIT_UNTIL,
    CODES
} code_t;

enum { MAX_WORDS = 7 };

typedef struct call_t {
    code_t code;
    uint64_t words[MAX_WORDS]; /* the arguments of the C function after the communicator, without the output */
} call_t;

/* What a call gives besides its status. */
typedef struct output_t {
    xccl_message_t message;
    uint64_t seen;
} output_t;

static int make_call(xccl_comm_t *comm, const call_t *call, output_t *out) {
    const uint64_t *w = call->words;
    void *const p0 = (void *)(uintptr_t)w[0], *const p1 = (void *)(uintptr_t)w[1];
    switch (call->code) {
    case BARRIER:
        return xccl_coll_barrier(comm, (int64_t)w[0]);
    case BROADCAST:
        return xccl_coll_broadcast(comm, p0, w[2], (xccl_dtype_t)w[3], (int)w[4], (int64_t)w[5], p1);
    case ALL_GATHER:
        return xccl_coll_all_gather(comm, p0, w[2], (xccl_dtype_t)w[3], (int64_t)w[4], p1);
    case ALL_REDUCE:
        return xccl_coll_all_reduce(comm, p0, w[2], (xccl_dtype_t)w[3], (xccl_reduce_op_t)w[4], (int64_t)w[5], p1);
    case REDUCE_SCATTER:
        return xccl_coll_reduce_scatter(comm, p0, w[2], (xccl_dtype_t)w[3], (xccl_reduce_op_t)w[4], (int64_t)w[5], p1);
    case ALL_TO_ALL:
        return xccl_coll_all_to_all(comm, p0, w[2], (xccl_dtype_t)w[3], (int64_t)w[4], p1);
    case SEND:
        return xccl_p2p_send(comm, p0, w[1], (int)w[2], (int64_t)w[3], (xccl_send_mode_t)w[4], (int64_t)w[5]);
    case RECV:
        return xccl_p2p_recv(comm, p0, w[1], (int)w[2], (int64_t)w[3], (int64_t)w[4], &out->message);
    case PUT:
        return xccl_gas_put(comm, p0, p1, w[2], (int)w[3]);
    case GET:
        return xccl_gas_get(comm, p0, p1, w[2], (int)w[3]);
    case PUT_SIGNAL:
        return xccl_gas_put_signal(comm, p0, p1, w[2], (uint64_t *)(uintptr_t)w[3], w[4], (xccl_signal_op_t)w[5],
                                   (int)w[6]);
    case SIGNAL_OP:
        return xccl_gas_signal_op(comm, p0, w[1], (xccl_signal_op_t)w[2], (int)w[3]);
    case WAIT_UNTIL:
        return xccl_gas_wait_until(comm, p0, (xccl_cmp_t)w[1], w[2], (int64_t)w[3], &out->seen);
    case CODES:
        break;
    }
    return XCCL_ERR_USAGE;
}

/* ---- the module's state: what it needs from the Python side ---- */

static PyObject *check;        /* check(status) raises the exception of a negative status */
static PyObject *message_type; /* the named tuple (source, tag, nbytes) */
static int bfloat16_type = -1; /* NumPy's number of it */

static PyObject *configure(PyObject *module, PyObject *args) {
    PyObject *check_function, *message_class, *bfloat16;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOO", &check_function, &message_class, &bfloat16))
        return NULL;
    if (!PyArray_DescrCheck(bfloat16)) {
        PyErr_SetString(PyExc_TypeError, "configure: bfloat16 must be a dtype");
        return NULL;
    }
    replace(&check, new_reference(check_function));
    replace(&message_type, new_reference(message_class));
    bfloat16_type = ((PyArray_Descr *)bfloat16)->type_num;
    Py_RETURN_NONE;
}

/* ---- Comm: the handle of a communicator as this module sees it ---- */

typedef struct comm_object_t {
    PyObject_HEAD xccl_comm_t *comm; /* NULL once closed */
    int rank, size;
    PyObject *message; /* the last one returned: a stream of equal messages makes no new object */
    xccl_message_t last;
} comm_object_t;

static PyTypeObject *comm_type;

static PyObject *comm_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    unsigned long long address;
    (void)keywords;
    if (!PyArg_ParseTuple(args, "K", &address))
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    comm_object_t *self = (comm_object_t *)alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->comm = (xccl_comm_t *)(uintptr_t)address;
    self->rank = xccl_comm_rank(self->comm);
    self->size = xccl_comm_size(self->comm);
    return (PyObject *)self;
}

static void comm_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    Py_CLEAR(((comm_object_t *)object)->message);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyObject *comm_close(PyObject *object, PyObject *unused) {
    (void)unused;
    ((comm_object_t *)object)->comm = NULL;
    Py_RETURN_NONE;
}

static PyMethodDef comm_methods[] = {
    {"close", comm_close, METH_NOARGS, "From now on every call is declined."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot comm_slots[] = {
    {Py_tp_new, (void *)comm_new},
    {Py_tp_dealloc, (void *)comm_dealloc},
    {Py_tp_methods, comm_methods},
    {Py_tp_doc, "A communicator's handle, made from its address."},
    {0, NULL},
};
static PyType_Spec comm_spec = {"xccl._entry.Comm", sizeof(comm_object_t), 0, Py_TPFLAGS_DEFAULT, comm_slots};

/* ---- results ---- */

/* Makes the call; false with an exception set if it fails. */
static bool run_call(const comm_object_t *comm, const call_t *call, output_t *out) {
    int status;
    Py_BEGIN_ALLOW_THREADS;
    status = make_call(comm->comm, call, out);
    Py_END_ALLOW_THREADS;
    if (status >= 0)
        return true;
    PyObject *raised = PyObject_CallFunction(check, "i", status);
    if (raised != NULL) {
        Py_DECREF(raised);
        PyErr_Format(PyExc_SystemError, "status %d raised nothing", status);
    }
    return false;
}

static PyObject *message_object(comm_object_t *comm, const xccl_message_t *message) {
    const xccl_message_t *last = &comm->last;
    if (comm->message == NULL || last->source != message->source || last->tag != message->tag ||
        last->bytes != message->bytes) {
        PyObject *made = PyObject_CallFunction(message_type, "iLK", (int)message->source, (long long)message->tag,
                                               (unsigned long long)message->bytes);
        if (made == NULL)
            return NULL;
        comm->last = *message;
        replace(&comm->message, made);
    }
    return new_reference(comm->message);
}

/* Makes the call and returns what the operation gives: `result` (borrowed) unless it tells something itself. */
static PyObject *run_to_object(comm_object_t *comm, const call_t *call, PyObject *result) {
    output_t out;
    if (!run_call(comm, call, &out))
        return NULL;
    if (call->code == RECV)
        return message_object(comm, &out.message);
    if (call->code == WAIT_UNTIL)
        return PyLong_FromUnsignedLongLong(out.seen);
    return new_reference(result);
}

/* ---- arguments of the ordinary calls: each function returns false to decline ---- */

static bool as_comm(PyObject *object, comm_object_t **out) {
    *out = (comm_object_t *)object;
    return Py_TYPE(object) == comm_type && (*out)->comm != NULL;
}

static bool as_timeout(PyObject *object, int64_t *out) {
    *out = XCCL_TIMEOUT_DEFAULT;
    if (object == Py_None)
        return true;
    if (!PyFloat_CheckExact(object))
        return false;
    double seconds = PyFloat_AsDouble(object);
    if (!(seconds >= 0))
        return false;
    *out = seconds * 1e9 < (double)INT64_MAX ? (int64_t)(seconds * 1e9) : INT64_MAX;
    return true;
}

static bool as_integer(PyObject *object, int64_t least, int64_t most, int64_t *out) {
    int overflow;
    if (!PyLong_CheckExact(object))
        return false;
    *out = PyLong_AsLongLongAndOverflow(object, &overflow);
    return !overflow && *out >= least && *out <= most;
}

static int dtype_code(const PyArrayObject *a) {
    int type = PyArray_TYPE(a);
    switch (type) {
    case NPY_FLOAT:
        return XCCL_FLOAT32;
    case NPY_HALF:
        return XCCL_FLOAT16;
    case NPY_DOUBLE:
        return XCCL_FLOAT64;
    case NPY_BOOL:
        return XCCL_BOOL;
    case NPY_INT8:
        return XCCL_INT8;
    case NPY_INT16:
        return XCCL_INT16;
    case NPY_INT32:
        return XCCL_INT32;
    case NPY_INT64:
        return XCCL_INT64;
    case NPY_UINT8:
        return XCCL_UINT8;
    case NPY_UINT16:
        return XCCL_UINT16;
    case NPY_UINT32:
        return XCCL_UINT32;
    case NPY_UINT64:
        return XCCL_UINT64;
    case NPY_CFLOAT:
        return XCCL_COMPLEX64;
    case NPY_CDOUBLE:
        return XCCL_COMPLEX128;
    case NPY_LONGLONG: /* a type of its own, though as wide as NPY_INT64 on Linux */
        return XCCL_INT64;
    case NPY_ULONGLONG:
        return XCCL_UINT64;
    default:
        return type == bfloat16_type ? XCCL_BFLOAT16 : -1;
    }
}

/* A block of memory that holds elements of a plain dtype. */
typedef struct block_t {
    PyArrayObject *array;
    int dtype;
} block_t;

static bool as_block(PyObject *object, bool write, block_t *out) {
    if (!PyArray_Check(object))
        return false;
    out->array = (PyArrayObject *)object;
    int wanted = NPY_ARRAY_C_CONTIGUOUS | (write ? NPY_ARRAY_WRITEABLE : 0);
    if ((PyArray_FLAGS(out->array) & wanted) != wanted || PyArray_ISBYTESWAPPED(out->array))
        return false;
    out->dtype = dtype_code(out->array);
    return out->dtype >= 0;
}

static uint64_t address_of(block_t block) {
    return (uint64_t)(uintptr_t)PyArray_DATA(block.array);
}

static uint64_t bytes_of(block_t block) {
    return (uint64_t)PyArray_NBYTES(block.array);
}

/* Same dtype, and the shape of `a` with `first` before it (drop = 0) or instead of its first extent (drop = 1). */
static bool has_shape(block_t out, block_t a, int drop, const npy_intp *first) {
    int extra = first != NULL, dims = PyArray_NDIM(a.array);
    if (out.dtype != a.dtype || PyArray_NDIM(out.array) != dims - drop + extra)
        return false;
    const npy_intp *got = PyArray_DIMS(out.array), *expected = PyArray_DIMS(a.array);
    if (extra && got[0] != *first)
        return false;
    for (int i = drop; i < dims; i++)
        if (got[i - drop + extra] != expected[i])
            return false;
    return true;
}

/* `out`, or a new array of that shape if it is None; a new reference. NULL without an exception: declined. */
static PyObject *as_result(PyObject *out, block_t a, int drop, const npy_intp *first, block_t *block) {
    if (out != Py_None) {
        if (!as_block(out, true, block) || !has_shape(*block, a, drop, first))
            return NULL;
        return new_reference(out);
    }
    npy_intp shape[NPY_MAXDIMS + 1];
    int dims = 0;
    if (first != NULL)
        shape[dims++] = *first;
    for (int i = drop; i < PyArray_NDIM(a.array); i++)
        shape[dims++] = PyArray_DIMS(a.array)[i];
    if (dims > NPY_MAXDIMS)
        return NULL;
    /* takes over a reference to the dtype */
    PyObject *made = PyArray_Empty(dims, shape, new_reference(PyArray_DESCR(a.array)), 0);
    *block = (block_t){(PyArrayObject *)made, a.dtype};
    return made;
}

static const char *const reduce_words[] = {"sum", "min", "max", "prod", NULL};
static const char *const signal_words[] = {"set", "add", NULL};
static const char *const cmp_words[] = {"==", "!=", ">", ">=", "<", "<=", NULL};
static const char *const mode_words[] = {"default", "sync", NULL};

/* The place of a word in a list, which is the value of the C core's enumeration. */
static bool as_word(PyObject *object, const char *const *words, uint64_t *out) {
    if (!PyUnicode_CheckExact(object))
        return false;
    for (uint64_t i = 0; words[i] != NULL; i++)
        if (PyUnicode_CompareWithASCIIString(object, words[i]) == 0) {
            *out = i;
            return true;
        }
    return false;
}

static bool can_reduce(int dtype, uint64_t op) {
    if (dtype == XCCL_COMPLEX64 || dtype == XCCL_COMPLEX128)
        return false;
    return dtype != XCCL_BOOL || op == XCCL_MIN || op == XCCL_MAX;
}

/* ---- ordinary calls ---- */

#define DECLINE                                                                                                        \
    do {                                                                                                               \
        if (PyErr_Occurred())                                                                                          \
            return NULL;                                                                                               \
        Py_RETURN_NONE;                                                                                                \
    } while (0)

typedef PyObject *const *arguments_t;

static bool takes(Py_ssize_t given, Py_ssize_t expected, const char *name) {
    if (given == expected)
        return true;
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", name, expected, given);
    return false;
}

static PyObject *finish(comm_object_t *comm, const call_t *call, PyObject *result) {
    PyObject *returned = run_to_object(comm, call, result);
    Py_DECREF(result);
    return returned;
}

static PyObject *barrier(PyObject *module, arguments_t a, Py_ssize_t n) {
    comm_object_t *comm;
    int64_t timeout;
    (void)module;
    if (!takes(n, 2, "barrier"))
        return NULL;
    if (!as_comm(a[0], &comm) || !as_timeout(a[1], &timeout))
        DECLINE;
    return run_to_object(comm, &(call_t){BARRIER, {(uint64_t)timeout}}, Py_True);
}

static PyObject *broadcast(PyObject *module, arguments_t a, Py_ssize_t n) {
    comm_object_t *comm;
    block_t buf, out;
    int64_t root, timeout;
    (void)module;
    if (!takes(n, 5, "broadcast"))
        return NULL;
    if (!as_comm(a[0], &comm) || !as_integer(a[2], 0, comm->size - 1, &root) || !as_timeout(a[4], &timeout) ||
        !as_block(a[1], a[3] == Py_None ? root != comm->rank : a[3] == a[1], &buf))
        DECLINE;
    PyObject *target = a[3] == Py_None ? a[1] : a[3];
    if (target == a[1])
        out = buf;
    else if (!as_block(target, true, &out) || !has_shape(out, buf, 0, NULL))
        DECLINE;
    call_t call = {
        BROADCAST,
        {address_of(buf), address_of(out), bytes_of(buf), (uint64_t)buf.dtype, (uint64_t)root, (uint64_t)timeout}};
    return run_to_object(comm, &call, target);
}

static PyObject *all_gather(PyObject *module, arguments_t a, Py_ssize_t n) {
    comm_object_t *comm;
    block_t x, out;
    int64_t timeout;
    (void)module;
    if (!takes(n, 4, "all_gather"))
        return NULL;
    if (!as_comm(a[0], &comm) || !as_block(a[1], false, &x) || !as_timeout(a[3], &timeout))
        DECLINE;
    PyObject *result = as_result(a[2], x, 0, &(npy_intp){comm->size}, &out);
    if (result == NULL)
        DECLINE;
    call_t call = {ALL_GATHER, {address_of(x), address_of(out), bytes_of(x), (uint64_t)x.dtype, (uint64_t)timeout}};
    return finish(comm, &call, result);
}

static PyObject *all_reduce(PyObject *module, arguments_t a, Py_ssize_t n) {
    comm_object_t *comm;
    block_t x, out;
    uint64_t op;
    int64_t timeout;
    (void)module;
    if (!takes(n, 5, "all_reduce"))
        return NULL;
    if (!as_comm(a[0], &comm) || !as_block(a[1], false, &x) || !as_word(a[2], reduce_words, &op) ||
        !can_reduce(x.dtype, op) || !as_timeout(a[4], &timeout))
        DECLINE;
    PyObject *result = as_result(a[3], x, 0, NULL, &out);
    if (result == NULL)
        DECLINE;
    call_t call = {
        ALL_REDUCE,
        {address_of(x), address_of(out), (uint64_t)PyArray_SIZE(x.array), (uint64_t)x.dtype, op, (uint64_t)timeout}};
    return finish(comm, &call, result);
}

/* Rows of axis 0 for each rank. */
static bool split_rows(block_t x, const comm_object_t *comm, npy_intp *out) {
    if (PyArray_NDIM(x.array) == 0 || PyArray_DIMS(x.array)[0] % comm->size != 0)
        return false;
    *out = PyArray_DIMS(x.array)[0] / comm->size;
    return true;
}

static PyObject *reduce_scatter(PyObject *module, arguments_t a, Py_ssize_t n) {
    comm_object_t *comm;
    block_t x, out;
    uint64_t op;
    int64_t timeout;
    npy_intp rows;
    (void)module;
    if (!takes(n, 5, "reduce_scatter"))
        return NULL;
    if (!as_comm(a[0], &comm) || !as_block(a[1], false, &x) || !as_word(a[2], reduce_words, &op) ||
        !can_reduce(x.dtype, op) || !as_timeout(a[4], &timeout) || !split_rows(x, comm, &rows))
        DECLINE;
    PyObject *result = as_result(a[3], x, 1, &rows, &out);
    if (result == NULL)
        DECLINE;
    call_t call = {
        REDUCE_SCATTER,
        {address_of(x), address_of(out), (uint64_t)PyArray_SIZE(out.array), (uint64_t)x.dtype, op, (uint64_t)timeout}};
    return finish(comm, &call, result);
}

static PyObject *all_to_all(PyObject *module, arguments_t a, Py_ssize_t n) {
    comm_object_t *comm;
    block_t x, out;
    int64_t timeout;
    npy_intp rows;
    (void)module;
    if (!takes(n, 4, "all_to_all"))
        return NULL;
    if (!as_comm(a[0], &comm) || !as_block(a[1], false, &x) || !split_rows(x, comm, &rows) ||
        !as_timeout(a[3], &timeout))
        DECLINE;
    PyObject *result = as_result(a[2], x, 0, NULL, &out);
    if (result == NULL)
        DECLINE;
    call_t call = {
        ALL_TO_ALL,
        {address_of(x), address_of(out), bytes_of(x) / (uint64_t)comm->size, (uint64_t)x.dtype, (uint64_t)timeout}};
    return finish(comm, &call, result);
}

static PyObject *send(PyObject *module, arguments_t a, Py_ssize_t n) {
    comm_object_t *comm;
    block_t buf;
    int64_t dest, tag, timeout;
    uint64_t mode;
    (void)module;
    if (!takes(n, 6, "send"))
        return NULL;
    if (!as_comm(a[0], &comm) || !as_block(a[1], false, &buf) || !as_integer(a[2], INT32_MIN, INT32_MAX, &dest) ||
        !as_integer(a[3], INT64_MIN, INT64_MAX, &tag) || !as_word(a[4], mode_words, &mode) ||
        !as_timeout(a[5], &timeout))
        DECLINE;
    call_t call = {SEND, {address_of(buf), bytes_of(buf), (uint64_t)dest, (uint64_t)tag, mode, (uint64_t)timeout}};
    return run_to_object(comm, &call, Py_True);
}

static PyObject *recv(PyObject *module, arguments_t a, Py_ssize_t n) {
    comm_object_t *comm;
    block_t buf;
    int64_t source, tag, timeout;
    (void)module;
    if (!takes(n, 5, "recv"))
        return NULL;
    if (!as_comm(a[0], &comm) || !as_block(a[1], true, &buf) || !as_integer(a[2], INT32_MIN, INT32_MAX, &source) ||
        !as_integer(a[3], INT64_MIN, INT64_MAX, &tag) || !as_timeout(a[4], &timeout))
        DECLINE;
    call_t call = {RECV, {address_of(buf), bytes_of(buf), (uint64_t)source, (uint64_t)tag, (uint64_t)timeout}};
    return run_to_object(comm, &call, Py_True);
}

static PyObject *move(code_t code, arguments_t a, Py_ssize_t n) {
    comm_object_t *comm;
    block_t dst, src;
    int64_t pe;
    if (!takes(n, 4, code == PUT ? "put" : "get"))
        return NULL;
    if (!as_comm(a[0], &comm) || !as_block(a[1], true, &dst) || !as_block(a[2], false, &src) ||
        !has_shape(dst, src, 0, NULL) || !as_integer(a[3], INT32_MIN, INT32_MAX, &pe))
        DECLINE;
    call_t call = {code, {address_of(dst), address_of(src), bytes_of(src), (uint64_t)pe}};
    return run_to_object(comm, &call, Py_True);
}

static PyObject *put(PyObject *module, arguments_t a, Py_ssize_t n) {
    (void)module;
    return move(PUT, a, n);
}

static PyObject *get(PyObject *module, arguments_t a, Py_ssize_t n) {
    (void)module;
    return move(GET, a, n);
}

/* The words of a Signal that has one: a cache line. */
static bool as_signal(PyObject *words, uint64_t *out) {
    block_t block;
    if (!as_block(words, true, &block) || block.dtype != XCCL_UINT64 || bytes_of(block) != 64)
        return false;
    *out = address_of(block);
    return true;
}

static PyObject *put_signal(PyObject *module, arguments_t a, Py_ssize_t n) {
    comm_object_t *comm;
    block_t dst, src;
    int64_t pe, value;
    uint64_t signal, op;
    (void)module;
    if (!takes(n, 7, "put_signal"))
        return NULL;
    if (!as_comm(a[0], &comm) || !as_block(a[1], true, &dst) || !as_block(a[2], false, &src) ||
        !has_shape(dst, src, 0, NULL) || !as_integer(a[3], INT32_MIN, INT32_MAX, &pe) || !as_signal(a[4], &signal) ||
        !as_integer(a[5], 0, INT64_MAX, &value) || !as_word(a[6], signal_words, &op))
        DECLINE;
    call_t call = {PUT_SIGNAL,
                   {address_of(dst), address_of(src), bytes_of(src), signal, (uint64_t)value, op, (uint64_t)pe}};
    return run_to_object(comm, &call, Py_True);
}

static PyObject *signal_op(PyObject *module, arguments_t a, Py_ssize_t n) {
    comm_object_t *comm;
    int64_t value, pe;
    uint64_t signal, op;
    (void)module;
    if (!takes(n, 5, "signal_op"))
        return NULL;
    if (!as_comm(a[0], &comm) || !as_signal(a[1], &signal) || !as_integer(a[2], 0, INT64_MAX, &value) ||
        !as_integer(a[3], INT32_MIN, INT32_MAX, &pe) || !as_word(a[4], signal_words, &op))
        DECLINE;
    return run_to_object(comm, &(call_t){SIGNAL_OP, {signal, (uint64_t)value, op, (uint64_t)pe}}, Py_True);
}

static PyObject *wait_until(PyObject *module, arguments_t a, Py_ssize_t n) {
    comm_object_t *comm;
    int64_t value, timeout;
    uint64_t signal, cmp;
    (void)module;
    if (!takes(n, 5, "wait_until"))
        return NULL;
    if (!as_comm(a[0], &comm) || !as_signal(a[1], &signal) || !as_word(a[2], cmp_words, &cmp) ||
        !as_integer(a[3], 0, INT64_MAX, &value) || !as_timeout(a[4], &timeout))
        DECLINE;
    return run_to_object(comm, &(call_t){WAIT_UNTIL, {signal, cmp, (uint64_t)value, (uint64_t)timeout}}, Py_True);
}

/* ---- calls with addresses as numbers ---- */

/* Fills `out` from the code and a tuple of integers; a negative one is taken modulo 2^64. */
static bool read_call(int code, PyObject *words, call_t *out) {
    Py_ssize_t count = PyTuple_Size(words);
    if (count < 0)
        return false;
    if (code < 0 || code >= CODES || count > MAX_WORDS) {
        PyErr_Format(PyExc_ValueError, "no operation %d with %zd arguments", code, count);
        return false;
    }
    *out = (call_t){.code = (code_t)code};
    for (Py_ssize_t i = 0; i < count; i++)
        out->words[i] = PyLong_AsUnsignedLongLongMask(PyTuple_GetItem(words, i));
    return !PyErr_Occurred();
}

static PyObject *run(PyObject *module, PyObject *args) {
    PyObject *comm, *words, *result;
    int code;
    call_t call;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!iOO", comm_type, &comm, &code, &words, &result) || !read_call(code, words, &call))
        return NULL;
    if (((comm_object_t *)comm)->comm == NULL) {
        PyErr_SetString(PyExc_SystemError, "run: the communicator is closed");
        return NULL;
    }
    return run_to_object((comm_object_t *)comm, &call, result);
}

/* ---- Prepared ---- */

typedef struct prepared_object_t {
    PyObject_HEAD call_t call;
    comm_object_t *comm;
    PyObject *result; /* of the operation */
    PyObject *kept;   /* the arrays that the call points into */
    PyObject *closed; /* called, to raise, once the communicator is closed */
} prepared_object_t;

static PyObject *prepared_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    PyObject *comm, *words, *result, *kept, *closed;
    int code;
    call_t call;
    (void)keywords;
    if (!PyArg_ParseTuple(args, "O!iOOOO", comm_type, &comm, &code, &words, &result, &kept, &closed) ||
        !read_call(code, words, &call))
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    prepared_object_t *self = (prepared_object_t *)alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->call = call;
    self->comm = new_reference(comm);
    self->result = new_reference(result);
    self->kept = new_reference(kept);
    self->closed = new_reference(closed);
    return (PyObject *)self;
}

static int prepared_traverse(PyObject *object, visitproc visit, void *arg) {
    prepared_object_t *self = (prepared_object_t *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->result);
    Py_VISIT(self->kept);
    Py_VISIT(self->closed);
    return 0;
}

static int prepared_clear(PyObject *object) {
    prepared_object_t *self = (prepared_object_t *)object;
    Py_CLEAR(self->comm);
    Py_CLEAR(self->result);
    Py_CLEAR(self->kept);
    Py_CLEAR(self->closed);
    return 0;
}

static void prepared_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    prepared_clear(object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyObject *prepared_call(PyObject *object, PyObject *args, PyObject *keywords) {
    prepared_object_t *self = (prepared_object_t *)object;
    if (PyTuple_Size(args) != 0 || keywords != NULL) {
        PyErr_SetString(PyExc_TypeError, "a prepared operation takes no arguments: they were given to prepare");
        return NULL;
    }
    if (self->comm->comm == NULL)
        return PyObject_CallObject(self->closed, NULL);
    return run_to_object(self->comm, &self->call, self->result);
}

static PyType_Slot prepared_slots[] = {
    {Py_tp_new, (void *)prepared_new},
    {Py_tp_traverse, (void *)prepared_traverse},
    {Py_tp_clear, (void *)prepared_clear},
    {Py_tp_dealloc, (void *)prepared_dealloc},
    {Py_tp_call, (void *)prepared_call},
    {Py_tp_doc, "A call that is ready to be made: (comm, code, arguments, result, kept, closed)."},
    {0, NULL},
};
static PyType_Spec prepared_spec = {"xccl._entry.Prepared", sizeof(prepared_object_t), 0,
                                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, prepared_slots};

/* ---- the module ---- */

#define FAST(name, arguments) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, #name arguments}

static PyMethodDef functions[] = {
    FAST(barrier, "(comm, timeout)"),
    FAST(broadcast, "(comm, buf, root, out, timeout)"),
    FAST(all_gather, "(comm, x, out, timeout)"),
    FAST(all_reduce, "(comm, x, op, out, timeout)"),
    FAST(reduce_scatter, "(comm, x, op, out, timeout)"),
    FAST(all_to_all, "(comm, x, out, timeout)"),
    FAST(send, "(comm, buf, dest, tag, mode, timeout)"),
    FAST(recv, "(comm, buf, source, tag, timeout)"),
    FAST(put, "(comm, dst, src, pe)"),
    FAST(get, "(comm, dst, src, pe)"),
    FAST(put_signal, "(comm, dst, src, pe, words, value, op)"),
    FAST(signal_op, "(comm, words, value, pe, op)"),
    FAST(wait_until, "(comm, words, cmp, value, timeout)"),
    {"run", run, METH_VARARGS, "run(comm, code, arguments, result)"},
    {"configure", configure, METH_VARARGS, "configure(check, message_type, bfloat16)"},
    {NULL, NULL, 0, NULL},
};

static int add_codes(PyObject *module) {
    static const char *const names[CODES] = {"BARRIER",    "BROADCAST", "ALL_GATHER", "ALL_REDUCE", "REDUCE_SCATTER",
                                             "ALL_TO_ALL", "SEND",      "RECV",       "PUT",        "GET",
                                             "PUT_SIGNAL", "SIGNAL_OP", "WAIT_UNTIL"};
    for (int code = 0; code < CODES; code++)
        if (PyModule_AddIntConstant(module, names[code], code) < 0)
            return -1;
    return 0;
}

static int add_type(PyObject *module, PyType_Spec *spec, const char *name, PyTypeObject **out) {
    *out = (PyTypeObject *)PyType_FromSpec(spec);
    return *out == NULL ? -1 : PyModule_AddObjectRef(module, name, (PyObject *)*out);
}

static int execute(PyObject *module) {
    static PyTypeObject *prepared_type;
    if (PyArray_ImportNumPyAPI() < 0 || add_codes(module) < 0 || add_type(module, &comm_spec, "Comm", &comm_type) < 0 ||
        add_type(module, &prepared_spec, "Prepared", &prepared_type) < 0)
        return -1;
    return 0;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, (void *)execute}, {0, NULL}};
static struct PyModuleDef module_def = {PyModuleDef_HEAD_INIT,
                                        "xccl._entry",
                                        "The hot calls of the package, without cffi.",
                                        0,
                                        functions,
                                        module_slots,
                                        NULL,
                                        NULL,
                                        NULL};

PyMODINIT_FUNC PyInit__entry(void) {
    return PyModuleDef_Init(&module_def);
}
