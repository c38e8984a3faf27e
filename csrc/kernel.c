#include "kernel.h"

#include <float.h>
#include <stdbool.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__FAST_MATH__)
#error "kernel.c must be compiled without -ffast-math: all variants promise the same bits"
#endif

#define INLINE static inline __attribute__((always_inline))

#define F32_MAGNITUDE 0x7fffffffu
#define F32_INF       0x7f800000u
#define F32_NAN       0x7fc00000u

INLINE uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

INLINE float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* ---- One element, without branches, so that the loops below become vectors ---- */

INLINE float bfloat16_to_float(uint16_t h) {
    return float_of((uint32_t)h << 16);
}

/* Every NaN becomes the quiet one with its sign kept: what ml_dtypes does. */
INLINE uint16_t float_to_bfloat16(float f) {
    uint32_t u = bits_of(f);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    uint32_t nan = ((u >> 16) & 0x8000) | (F32_NAN >> 16);
    return (uint16_t)((u & F32_MAGNITUDE) > F32_INF ? nan : rounded);
}

/*
 * The half's exponent and mantissa, placed in a float, are the number times 2^-112: the multiplication is
 * exact and normalises subnormal halves. Infinity and NaN come out at 2^16 or more; their exponent is then
 * set.
 */
INLINE float float16_to_float(uint16_t h) {
    uint32_t magnitude = h & 0x7fff;
    uint32_t u = bits_of(float_of(magnitude << 13) * 0x1p112f);
    u |= magnitude >= 0x7c00 ? F32_INF : 0;
    return float_of(u | (uint32_t)(h & 0x8000) << 16);
}

/*
 * Below 2^-14 the result is subnormal: adding 0.5 makes the processor round at bit 2^-24. Above, the integer
 * addition rounds to even, carries into the exponent, and reaches infinity from 65520 on by itself.
 * A NaN keeps its sign and upper payload: what NumPy does.
 */
INLINE uint16_t float_to_float16(float f) {
    uint32_t u = bits_of(f);
    int32_t a = (int32_t)(u & F32_MAGNITUDE);
    int32_t subnormal = (int32_t)(bits_of(float_of((uint32_t)a) + 0.5f) - bits_of(0.5f));
    int32_t normal = (a - ((127 - 15) << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
    int32_t nan = 0x7c00 | ((a >> 13) & 0x3ff);
    nan += nan == 0x7c00;
    int32_t h = a < (int32_t)bits_of(0x1p-14f) ? subnormal : normal;
    h = a >= (int32_t)bits_of(0x1p16f) ? 0x7c00 : h;
    h = a > (int32_t)F32_INF ? nan : h;
    return (uint16_t)(((u >> 16) & 0x8000) | (uint32_t)h);
}

/* dtype is a constant wherever these are inlined: the switch is gone before the loop is compiled. */
INLINE float load(xccl_dtype_t dtype, const void *row, size_t i) {
    switch (dtype) {
    case XCCL_FLOAT16:
        return float16_to_float(((const uint16_t *)row)[i]);
    case XCCL_BFLOAT16:
        return bfloat16_to_float(((const uint16_t *)row)[i]);
    default:
        return ((const float *)row)[i];
    }
}

INLINE void store(xccl_dtype_t dtype, void *row, size_t i, float value) {
    switch (dtype) {
    case XCCL_FLOAT16:
        ((uint16_t *)row)[i] = float_to_float16(value);
        break;
    case XCCL_BFLOAT16:
        ((uint16_t *)row)[i] = float_to_bfloat16(value);
        break;
    default:
        ((float *)row)[i] = value;
        break;
    }
}

/* ---- Rows ---- */

INLINE void to_float32_body(xccl_dtype_t dtype, float *restrict dst, const void *restrict src, size_t n) {
    for (size_t i = 0; i < n; i++)
        dst[i] = load(dtype, src, i);
}

INLINE void from_float32_body(xccl_dtype_t dtype, void *restrict dst, const float *restrict src, size_t n) {
    for (size_t i = 0; i < n; i++)
        store(dtype, dst, i, src[i]);
}

/* Magnitudes of numbers of one dtype order as their bits do, infinity above all numbers and NaN above infinity.
 * The result is the largest magnitude as a float32. */
INLINE float max_magnitude(xccl_dtype_t dtype, const void *restrict x, size_t n) {
    if (dtype == XCCL_FLOAT32) {
        int32_t max = 0;
        for (size_t i = 0; i < n; i++) {
            int32_t a = (int32_t)(bits_of(((const float *)x)[i]) & F32_MAGNITUDE);
            max = a > max ? a : max;
        }
        return float_of((uint32_t)max);
    }
    int16_t max = 0;
    for (size_t i = 0; i < n; i++) {
        int16_t a = (int16_t)(((const uint16_t *)x)[i] & 0x7fff);
        max = a > max ? a : max;
    }
    return load(dtype, &max, 0);
}

/*
 * Rounds to nearest even by adding 1.5 * 2^23, after which the integer stands in the low bits. |x| <= max and
 * scale is a normal number within one rounding of max / 127, so |x * inverse| < 127 * (1 + 2^-21): the
 * result lies in [-127, 127] without clipping.
 */
INLINE void quantize_body(xccl_dtype_t dtype, int8_t *restrict q, const void *restrict x, size_t n, float *out_scale) {
    const float shift = 0x1.8p23f;
    float max = max_magnitude(dtype, x, n);
    float scale = max / 127.0f;
    bool finite = bits_of(max) < F32_INF;
    *out_scale = !finite ? float_of(F32_NAN) : scale < FLT_MIN ? 0.0f : scale;
    if (!finite || scale < FLT_MIN) {
        memset(q, 0, n);
        return;
    }
    float inverse = 1.0f / scale;
    for (size_t i = 0; i < n; i++)
        q[i] = (int8_t)(bits_of(load(dtype, x, i) * inverse + shift) & 0xff);
}

/* ---- One set of functions for each vector width ---- */

#define BY_DTYPE(dtype, body, ...)                                                                                     \
    switch (dtype) {                                                                                                   \
    case XCCL_FLOAT16:                                                                                                 \
        body(XCCL_FLOAT16, __VA_ARGS__);                                                                               \
        break;                                                                                                         \
    case XCCL_BFLOAT16:                                                                                                \
        body(XCCL_BFLOAT16, __VA_ARGS__);                                                                              \
        break;                                                                                                         \
    default:                                                                                                           \
        body(XCCL_FLOAT32, __VA_ARGS__);                                                                               \
        break;                                                                                                         \
    }

#define SET          scalar
#define NAME_STRING  "scalar"
#define TARGET
#define VECTOR_BYTES 16 /* SSE2, NEON: part of every processor of their kind */
#if defined(__x86_64__)
#define STREAM_STORE(at, vector) _mm_stream_si128((__m128i *)(at), (__m128i)(vector))
#else
#define STREAM_STORE(at, vector) memcpy(at, &(vector), sizeof(vector))
#endif
#include "kernel_set.h"

#if defined(__x86_64__)

#define SET                      avx2
#define NAME_STRING              "avx2"
#define TARGET                   __attribute__((target("avx2")))
#define VECTOR_BYTES             32
#define STREAM_STORE(at, vector) _mm256_stream_si256((__m256i *)(at), (__m256i)(vector))
#include "kernel_set.h"

#define SET                      avx512
#define NAME_STRING              "avx512"
#define TARGET                   __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define VECTOR_BYTES             64
#define STREAM_STORE(at, vector) _mm512_stream_si512((__m512i *)(at), (__m512i)(vector))
#include "kernel_set.h"

static int has_avx2(void) {
    return __builtin_cpu_supports("avx2");
}

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const xccl_kernel_t *xccl_kernel_get(xccl_simd_t simd) {
    switch (simd) {
    case XCCL_SIMD_SCALAR:
        return &kernel_scalar;
    case XCCL_SIMD_AVX2:
        return has_avx2() ? &kernel_avx2 : NULL;
    case XCCL_SIMD_AVX512:
        return has_avx512() ? &kernel_avx512 : NULL;
    case XCCL_SIMD_AUTO:
        return has_avx512() ? &kernel_avx512 : has_avx2() ? &kernel_avx2 : &kernel_scalar;
    }
    return NULL;
}

#else

const xccl_kernel_t *xccl_kernel_get(xccl_simd_t simd) {
    return simd == XCCL_SIMD_AUTO || simd == XCCL_SIMD_SCALAR ? &kernel_scalar : NULL;
}

#endif

size_t xccl_kernel_itemsize(xccl_dtype_t dtype) {
    return dtype == XCCL_FLOAT32 ? 4 : 2;
}
