/* comm.h - communicators: an ordered set of world ranks with a context of its own (gas layer).
 *
 * Two communicators never share a word: each has a context number, and a context has its own page in the boot
 * area of every window. Everything else (fields, rings, staging) the layers above allocate from the heaps.
 * Here are the two primitives that the heap needs, and on which collectives build: sync and agree.
 */
#ifndef XCCL_COMM_H
#define XCCL_COMM_H

#include "shm.h"

enum { XCCL_AGREE_BYTES = 64, XCCL_SYNC_ROUNDS = 16, XCCL_SHRINK_ATTEMPTS = 64 };

/*   context page of a window, written by peers only, except the agreement slots (written by the owner)
 *   | sync line of round 0 | ... | round 15 | agreement slot 0 | slot 1 |
 *
 *   A sync line holds the epoch of the last barrier in which that round's partner signalled. It has one
 *   writer, and epochs only grow, so a wait for ">= epoch" can neither miss nor double-count (bug classes 3, 4).
 */
typedef struct xccl_sync_line_t {
    _Alignas(64) _Atomic uint64_t epoch;
} xccl_sync_line_t;

/* What shrink.c needs of each member of the communicator that loses some. */
typedef struct xccl_shrink_page_t {
    /* written by the owner; progress last, with release order */
    _Alignas(64) _Atomic uint64_t progress; /* 4 * attempt + step: only grows */
    uint64_t contexts_used[XCCL_MAX_CONTEXTS / 64];
    uint64_t context;                   /* its proposal: the new communicator's context, */
    uint64_t view[XCCL_MAX_RANKS / 64]; /* and its world ranks */
    /* in the page of member 0, written by anybody, once: 0 is undecided */
    _Atomic uint64_t decision[XCCL_SHRINK_ATTEMPTS]; /* member whose proposal stands, + 1 */
    _Atomic uint64_t commit[XCCL_SHRINK_ATTEMPTS];
} xccl_shrink_page_t;

typedef struct xccl_context_page_t {
    xccl_sync_line_t sync[XCCL_SYNC_ROUNDS];
    _Alignas(64) unsigned char agree[2][XCCL_AGREE_BYTES];
    xccl_shrink_page_t shrink;
} xccl_context_page_t;
_Static_assert(sizeof(xccl_context_page_t) <= XCCL_PAGE, "a context is one page");

struct xccl_comm_t {
    xccl_world_t *world;
    int context;
    int rank, size;
    int *ranks; /* world rank of each member */
    uint64_t sync_epoch;
    uint64_t agree_epoch;
    uint64_t shrink_attempts; /* that failed, for all survivors */
    bool broken;              /* an operation failed halfway: members no longer agree on epochs */
    struct xccl_coll_t *coll; /* owned by coll.c */
    struct xccl_p2p_t *p2p;   /* owned by p2p.c */
};

/* The communicator of all ranks, context 0, without the layers above. Local; the ranks must be attached. */
int xccl_comm_create_world(xccl_world_t *world, xccl_comm_t **out);

/* split without the layers above. Collective over `parent`. */
int xccl_comm_create_split(xccl_comm_t *parent, int64_t color, int64_t key, int64_t deadline, xccl_comm_t **out);

/* The communicator of these world ranks, this one among them, without the layers above; clears the own page of
 * `context`. Local: no peer may signal before it knows that the page is cleared. */
int xccl_comm_create_view(xccl_world_t *world, int context, int size, const int *ranks, xccl_comm_t **out);

/* A member's page of the communicator's context. */
xccl_context_page_t *xccl_comm_page(const xccl_comm_t *comm, int world_rank);

/* Gives the context back and frees the handle. Nobody may use the communicator any more. */
void xccl_comm_destroy(xccl_comm_t *comm);

/* Returns when every member has arrived (a dissemination barrier), and all that a member wrote before is visible. */
int xccl_comm_sync(xccl_comm_t *comm, int64_t deadline);

/* Every member gives XCCL_AGREE_BYTES and gets those of all members, in member order, in `all`
 * (comm->size * XCCL_AGREE_BYTES). Collective. */
int xccl_comm_agree(xccl_comm_t *comm, const void *mine, void *all, int64_t deadline);

/* OK if a call on `comm` may start: not aborted, not broken, not detached, not in a forked child. */
int xccl_comm_check(const xccl_comm_t *comm);

/* `pe` is a member, else USAGE naming `operation`. */
int xccl_comm_check_pe(const xccl_comm_t *comm, int pe, const char *operation);

/* SYSTEM: a word in shared memory that member `pe` wrote is not in [least, most], so that somebody else must have
 * written it. Names this rank, its operation and all of these. */
int xccl_comm_fail_damaged(const xccl_comm_t *comm, int pe, const char *field, uint64_t got, uint64_t least,
                           uint64_t most);

/* Marks the communicator unusable when `status` is an error that leaves its members out of step; returns it. */
int xccl_comm_settle(xccl_comm_t *comm, int status);

#endif
