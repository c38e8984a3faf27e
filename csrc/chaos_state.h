/* chaos_state.h - what a rank's perturbation consists of: between chaos.c and chaos_puts.c. */
#ifndef XCCL_CHAOS_STATE_H
#define XCCL_CHAOS_STATE_H

#include "chaos.h"

enum {
    XCCL_CHAOS_HELD = 32, /* pieces of puts held back at once */
    XCCL_CHAOS_EXPOSED =
        64, /* ranges noted that the program has pointers to; with more, every put is visible at once */
    XCCL_CHAOS_PIECE = 65536, /* bytes: longer pieces are visible at once */
};

/* A piece of a put that nobody has seen yet. */
typedef struct xccl_chaos_held_t {
    unsigned char *data; /* NULL: the place is free */
    unsigned char *to;
    uint64_t bytes;
    int rank;
    uint64_t fences; /* before it */
    uint64_t number; /* in the order of the program */
} xccl_chaos_held_t;

typedef struct xccl_chaos_range_t {
    uintptr_t from, to;
    int rank;
} xccl_chaos_range_t;

struct xccl_chaos_t {
    uint64_t seed;
    uint64_t key;  /* of seed and world rank */
    unsigned mood; /* how this rank pauses */
    uint64_t passed[XCCL_CHAOS_POINTS];
    xccl_chaos_held_t held[XCCL_CHAOS_HELD];
    uint64_t fences, puts;
    xccl_chaos_range_t exposed[XCCL_CHAOS_EXPOSED];
    int num_exposed; /* XCCL_CHAOS_EXPOSED + 1: more than were noted */
};
typedef struct xccl_chaos_t xccl_chaos_t;

/* The decision at the next point of a kind: 64 random bits. */
uint64_t xccl_chaos_draw(xccl_chaos_t *chaos, xccl_chaos_point_t point);

bool xccl_chaos_holds_any(const xccl_chaos_t *chaos);

/* What was put to `rank`, or to any rank with XCCL_CHAOS_ALL, becomes visible now. */
void xccl_chaos_apply(xccl_world_t *world, int rank);

#endif
