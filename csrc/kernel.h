/*
 * kernel: arithmetic on rows of numbers.
 *
 * Nothing here knows about ranks or shared memory. Every function has one source body, compiled several
 * times for wider and wider vectors (kernel_set.h); xccl_kernel_t holds one set. All sets give the same bits, and the
 * same bits as xccl/reference.py (NumPy and ml_dtypes): only IEEE-754 single operations in a fixed order, each rounded
 * to nearest even. kernel.c must therefore be compiled with -ffp-contract=off, without -ffast-math.
 *
 * Rows need no alignment beyond that of their element type. Rows given to one call do not overlap.
 */
#ifndef XCCL_KERNEL_H
#define XCCL_KERNEL_H

#include "xccl.h"

typedef struct {
    const char *name; /* "scalar", "avx2", "avx512" */

    /* dst[i] = (float32) src[i]; exact. */
    void (*to_float32)(xccl_dtype_t dtype, float *dst, const void *src, size_t n);

    /* dst[i] = src[i] rounded to dtype, ties to even. A NaN becomes the one that NumPy and ml_dtypes give. */
    void (*from_float32)(xccl_dtype_t dtype, void *dst, const float *src, size_t n);

    /*
     * q[i] = x[i] in units of the returned scale, which is max|x| / 127. A row whose scale is below FLT_MIN
     * is all zeros with scale 0; a row with an inf or a NaN is all zeros with scale NaN, so that the
     * receiver sees NaN and not a wrong number.
     */
    float (*quantize)(xccl_dtype_t dtype, int8_t *q, const void *x, size_t n);

    /* dst[i] = q[i] * scale in float32, rounded to dtype. */
    void (*dequantize)(xccl_dtype_t dtype, void *dst, const int8_t *q, float scale, size_t n);

    /*
     * dst[i] = sum over j of weights[j] * rows[j][i], from zero, j ascending, in float32, rounded once to
     * dtype. weights NULL: plain sum. num_rows 0 gives zeros.
     */
    void (*weighted_sum)(xccl_dtype_t dtype, void *dst, const void *const *rows, const float *weights, size_t num_rows,
                         size_t n);

    /* memcpy past the caches, for what exceeds them: the lines need not be read before they are written. The
     * writes are in no order with later ones until xccl_kernel_stream_end. */
    void (*stream)(void *dst, const void *src, size_t bytes);
} xccl_kernel_t;

/* Orders what was streamed before all later stores, those of a release too. */
static inline void xccl_kernel_stream_end(void) {
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
}

/* The set for this width, or NULL if this processor (or this build) does not have it. */
const xccl_kernel_t *xccl_kernel_get(xccl_simd_t simd);

/* Bytes of one element. */
size_t xccl_kernel_itemsize(xccl_dtype_t dtype);

#endif
