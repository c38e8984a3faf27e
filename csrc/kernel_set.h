/* kernel_set.h - the functions of kernel.h for one vector width. kernel.c includes it once for each, with
 *
 *     SET           its name
 *     TARGET        attribute that lets the compiler use its instructions
 *     VECTOR_BYTES  its vectors
 *
 * Rows of 16-bit numbers are read as words of two: the lower half of a lane of 32 bits is the even element, the
 * upper half the odd one. So no vector changes its width on the way, which costs more than the arithmetic. */

#define JOIN_(a, b) a##_##b
#define JOIN(a, b)  JOIN_(a, b)
#define NAME(name)  JOIN(name, SET)
#define LANES       (VECTOR_BYTES / 4)

typedef uint32_t NAME(words_t) __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t NAME(ints_t) __attribute__((vector_size(VECTOR_BYTES)));
typedef float NAME(floats_t) __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t NAME(halves_t) __attribute__((vector_size(VECTOR_BYTES / 2)));
#define words_t  NAME(words_t)
#define ints_t   NAME(ints_t)
#define floats_t NAME(floats_t)
#define halves_t NAME(halves_t)

/* ---- vectors; passed by address, as the calling convention of a wide vector depends on the target ---- */

/* See float16_to_float. */
INLINE void NAME(widen_float16)(floats_t *out, const words_t *half) {
    words_t magnitude = *half & 0x7fff;
    words_t u = (words_t)((floats_t)(magnitude << 13) * 0x1p112f);
    u |= (words_t)((ints_t)magnitude >= 0x7c00) & F32_INF;
    *out = (floats_t)(u | (*half & 0x8000) << 16);
}

INLINE void NAME(split)(xccl_dtype_t dtype, const words_t *word, floats_t *even, floats_t *odd) {
    if (dtype == XCCL_BFLOAT16) {
        *even = (floats_t)(*word << 16);
        *odd = (floats_t)(*word & 0xffff0000u);
    } else {
        words_t low = *word & 0xffff, high = *word >> 16;
        NAME(widen_float16)(even, &low);
        NAME(widen_float16)(odd, &high);
    }
}

/* The upper half of each lane is the bfloat16; see float_to_bfloat16. */
INLINE void NAME(round_bfloat16)(words_t *out, const floats_t *f, int may_be_nan) {
    words_t u = (words_t)*f;
    words_t rounded = u + 0x7fff + ((u >> 16) & 1);
    if (may_be_nan) {
        words_t is_nan = (words_t)((ints_t)(u & F32_MAGNITUDE) > (int32_t)F32_INF);
        rounded = (rounded & ~is_nan) | (((u & 0x80000000u) | F32_NAN) & is_nan);
    }
    *out = rounded;
}

/* The lower half of each lane is the float16; see float_to_float16. */
INLINE void NAME(round_float16)(words_t *out, const floats_t *f) {
    words_t u = (words_t)*f;
    ints_t a = (ints_t)(u & F32_MAGNITUDE);
    ints_t subnormal = (ints_t)((floats_t)a + 0.5f) - (int32_t)0x3f000000;
    ints_t normal = (a - ((127 - 15) << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
    ints_t nan = 0x7c00 | ((a >> 13) & 0x3ff);
    nan -= nan == 0x7c00; /* a comparison gives -1 */
    ints_t is_subnormal = a<(int32_t)0x38800000, is_infinite = a >= (int32_t)0x47800000, is_nan = a>(int32_t) F32_INF;
    ints_t h = (subnormal & is_subnormal) | (normal & ~is_subnormal);
    h = (is_infinite & 0x7c00) | (h & ~is_infinite);
    h = (nan & is_nan) | (h & ~is_nan);
    *out = ((u >> 16) & 0x8000) | (words_t)h;
}

INLINE void NAME(join)(xccl_dtype_t dtype, words_t *word, const floats_t *even, const floats_t *odd, int may_be_nan) {
    words_t low, high;
    if (dtype == XCCL_BFLOAT16) {
        NAME(round_bfloat16)(&low, even, may_be_nan);
        NAME(round_bfloat16)(&high, odd, may_be_nan);
        *word = (low >> 16) | (high & 0xffff0000u);
    } else {
        NAME(round_float16)(&low, even);
        NAME(round_float16)(&high, odd);
        *word = low | high << 16;
    }
}

/* ---- rows ---- */

TARGET static void NAME(to_float32)(xccl_dtype_t dtype, float *dst, const void *src, size_t n) {
    BY_DTYPE(dtype, to_float32_body, dst, src, n);
}

TARGET static void NAME(from_float32)(xccl_dtype_t dtype, void *dst, const float *src, size_t n) {
    BY_DTYPE(dtype, from_float32_body, dst, src, n);
}

/*
 * Rounds to nearest even by adding 1.5 * 2^23, after which the integer stands in the low bits. |x| <= max and
 * scale is a normal number within one rounding of max / 127, so |x * inverse| < 127 * (1 + 2^-21): the
 * result lies in [-127, 127] without clipping.
 */
INLINE void NAME(quantize_elements)(xccl_dtype_t dtype, int8_t *restrict q, const void *restrict x, float inverse,
                                    size_t n) {
    const float shift = 0x1.8p23f;
    size_t i = 0;
    if (dtype != XCCL_FLOAT32)
        for (; i + 2 * LANES <= n; i += 2 * LANES) {
            words_t word;
            floats_t even, odd;
            memcpy(&word, (const uint16_t *)x + i, sizeof word);
            NAME(split)(dtype, &word, &even, &odd);
            words_t pair = ((words_t)(even * inverse + shift) & 0xff) | (words_t)(odd * inverse + shift) << 8;
            halves_t pairs = __builtin_convertvector(pair, halves_t);
            memcpy(q + i, &pairs, sizeof pairs);
        }
    for (; i < n; i++)
        q[i] = (int8_t)(bits_of(load(dtype, x, i) * inverse + shift) & 0xff);
}

INLINE void NAME(quantize_body)(xccl_dtype_t dtype, int8_t *q, const void *x, size_t n, float *out_scale) {
    float max = max_magnitude(dtype, x, n);
    *out_scale = scale_of(max);
    if (*out_scale > 0)
        NAME(quantize_elements)(dtype, q, x, 1.0f / *out_scale, n);
    else /* zero, or NaN */
        memset(q, 0, n);
}

TARGET static float NAME(quantize)(xccl_dtype_t dtype, int8_t *q, const void *x, size_t n) {
    float scale = 0;
    BY_DTYPE(dtype, NAME(quantize_body), q, x, n, &scale);
    return scale;
}

/* Two neighbouring int8 of each lane's lower half, times scale. */
INLINE void NAME(dequantize_word)(xccl_dtype_t dtype, words_t *word, const int8_t *q, float scale, int may_be_nan) {
    halves_t pairs;
    memcpy(&pairs, q, sizeof pairs);
    ints_t pair = __builtin_convertvector(pairs, ints_t);
    floats_t even = __builtin_convertvector((pair << 24) >> 24, floats_t) * scale;
    floats_t odd = __builtin_convertvector((pair << 16) >> 24, floats_t) * scale;
    NAME(join)(dtype, word, &even, &odd, may_be_nan);
}

INLINE void NAME(dequantize_body)(xccl_dtype_t dtype, void *restrict dst, const int8_t *restrict q, float scale,
                                  size_t n, int may_be_nan) {
    size_t i = 0;
    if (dtype != XCCL_FLOAT32)
        for (; i + 2 * LANES <= n; i += 2 * LANES) {
            words_t word;
            NAME(dequantize_word)(dtype, &word, q + i, scale, may_be_nan);
            memcpy((uint16_t *)dst + i, &word, sizeof word);
        }
    for (; i < n; i++)
        store(dtype, dst, i, (float)q[i] * scale);
}

TARGET static void NAME(dequantize)(xccl_dtype_t dtype, void *dst, const int8_t *q, float scale, size_t n) {
    bool finite = (bits_of(scale) & F32_MAGNITUDE) < F32_INF; /* otherwise products may be NaN */
    if (finite) {
        BY_DTYPE(dtype, NAME(dequantize_body), dst, q, scale, n, 0);
    } else {
        BY_DTYPE(dtype, NAME(dequantize_body), dst, q, scale, n, 1);
    }
}

enum { NAME(SUM_VECTORS) = 4 }; /* accumulators: they stay in registers while the rows' columns are added */
#define SUM_VECTORS NAME(SUM_VECTORS)

/* Adds weight times the columns at `row` to the accumulators: for 16-bit numbers even and odd ones in turn. */
INLINE void NAME(accumulate)(xccl_dtype_t dtype, floats_t *sum, const char *row, float weight) {
    if (dtype == XCCL_FLOAT32) {
        for (int v = 0; v < SUM_VECTORS; v++) {
            floats_t y;
            memcpy(&y, row + v * VECTOR_BYTES, sizeof y);
            sum[v] += y * weight;
        }
        return;
    }
    for (int v = 0; v < SUM_VECTORS; v += 2) {
        words_t word;
        floats_t even, odd;
        memcpy(&word, row + v / 2 * VECTOR_BYTES, sizeof word);
        NAME(split)(dtype, &word, &even, &odd);
        sum[v] += even * weight;
        sum[v + 1] += odd * weight;
    }
}

INLINE void NAME(store_sum)(xccl_dtype_t dtype, char *dst, const floats_t *sum) {
    if (dtype == XCCL_FLOAT32) {
        memcpy(dst, sum, SUM_VECTORS * VECTOR_BYTES);
        return;
    }
    for (int v = 0; v < SUM_VECTORS; v += 2) {
        words_t word;
        NAME(join)(dtype, &word, &sum[v], &sum[v + 1], 1);
        memcpy(dst + v / 2 * VECTOR_BYTES, &word, sizeof word);
    }
}

INLINE void NAME(weighted_sum_body)(xccl_dtype_t dtype, char *dst, const void *const *rows, const float *weights,
                                    size_t num_rows, size_t n) {
    const size_t step = SUM_VECTORS * LANES, itemsize = dtype == XCCL_FLOAT32 ? 4 : 2;
    size_t i = 0;
    for (; i + step <= n; i += step) {
        floats_t sum[SUM_VECTORS] = {{0}};
        for (size_t j = 0; j < num_rows; j++)
            NAME(accumulate)(dtype, sum, (const char *)rows[j] + i * itemsize, weights ? weights[j] : 1.0f);
        NAME(store_sum)(dtype, dst + i * itemsize, sum);
    }
    for (; i < n; i++) {
        float sum = 0;
        for (size_t j = 0; j < num_rows; j++)
            sum += load(dtype, rows[j], i) * (weights ? weights[j] : 1.0f);
        store(dtype, dst, i, sum);
    }
}

TARGET static void NAME(weighted_sum)(xccl_dtype_t dtype, void *dst, const void *const *rows, const float *weights,
                                      size_t num_rows, size_t n) {
    BY_DTYPE(dtype, NAME(weighted_sum_body), dst, rows, weights, num_rows, n);
}

/* The lines of dst that lie in it whole are written past the caches. */
TARGET static void NAME(stream)(void *dst, const void *src, size_t bytes) {
    size_t head = -(uintptr_t)dst % 64;
    head = head < bytes ? head : bytes;
    memcpy(dst, src, head);
    size_t i = head;
    for (; i + 64 <= bytes; i += 64)
        for (int v = 0; v < 64 / VECTOR_BYTES; v++) {
            words_t word;
            memcpy(&word, (const char *)src + i + v * VECTOR_BYTES, sizeof word);
            STREAM_STORE((char *)dst + i + v * VECTOR_BYTES, word);
        }
    memcpy((char *)dst + i, (const char *)src + i, bytes - i);
}

static const xccl_kernel_t NAME(kernel) = {
    .name = NAME_STRING,
    .to_float32 = NAME(to_float32),
    .from_float32 = NAME(from_float32),
    .quantize = NAME(quantize),
    .dequantize = NAME(dequantize),
    .weighted_sum = NAME(weighted_sum),
    .stream = NAME(stream),
};

#undef JOIN_
#undef JOIN
#undef NAME
#undef LANES
#undef words_t
#undef ints_t
#undef floats_t
#undef halves_t
#undef SUM_VECTORS
#undef SET
#undef TARGET
#undef VECTOR_BYTES
#undef STREAM_STORE
#undef NAME_STRING
