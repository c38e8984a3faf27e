#include "reduce.h"

#include <stdbool.h>
#include <string.h>

#include "kernel.h"

/* Elements per step: the accumulator stays in the first-level cache while the sources stream through. */
enum { TILE = 1024, MAX_ITEMSIZE = 8 };

typedef void (*accumulate_t)(void *accumulator, const void *source, uint64_t count);

/* ---- one step: accumulator[i] = accumulator[i] op source[i] ---- */

#define ADD(a, b)      ((a) + (b))
#define MULTIPLY(a, b) ((a) * (b))
#define LOWER(a, b)    ((a) < (b) ? (a) : (b))
#define HIGHER(a, b)   ((a) > (b) ? (a) : (b))
/* As numpy.minimum and numpy.maximum: a NaN wins; the first of equal elements (0.0, -0.0). */
#define LOWER_OR_NAN(a, b)  ((a) <= (b) || (a) != (a) ? (a) : (b))
#define HIGHER_OR_NAN(a, b) ((a) >= (b) || (a) != (a) ? (a) : (b))

/* `wide` holds a result before it is cut to `type`: unsigned, so that integers wrap without undefined overflow. */
#define DEFINE_STEP(name, type, wide, EXPRESSION)                                                                      \
    static void name(void *accumulator, const void *source, uint64_t count) {                                          \
        type *restrict a = accumulator;                                                                                \
        const type *restrict b = source;                                                                               \
        for (uint64_t i = 0; i < count; i++)                                                                           \
            a[i] = (type)EXPRESSION((wide)a[i], (wide)b[i]);                                                           \
    }

#define DEFINE_INTEGER(type, wide)                                                                                     \
    DEFINE_STEP(sum_##type, type, wide, ADD)                                                                           \
    DEFINE_STEP(min_##type, type, type, LOWER)                                                                         \
    DEFINE_STEP(max_##type, type, type, HIGHER)                                                                        \
    DEFINE_STEP(prod_##type, type, wide, MULTIPLY)

#define DEFINE_FLOAT(type)                                                                                             \
    DEFINE_STEP(sum_##type, type, type, ADD)                                                                           \
    DEFINE_STEP(min_##type, type, type, LOWER_OR_NAN)                                                                  \
    DEFINE_STEP(max_##type, type, type, HIGHER_OR_NAN)                                                                 \
    DEFINE_STEP(prod_##type, type, type, MULTIPLY)

DEFINE_FLOAT(float)
DEFINE_FLOAT(double)
DEFINE_INTEGER(int8_t, uint32_t)
DEFINE_INTEGER(int16_t, uint32_t)
DEFINE_INTEGER(int32_t, uint32_t)
DEFINE_INTEGER(int64_t, uint64_t)
DEFINE_INTEGER(uint8_t, uint32_t)
DEFINE_INTEGER(uint16_t, uint32_t)
DEFINE_INTEGER(uint32_t, uint32_t)
DEFINE_INTEGER(uint64_t, uint64_t)

#define STEPS(type) {sum_##type, min_##type, max_##type, prod_##type}

static const struct {
    uint64_t itemsize;
    accumulate_t step[4]; /* by xccl_reduce_op_t; of the accumulator's type */
} types[] = {
    [XCCL_FLOAT32] = {4, STEPS(float)},
    [XCCL_FLOAT16] = {2, STEPS(float)},
    [XCCL_BFLOAT16] = {2, STEPS(float)},
    [XCCL_FLOAT64] = {8, STEPS(double)},
    [XCCL_BOOL] = {1, {NULL, min_uint8_t, max_uint8_t, NULL}},
    [XCCL_INT8] = {1, STEPS(int8_t)},
    [XCCL_INT16] = {2, STEPS(int16_t)},
    [XCCL_INT32] = {4, STEPS(int32_t)},
    [XCCL_INT64] = {8, STEPS(int64_t)},
    [XCCL_UINT8] = {1, STEPS(uint8_t)},
    [XCCL_UINT16] = {2, STEPS(uint16_t)},
    [XCCL_UINT32] = {4, STEPS(uint32_t)},
    [XCCL_UINT64] = {8, STEPS(uint64_t)},
    [XCCL_COMPLEX64] = {8, {NULL}},
    [XCCL_COMPLEX128] = {16, {NULL}},
    [XCCL_BYTES] = {1, {NULL}},
};

/* ---- all sources ---- */

uint64_t xccl_reduce_itemsize(xccl_dtype_t dtype) {
    return types[dtype].itemsize;
}

int xccl_reduce_supports(xccl_dtype_t dtype, xccl_reduce_op_t op) {
    return types[dtype].step[op] != NULL;
}

static void reduce_tile_16(xccl_dtype_t dtype, accumulate_t step, void *out, const void *const *sources,
                           int num_sources, uint64_t first, uint64_t count) {
    const xccl_kernel_t *kernel = xccl_kernel_get(XCCL_SIMD_AUTO);
    float accumulator[TILE], next[TILE];
    kernel->to_float32(dtype, accumulator, (const uint16_t *)sources[0] + first, count);
    for (int s = 1; s < num_sources; s++) {
        kernel->to_float32(dtype, next, (const uint16_t *)sources[s] + first, count);
        step(accumulator, next, count);
    }
    kernel->from_float32(dtype, (uint16_t *)out + first, accumulator, count);
}

static void reduce_tile(uint64_t itemsize, accumulate_t step, void *out, const void *const *sources, int num_sources,
                        uint64_t first, uint64_t count) {
    _Alignas(64) unsigned char accumulator[TILE * MAX_ITEMSIZE];
    uint64_t at = first * itemsize;
    memcpy(accumulator, (const unsigned char *)sources[0] + at, count * itemsize);
    for (int s = 1; s < num_sources; s++)
        step(accumulator, (const unsigned char *)sources[s] + at, count);
    memcpy((unsigned char *)out + at, accumulator, count * itemsize);
}

void xccl_reduce(xccl_dtype_t dtype, xccl_reduce_op_t op, void *out, const void *const *sources, int num_sources,
                 uint64_t count) {
    accumulate_t step = types[dtype].step[op];
    bool half = dtype == XCCL_FLOAT16 || dtype == XCCL_BFLOAT16;
    for (uint64_t first = 0; first < count; first += TILE) {
        uint64_t tile = count - first < TILE ? count - first : TILE;
        if (half)
            reduce_tile_16(dtype, step, out, sources, num_sources, first, tile);
        else
            reduce_tile(types[dtype].itemsize, step, out, sources, num_sources, first, tile);
    }
}
