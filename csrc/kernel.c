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
    uint16_t bits = (uint16_t)max;
    return load(dtype, &bits, 0);
}

/* Of a row with this maximum. */
INLINE float scale_of(float max) {
    float scale = max / 127.0f;
    return bits_of(max) >= F32_INF ? float_of(F32_NAN) : scale < FLT_MIN ? 0.0f : scale;
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

#define SET         scalar
#define NAME_STRING "scalar"
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

/* The one instruction that rounds 32 numbers to bfloat16 takes subnormal ones for zero. int8 times a normal scale is
 * none, so here it gives the bits that all others give. */
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) static void
dequantize_avx512_bf16(xccl_dtype_t dtype, void *dst, const int8_t *q, float scale, size_t n) {
    uint32_t magnitude = bits_of(scale) & F32_MAGNITUDE;
    size_t i = 0;
    if (dtype == XCCL_BFLOAT16 && magnitude >= bits_of(FLT_MIN) && magnitude < F32_INF) {
        __m512 scales = _mm512_set1_ps(scale);
        for (; i + 32 <= n; i += 32) {
            __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(q + i)));
            __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(q + i + 16)));
            __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_cvtepi32_ps(high), scales),
                                                   _mm512_mul_ps(_mm512_cvtepi32_ps(low), scales));
            memcpy((uint16_t *)dst + i, &rounded, sizeof rounded);
        }
    }
    dequantize_avx512(dtype, (char *)dst + i * xccl_kernel_itemsize(dtype), q + i, scale, n - i);
}

static const xccl_kernel_t kernel_avx512_bf16 = {
    .name = "avx512",
    .to_float32 = to_float32_avx512,
    .from_float32 = from_float32_avx512,
    .quantize = quantize_avx512,
    .dequantize = dequantize_avx512_bf16,
    .weighted_sum = weighted_sum_avx512,
    .stream = stream_avx512,
};

static int has_avx2(void) {
    return __builtin_cpu_supports("avx2");
}

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static const xccl_kernel_t *get_avx512(void) {
    if (!has_avx512())
        return NULL;
    return __builtin_cpu_supports("avx512bf16") ? &kernel_avx512_bf16 : &kernel_avx512;
}

const xccl_kernel_t *xccl_kernel_get(xccl_simd_t simd) {
    switch (simd) {
    case XCCL_SIMD_SCALAR:
        return &kernel_scalar;
    case XCCL_SIMD_AVX2:
        return has_avx2() ? &kernel_avx2 : NULL;
    case XCCL_SIMD_AVX512:
        return get_avx512();
    case XCCL_SIMD_AUTO:
        return has_avx512() ? get_avx512() : has_avx2() ? &kernel_avx2 : &kernel_scalar;
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
