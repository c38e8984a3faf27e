/* racecheck.h - the happens-before checker as the other layers see it (gas layer; internal).
 *
 * It is there only in a world whose configuration asks for it; everywhere else each hook is one branch on a pointer.
 *
 * Every rank keeps a vector clock: how far it knows that each rank has come. A signal, an atomic, a barrier, a
 * collective and a message carry the clock of who sends it to who waits for it. Every access to the app data area that
 * a public operation makes, or that the program declares, is written down beside the 64-byte line it goes to, with the
 * clock of its rank. Two accesses of two ranks to one byte, one of them a write, are a race if neither rank's clock
 * says that it knew of the other's: the rank that comes second gets a XCCL_ERR_RACE that names both.
 *
 * Where order is not known exactly, more is taken for ordered than is, never less: a report is always a race.
 */
#ifndef XCCL_RACECHECK_H
#define XCCL_RACECHECK_H

#include "comm.h"

typedef struct xccl_race_word_t xccl_race_word_t;

/* What an access does. */
enum {
    XCCL_RACE_READ = 0,
    XCCL_RACE_WRITE = 1,
    XCCL_RACE_ATOMIC = 2, /* does not conflict with its like */
    XCCL_RACE_PUT = 4     /* complete only after quiet, or a signal to the rank it goes to */
};

/* Operations besides those of xccl_op_t. */
typedef enum xccl_race_op_t {
    XCCL_RACE_OP_PUT = 64,
    XCCL_RACE_OP_GET,
    XCCL_RACE_OP_PUT_SIGNAL,
    XCCL_RACE_OP_SIGNAL_OP,
    XCCL_RACE_OP_ATOMIC,
    XCCL_RACE_OP_LOCAL_READ,
    XCCL_RACE_OP_LOCAL_WRITE
} xccl_race_op_t;

/* Name of an xccl_op_t or an xccl_race_op_t. */
const char *xccl_race_op_name(int op);

/* Clocks that members of a communicator publish when they enter an operation, and join when it is over. */
typedef enum xccl_race_slot_t {
    XCCL_RACE_SYNC, /* xccl_comm_sync */
    XCCL_RACE_COLL,
    XCCL_RACE_DISPATCH,
    XCCL_RACE_COMBINE,
    XCCL_RACE_A2E,
    XCCL_RACE_E2A
} xccl_race_slot_t;

enum { XCCL_RACE_ALL = -1 }; /* instead of one rank: every rank */

/* What a collective reads and writes. */
typedef struct xccl_race_buffers_t {
    const void *x;
    uint64_t x_bytes;
    const void *out;
    uint64_t out_bytes;
} xccl_race_buffers_t;

/* A send or receive. */
typedef struct xccl_race_transfer_t {
    bool is_send;
    bool was_asked_for; /* send: the receiver is known to have called receive */
    const void *buffer;
    uint64_t bytes;
    int rank;      /* world rank of the other side */
    uint32_t site; /* where the program began it */
} xccl_race_transfer_t;

/* ---- opening ---- */

/* Bytes of a window that the checker takes; 0 if `config` does not ask for it. */
uint64_t xccl_race_window_bytes(const xccl_config_t *config);

/* Reserves what the checker needs of the own window, and sets world->race. Does nothing where it is off. */
int xccl_race_open(xccl_world_t *world);
void xccl_race_close(xccl_world_t *world);

/* Reserves, or clears, what is noted of a block of the own app data area. */
int xccl_race_reserve_slow(xccl_world_t *world, uint64_t offset, uint64_t bytes);
void xccl_race_forget_slow(xccl_world_t *world, uint64_t offset, uint64_t bytes);

/* ---- the hooks; call those below, which cost a branch where the checker is off ---- */

/* Where the program is: see xccl_race_set_site. */
uint32_t xccl_race_site(const xccl_world_t *world);

int xccl_race_touch_slow(xccl_world_t *world, const void *address, uint64_t bytes, int flags, int op);
xccl_race_word_t *xccl_race_hold_slow(xccl_world_t *world, const void *word);
void xccl_race_signalled_slow(xccl_world_t *world, xccl_race_word_t *held, const void *word, int rank, bool is_add);
void xccl_race_updated_slow(xccl_world_t *world, xccl_race_word_t *held, const void *word, uint64_t value, bool wrote);
void xccl_race_waited_slow(xccl_world_t *world, const void *word, uint64_t seen);
void xccl_race_fence_slow(xccl_world_t *world);
void xccl_race_quiet_slow(xccl_world_t *world);
void xccl_race_publish_slow(const xccl_comm_t *comm, xccl_race_slot_t slot, uint64_t epoch);
void xccl_race_join_slow(const xccl_comm_t *comm, xccl_race_slot_t slot, uint64_t epoch, int pe);
int xccl_race_buffers_slow(xccl_world_t *world, xccl_race_buffers_t buffers);
void xccl_race_sending_slow(xccl_world_t *world, int rank);
void xccl_race_receiving_slow(const xccl_comm_t *comm, int source);
int xccl_race_completed_slow(xccl_world_t *world, const xccl_race_transfer_t *transfer);

static inline bool xccl_race_is_off(const xccl_world_t *world) {
    return __builtin_expect(world->race == NULL, 1);
}

static inline int xccl_race_reserve(xccl_world_t *world, uint64_t offset, uint64_t bytes) {
    return xccl_race_is_off(world) ? XCCL_OK : xccl_race_reserve_slow(world, offset, bytes);
}
static inline void xccl_race_forget(xccl_world_t *world, uint64_t offset, uint64_t bytes) {
    if (!xccl_race_is_off(world))
        xccl_race_forget_slow(world, offset, bytes);
}

/* Notes an access by this rank to memory of any window; RACE if it races with one noted before. Memory that is not in
 * an app data area is nobody's concern. */
static inline int xccl_race_touch(xccl_world_t *world, const void *address, uint64_t bytes, int flags, int op) {
    return xccl_race_is_off(world) ? XCCL_OK : xccl_race_touch_slow(world, address, bytes, flags, op);
}

/* Around a change of a word that others wait for: between the two nobody else changes it, so that its values and their
 * clocks go together. */
static inline xccl_race_word_t *xccl_race_hold(xccl_world_t *world, const void *word) {
    return xccl_race_is_off(world) ? NULL : xccl_race_hold_slow(world, word);
}
/* This rank has set, or added to, the word of `rank`. */
static inline void xccl_race_signalled(xccl_world_t *world, xccl_race_word_t *held, const void *word, int rank,
                                       bool is_add) {
    if (held)
        xccl_race_signalled_slow(world, held, word, rank, is_add);
}
/* This rank has read the word by an atomic operation, and `wrote` it. */
static inline void xccl_race_updated(xccl_world_t *world, xccl_race_word_t *held, const void *word, uint64_t value,
                                     bool wrote) {
    if (held)
        xccl_race_updated_slow(world, held, word, value, wrote);
}

/* A wait has ended with `seen` in the word. */
static inline void xccl_race_waited(xccl_world_t *world, const void *word, uint64_t seen) {
    if (!xccl_race_is_off(world))
        xccl_race_waited_slow(world, word, seen);
}
static inline void xccl_race_fence(xccl_world_t *world) {
    if (!xccl_race_is_off(world))
        xccl_race_fence_slow(world);
}
static inline void xccl_race_quiet(xccl_world_t *world) {
    if (!xccl_race_is_off(world))
        xccl_race_quiet_slow(world);
}

/* This member enters operation `epoch` of a kind; before it tells any other. */
static inline void xccl_race_publish(const xccl_comm_t *comm, xccl_race_slot_t slot, uint64_t epoch) {
    if (!xccl_race_is_off(comm->world))
        xccl_race_publish_slow(comm, slot, epoch);
}
/* This member has seen that member `pe`, or all with XCCL_RACE_ALL, entered operation `epoch`. */
static inline void xccl_race_join(const xccl_comm_t *comm, xccl_race_slot_t slot, uint64_t epoch, int pe) {
    if (!xccl_race_is_off(comm->world))
        xccl_race_join_slow(comm, slot, epoch, pe);
}

/* The current operation reads and writes these: noted when it begins and again when it is over, since peers may be
 * through it earlier. */
static inline int xccl_race_enter(const xccl_comm_t *comm, xccl_race_slot_t slot, uint64_t epoch,
                                  xccl_race_buffers_t buffers) {
    if (xccl_race_is_off(comm->world))
        return XCCL_OK;
    int status = xccl_race_buffers_slow(comm->world, buffers);
    xccl_race_publish_slow(comm, slot, epoch);
    return status;
}
static inline int xccl_race_leave(const xccl_comm_t *comm, xccl_race_slot_t slot, uint64_t epoch, int pe,
                                  xccl_race_buffers_t buffers) {
    if (xccl_race_is_off(comm->world))
        return XCCL_OK;
    xccl_race_join_slow(comm, slot, epoch, pe);
    return xccl_race_buffers_slow(comm->world, buffers);
}

/* Before a message to world rank `rank` leaves. */
static inline void xccl_race_sending(xccl_world_t *world, int rank) {
    if (!xccl_race_is_off(world))
        xccl_race_sending_slow(world, rank);
}
/* Before a receive from member `source`, or from any: XCCL_RACE_ALL. */
static inline void xccl_race_receiving(const xccl_comm_t *comm, int source) {
    if (!xccl_race_is_off(comm->world))
        xccl_race_receiving_slow(comm, source);
}
/* The program learns that a send or receive is complete. */
static inline int xccl_race_completed(xccl_world_t *world, const xccl_race_transfer_t *transfer) {
    return xccl_race_is_off(world) ? XCCL_OK : xccl_race_completed_slow(world, transfer);
}

#endif
