/* wait.h - the one wait function of the library (shm layer).
 *
 * A waiter climbs a ladder: spin, then sched_yield, then sleep on its own doorbell futex. How long it stays on a rung
 * follows what this rank has measured: see xccl_ladder_t. Whoever changes a word that a rank may wait for calls
 * xccl_ring() afterwards, which makes a system call only if that rank said that it sleeps. Before each sleep the slow
 * path checks the abort flag, the deadline and whether the ranks waited for are alive. While it waits, a rank also
 * drives the progress hooks of its world (pending sends), so that a rank stuck in one operation never stalls another.
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

/* What a rank has learned about waiting. Nothing but time depends on it.
 *
 * spin       A rank whose core is its own should spin: it sees a word as soon as it comes. One that shares its core
 *            should yield at once, for the rank that it waits for may be waiting for the core. Which of the two holds
 *            is measured, as ranks may be pinned or move, and others may use the machine: when a yield let somebody
 *            else run, it spins half as long, else twice as long.
 * yield_ns   Sleeping costs the waker a system call and the sleeper many times the switch of a yield. So it yields
 *            longer than waits usually last; if they last longer than YIELD_MOST_NS, they are not worth it. */
typedef struct xccl_ladder_t {
    uint64_t spin;     /* polls before the first yield */
    uint64_t yields;   /* yields before it sleeps; 0: yield_ns decides */
    int64_t yield_ns;  /* yields so long before it sleeps */
    uint64_t yielding; /* waits that came to yield */
    bool fixed_spin;   /* spin is the user's */
} xccl_ladder_t;

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

/* Deadline of an operation that starts now, for xccl_wait; resolves XCCL_TIMEOUT_DEFAULT and XCCL_TIMEOUT_NONE. Most
 * operations are over before anybody would look at a clock, so it is no point in time yet: the clock starts when a wait
 * of the operation first gives up spinning, and all further waits of the operation share that start. */
int64_t xccl_deadline(xccl_world_t *world, int64_t timeout_ns);

/* The point in time, on the clock of xccl_now_ns, that a deadline stands for; starts its clock. Needed by whoever
 * compares it, or keeps it beyond the next xccl_deadline. */
int64_t xccl_deadline_at(xccl_world_t *world, int64_t deadline);

/* Waits. OK, or TIMEOUT, PEER_LOST, ABORTED, INTERRUPTED, or what a progress hook failed with. */
int xccl_wait(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline);

/* One look at everything that may end a wait early: abort, deadline, a dead peer, an interrupt. XCCL_AGAIN: go on
 * waiting. `turn` counts the looks of a wait. For the wait function. */
int xccl_wait_look(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline, unsigned turn);

/* Waits as xccl_wait, but deaths do not end it: they are noted in the rank table, for `ready` to see. */
int xccl_wait_for_survivors(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline);

/* Waits until *word >= value. `peer` is the world rank that is to write it. */
int xccl_wait_word(xccl_world_t *world, const _Atomic uint64_t *word, uint64_t value, int peer, const char *what,
                   int64_t deadline);

/* Wakes world rank `rank` if it sleeps. Call it after the store that the rank may wait for. */
void xccl_ring(xccl_world_t *world, int rank);

/* The same for all of `ranks` but this one, with one fence, after the stores for all of them. */
void xccl_ring_members(xccl_world_t *world, const int *ranks, int count);

/* Prepares this rank for xccl_wait and xccl_ring; before it says that it has attached. */
void xccl_wait_open(xccl_world_t *world);

/* Work that a waiting rank does for others. Returns a status; anything negative ends the wait. */
typedef int (*xccl_progress_fn)(void *arg);
int xccl_progress_add(xccl_world_t *world, xccl_progress_fn progress, void *arg);
void xccl_progress_remove(xccl_world_t *world, xccl_progress_fn progress, void *arg);
/* Runs the hooks once. */
int xccl_progress(xccl_world_t *world);

/* Fails with ABORTED, or with USAGE in a forked child or after detach; otherwise OK. For the start of calls. */
int xccl_check_usable(const xccl_world_t *world);

#endif
