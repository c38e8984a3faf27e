/* sizes.h - sizes of blocks that cannot wrap around (moe layer; internal). */
#ifndef XCCL_SIZES_H
#define XCCL_SIZES_H

#include "shm.h"

/* Arithmetic that remembers whether any result left 62 bits. */
typedef struct xccl_sizes_t {
    bool overflow;
} xccl_sizes_t;

static inline uint64_t xccl_checked(xccl_sizes_t *sizes, uint64_t value) {
    sizes->overflow |= value > UINT64_MAX >> 2;
    return value;
}

static inline uint64_t xccl_times(xccl_sizes_t *sizes, uint64_t a, uint64_t b) {
    uint64_t product;
    sizes->overflow |= __builtin_mul_overflow(a, b, &product);
    return xccl_checked(sizes, product);
}

static inline uint64_t xccl_plus(xccl_sizes_t *sizes, uint64_t a, uint64_t b) {
    return xccl_checked(sizes, a + b); /* neither exceeds 62 bits, or overflow is set already */
}

static inline uint64_t xccl_whole_lines(xccl_sizes_t *sizes, uint64_t bytes) {
    return xccl_plus(sizes, bytes, XCCL_LINE - 1) / XCCL_LINE * XCCL_LINE;
}

static inline uint64_t xccl_whole_pages(xccl_sizes_t *sizes, uint64_t bytes) {
    return xccl_plus(sizes, bytes, XCCL_PAGE - 1) / XCCL_PAGE * XCCL_PAGE;
}

#endif
