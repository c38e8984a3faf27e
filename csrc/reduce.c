#include "reduce.h"

#include <stdbool.h>
#include <string.h>

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

/* ---- 16-bit floats ---- */

static float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float from_bfloat16(uint16_t h) {
    return float_of_bits((uint32_t)h << 16);
}

/* To nearest even: adding 0x7fff plus the last bit kept carries exactly when it should. NaN becomes ml_dtypes' one. */
static uint16_t to_bfloat16(float value) {
    uint32_t bits = bits_of_float(value);
    if (value != value)
        return (uint16_t)((bits >> 16 & 0x8000) | 0x7fc0);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Exponent and mantissa of the half, placed in a float, are its value times 2^-112; the multiplication is exact and
 * also makes subnormal halves right. */
static float from_float16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    uint32_t bits = bits_of_float(float_of_bits(rest << 13) * 0x1p112f);
    if (rest >= 0x7c00) /* inf, NaN */
        bits = (rest << 13) | 0x7f800000;
    return float_of_bits(bits | sign);
}

/* To nearest even. Subnormal halves: adding 0.5 lets the float adder round at 2^-24, the spacing of halves there. */
static uint16_t to_float16(float value) {
    uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) /* NaN keeps the upper bits of its payload, as NumPy does */
        return (uint16_t)(sign | 0x7c00 | ((rest >> 13 & 0x3ff) ? (rest >> 13 & 0x3ff) : 1));
    if (rest >= 0x477ff000) /* 65520 and more round to infinity */
        return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) /* below 2^-14 */
        return (uint16_t)(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
}

static void widen(xccl_dtype_t dtype, float *to, const uint16_t *from, uint64_t count) {
    if (dtype == XCCL_BFLOAT16)
        for (uint64_t i = 0; i < count; i++)
            to[i] = from_bfloat16(from[i]);
    else
        for (uint64_t i = 0; i < count; i++)
            to[i] = from_float16(from[i]);
}

static void narrow(xccl_dtype_t dtype, uint16_t *to, const float *from, uint64_t count) {
    if (dtype == XCCL_BFLOAT16)
        for (uint64_t i = 0; i < count; i++)
            to[i] = to_bfloat16(from[i]);
    else
        for (uint64_t i = 0; i < count; i++)
            to[i] = to_float16(from[i]);
}

/* ---- all sources ---- */

uint64_t xccl_reduce_itemsize(xccl_dtype_t dtype) {
    return types[dtype].itemsize;
}

int xccl_reduce_supports(xccl_dtype_t dtype, xccl_reduce_op_t op) {
    return types[dtype].step[op] != NULL;
}

static void reduce_tile_16(xccl_dtype_t dtype, accumulate_t step, void *out, const void *const *sources,
                           int num_sources, uint64_t first, uint64_t count) {
    float accumulator[TILE], next[TILE];
    widen(dtype, accumulator, (const uint16_t *)sources[0] + first, count);
    for (int s = 1; s < num_sources; s++) {
        widen(dtype, next, (const uint16_t *)sources[s] + first, count);
        step(accumulator, next, count);
    }
    narrow(dtype, (uint16_t *)out + first, accumulator, count);
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
