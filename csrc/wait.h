/* wait.h - the one wait function of the library (shm layer).
 *
 * A waiter climbs a ladder: spin, then sched_yield, then sleep on its own doorbell futex. Whoever changes a
 * word that a rank may wait for calls xccl_ring() afterwards, which makes a system call only if that rank
 * said that it sleeps. Before each sleep the slow path checks the abort flag, the deadline and whether the
 * ranks waited for are alive. While it waits, a rank also drives the progress hooks of its world (pending
 * sends), so that a rank stuck in one operation never stalls another.
 */
#ifndef XCCL_WAIT_H
#define XCCL_WAIT_H

#include <stdatomic.h>
#include <stdbool.h>

#include "xccl.h"

/* One thing that a waiter still lacks, for the report. */
typedef struct xccl_awaited_t {
    int peer;          /* world rank */
    uint64_t expected; /* in the unit of the slot: an epoch, a counter, a signal's value */
    uint64_t seen;
    const char *what; /* "barrier round", "field", ... */
} xccl_awaited_t;

typedef struct xccl_wait_t {
    /* True once the wait is over. Called again and again: reads with acquire order, no side effect needed. */
    bool (*ready)(void *arg);
    /* Describes the index-th slot that is still missing; false when there are fewer. Called in the slow path
     * only. Ranks named here must be alive; a rank that has left counts as lost only if it is named here. */
    bool (*awaited)(void *arg, int index, xccl_awaited_t *out);
    void *arg;
} xccl_wait_t;

/* CLOCK_MONOTONIC in nanoseconds. */
int64_t xccl_now_ns(void);

/* Absolute deadline of a call that starts now; resolves XCCL_TIMEOUT_DEFAULT and XCCL_TIMEOUT_NONE. */
int64_t xccl_deadline(const xccl_world_t *world, int64_t timeout_ns);

/* Waits. OK, or TIMEOUT, PEER_LOST, ABORTED, INTERRUPTED, or what a progress hook failed with. */
int xccl_wait(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline);

/* Waits until *word >= value. `peer` is the world rank that is to write it. */
int xccl_wait_word(xccl_world_t *world, const _Atomic uint64_t *word, uint64_t value, int peer, const char *what,
                   int64_t deadline);

/* Wakes world rank `rank` if it sleeps. Call it after the store that the rank may wait for. */
void xccl_ring(xccl_world_t *world, int rank);

/* Work that a waiting rank does for others. Returns a status; anything negative ends the wait. */
typedef int (*xccl_progress_fn)(void *arg);
int xccl_progress_add(xccl_world_t *world, xccl_progress_fn progress, void *arg);
void xccl_progress_remove(xccl_world_t *world, xccl_progress_fn progress, void *arg);
/* Runs the hooks once. */
int xccl_progress(xccl_world_t *world);

/* Fails with ABORTED, or with USAGE in a forked child or after detach; otherwise OK. For the start of calls. */
int xccl_check_usable(const xccl_world_t *world);

#endif
