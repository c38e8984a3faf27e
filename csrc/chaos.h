/* chaos.h - seeded perturbation of the places where ranks meet (shm layer; internal).
 *
 * It is there only in a world whose configuration asks for it; everywhere else each hook is one branch on a pointer.
 *
 * Two things happen at random. A rank pauses (spins, yields, sleeps) before and after what others wait for, and goes
 * down the wait ladder faster than it would. And a put is held back, whole or in pieces, and becomes visible later, in
 * any order that docs/memory-model.md leaves open: x86 keeps stores in order, so nothing else shows a program that
 * relies on more than the promises.
 *
 * What is to become visible before a store, an addition or a fence follows from the memory order that it has. So a
 * release that is weakened by mistake shows, too: the puts before it stay behind.
 *
 * Each decision is a hash of the seed, the world rank, the kind of the point and how many points of this kind the rank
 * has passed. It depends on no clock and on no other rank, so the same seed perturbs the same way, up to points whose
 * number depends on time itself: chunks that come in several waits, and turns of the wait ladder. */
#ifndef XCCL_CHAOS_H
#define XCCL_CHAOS_H

#include "shm.h"

/* Kinds of points: each has a stream of decisions of its own. */
typedef enum xccl_chaos_point_t {
    XCCL_CHAOS_CALL,  /* a public call begins */
    XCCL_CHAOS_PUT,   /* a put */
    XCCL_CHAOS_ORDER, /* before a store that others wait for, and before fences */
    XCCL_CHAOS_RING,  /* behind that store, before the look whether somebody sleeps */
    XCCL_CHAOS_WAIT,  /* a wait begins */
    XCCL_CHAOS_STALL, /* a wait goes on */
    XCCL_CHAOS_RUNG,  /* a rung of the wait ladder */
    XCCL_CHAOS_SLEEP, /* between arming the doorbell, the last look, and sleep */
    XCCL_CHAOS_WOKEN, /* a wait is over, before what it waited for is read */
    XCCL_CHAOS_APPLY, /* held puts become visible */
    XCCL_CHAOS_POINTS
} xccl_chaos_point_t;

enum { XCCL_CHAOS_ALL = -1 }; /* instead of one rank: every rank */

/* Sets world->chaos if the configuration has a seed. */
int xccl_chaos_open(xccl_world_t *world);
/* What is still held back is lost: a rank that leaves in order has made it visible before. */
void xccl_chaos_close(xccl_world_t *world);

/* ---- the hooks; call those below, which cost a branch where chaos is off ---- */

void xccl_chaos_call_slow(xccl_world_t *world);
void xccl_chaos_pause_slow(xccl_world_t *world, xccl_chaos_point_t point);
void xccl_chaos_stall_slow(xccl_world_t *world);
bool xccl_chaos_skips_slow(xccl_world_t *world);
void xccl_chaos_order_slow(xccl_world_t *world, int rank, memory_order order);
void xccl_chaos_fence_slow(xccl_world_t *world);
bool xccl_chaos_holds_slow(xccl_world_t *world, int rank, void *to, const void *from, uint64_t bytes);
void xccl_chaos_read_slow(xccl_world_t *world, int rank, const void *from, uint64_t bytes);
void xccl_chaos_expose_slow(xccl_world_t *world, int rank, const void *address, uint64_t bytes);

static inline bool xccl_chaos_is_off(const xccl_world_t *world) {
    return __builtin_expect(world->chaos == NULL, 1);
}

/* A public call begins. */
static inline void xccl_chaos_call(xccl_world_t *world) {
    if (!xccl_chaos_is_off(world))
        xccl_chaos_call_slow(world);
}

/* Pauses, perhaps. */
static inline void xccl_chaos_pause(xccl_world_t *world, xccl_chaos_point_t point) {
    if (!xccl_chaos_is_off(world))
        xccl_chaos_pause_slow(world, point);
}

/* A wait has not ended at once. Who this rank waits for may be waiting for its puts: they stay hidden only a while. */
static inline void xccl_chaos_stall(xccl_world_t *world) {
    if (!xccl_chaos_is_off(world))
        xccl_chaos_stall_slow(world);
}

/* A wait is to leave out this rung of its ladder. */
static inline bool xccl_chaos_skips(xccl_world_t *world) {
    return !xccl_chaos_is_off(world) && xccl_chaos_skips_slow(world);
}

/* Before a store, addition or fence with this memory order. Where that is a release, what was put to `rank`, or to any
 * rank with XCCL_CHAOS_ALL, becomes visible now. */
static inline void xccl_chaos_order(xccl_world_t *world, int rank, memory_order order) {
    if (!xccl_chaos_is_off(world))
        xccl_chaos_order_slow(world, rank, order);
}

/* Later puts to a rank come after earlier ones to that rank. */
static inline void xccl_chaos_fence(xccl_world_t *world) {
    if (!xccl_chaos_is_off(world))
        xccl_chaos_fence_slow(world);
}

/* Takes over a put into the window of `rank`. False: the caller is to copy as usual. */
static inline bool xccl_chaos_holds(xccl_world_t *world, int rank, void *to, const void *from, uint64_t bytes) {
    return !xccl_chaos_is_off(world) && xccl_chaos_holds_slow(world, rank, to, from, bytes);
}

/* Before this rank reads in the window of `rank`: it finds there what it has put itself. */
static inline void xccl_chaos_read(xccl_world_t *world, int rank, const void *from, uint64_t bytes) {
    if (!xccl_chaos_is_off(world))
        xccl_chaos_read_slow(world, rank, from, bytes);
}

/* From now on the program may load and store there by itself, where no hook is: puts to it are no longer held back. */
static inline void xccl_chaos_expose(xccl_world_t *world, int rank, const void *address, uint64_t bytes) {
    if (!xccl_chaos_is_off(world))
        xccl_chaos_expose_slow(world, rank, address, bytes);
}

/* Stores a word of any window that others wait for; `order` is a constant, and says what comes before it. A macro, so
 * that it is one for the compiler, too. */
#define XCCL_PUBLISH(world, word, value, order)                                                                        \
    do {                                                                                                               \
        xccl_chaos_order((world), XCCL_CHAOS_ALL, (order));                                                            \
        atomic_store_explicit((word), (value), (order));                                                               \
    } while (0)

#endif
