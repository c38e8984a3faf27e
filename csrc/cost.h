/* cost.h - what a way to move bytes has cost, to choose between ways (coll and p2p layers; internal).
 *
 * Only time depends on it. A sample is the ticks of one copy; the fastest of the last few counts, for the others were
 * interrupted, or waited for a core. */
#ifndef XCCL_COST_H
#define XCCL_COST_H

#include <stdint.h>

enum { XCCL_COST_WINDOW = 8 }; /* samples */

/* Ticks a byte: the fastest of the current and of the last window. */
typedef struct xccl_cost_t {
    float best, before;
    uint64_t samples;
} xccl_cost_t;

static inline void xccl_cost_add(xccl_cost_t *cost, uint64_t ticks, uint64_t bytes) {
    float value = (float)ticks / (float)bytes;
    if (cost->samples++ % XCCL_COST_WINDOW == 0) {
        cost->before = cost->samples == 1 ? value : cost->best;
        cost->best = value;
    }
    cost->best = value < cost->best ? value : cost->best;
}

/* 0 if not known. */
static inline float xccl_cost_estimate(const xccl_cost_t *cost) {
    return cost->best < cost->before ? cost->best : cost->before;
}

/* Costs are kept apart by size: what fits a cache and what does not have nothing in common. */
static inline int xccl_cost_class(uint64_t bytes) {
    return 63 - __builtin_clzll(bytes | 1);
}

#endif
