/* wait_look.c - what may end a wait early, and the report of one that timed out. */
#include <stdarg.h>
#include <stdio.h>

#include "shm.h"
#include "status.h"

/* Processes looked up in /proc on each look, besides those waited for: a death is found by somebody soon and
 * marked in the rank table, where all see it. */
enum { PROBES_PER_LOOK = 4, MAX_SLOTS_SHOWN = 16, MAX_RANKS_SHOWN = 64 };

/* ---- what a waiter reports ---- */

typedef struct text_t {
    char buffer[24576];
    size_t length;
} text_t;

static void __attribute__((format(printf, 2, 3))) append(text_t *text, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text->buffer + text->length, sizeof text->buffer - text->length, format, args);
    va_end(args);
    if (n > 0) {
        size_t room = sizeof text->buffer - text->length - 1;
        text->length += (size_t)n < room ? (size_t)n : room;
    }
}

static const char *own_operation(const xccl_world_t *world) {
    return xccl_op_name(atomic_load_explicit(&world->ranks[world->rank].operation, memory_order_relaxed));
}

static int fail_timeout(xccl_world_t *world, const xccl_wait_t *wait) {
    text_t text = {.length = 0};
    char line[256];
    append(&text, "rank %d: %s timed out.", world->rank, own_operation(world));
    xccl_awaited_t slot;
    int missing = 0;
    for (; missing < world->size * 4 && wait->awaited(wait->arg, missing, &slot); missing++) {
        if (missing >= MAX_SLOTS_SHOWN)
            continue;
        if (slot.peer >= 0)
            append(&text, "\n  missing: %s of rank %d, expected %llu, seen %llu", slot.what, slot.peer,
                   (unsigned long long)slot.expected, (unsigned long long)slot.seen);
        else
            append(&text, "\n  missing: %s, expected %llu, seen %llu", slot.what, (unsigned long long)slot.expected,
                   (unsigned long long)slot.seen);
    }
    if (missing > MAX_SLOTS_SHOWN)
        append(&text, "\n  ... and %d more", missing - MAX_SLOTS_SHOWN);
    append(&text, "\nAll ranks:");
    for (int rank = 0; rank < world->size && rank < MAX_RANKS_SHOWN; rank++) {
        xccl_shm_describe_rank(world, rank, line, sizeof line);
        append(&text, "\n  %s", line);
    }
    return xccl_fail(XCCL_ERR_TIMEOUT, "%s", text.buffer);
}

static int fail_lost(xccl_world_t *world, int lost) {
    char line[256];
    xccl_shm_describe_rank(world, lost, line, sizeof line);
    return xccl_fail(XCCL_ERR_PEER_LOST, "rank %d: %s cannot complete, rank %d is lost. Its last state: %s",
                     world->rank, own_operation(world), lost, line);
}

/* ---- who is lost ---- */

static int32_t state_of(const xccl_world_t *world, int rank) {
    return atomic_load_explicit(&world->ranks[rank].state, memory_order_acquire);
}

/* A death that shrink has dealt with: only who waits for that very rank is told. */
static bool is_mourned(const xccl_world_t *world, int rank) {
    return world->mourned[rank / 64] >> (rank % 64) & 1;
}

/* A rank whose death is marked or found now; -1 if none. `turn` spreads the /proc look-ups over all ranks. */
static int find_dead(const xccl_world_t *world, unsigned turn) {
    for (int rank = 0; rank < world->size; rank++)
        if (state_of(world, rank) == XCCL_RANK_DEAD && !is_mourned(world, rank))
            return rank;
    for (unsigned i = 0; i < PROBES_PER_LOOK && i < (unsigned)world->size; i++) {
        int rank = (int)((turn * PROBES_PER_LOOK + i + (unsigned)world->rank) % (unsigned)world->size);
        if (rank != world->rank && !is_mourned(world, rank) && xccl_shm_is_dead(world, rank))
            return rank;
    }
    return -1;
}

/* Everybody else has left: nobody can write what is waited for. */
static int find_last_leaver(const xccl_world_t *world) {
    int leaver = -1;
    for (int rank = 0; rank < world->size; rank++) {
        if (rank == world->rank)
            continue;
        if (state_of(world, rank) != XCCL_RANK_CLOSED)
            return -1;
        leaver = rank;
    }
    return leaver;
}

/* An awaited rank that is dead or has left, or any dead rank; -1 if none. Notes whom this rank waits for. */
static int find_lost(xccl_world_t *world, const xccl_wait_t *wait, unsigned turn) {
    xccl_awaited_t slot;
    for (int i = 0; i < world->size && wait->awaited(wait->arg, i, &slot); i++) {
        if (i == 0)
            atomic_store_explicit(&world->ranks[world->rank].waits_for, slot.peer, memory_order_relaxed);
        if (slot.peer == world->rank)
            continue;
        if (slot.peer < 0) {
            int leaver = find_last_leaver(world);
            if (leaver >= 0)
                return leaver;
        } else if (state_of(world, slot.peer) == XCCL_RANK_CLOSED || xccl_shm_is_dead(world, slot.peer)) {
            return slot.peer;
        }
    }
    return find_dead(world, turn);
}

/* Marks the awaited ranks that are dead, for a wait that goes on without them. */
static int note_deaths(xccl_world_t *world, const xccl_wait_t *wait) {
    xccl_awaited_t slot;
    for (int i = 0; i < world->size && wait->awaited(wait->arg, i, &slot);)
        if (!xccl_shm_is_dead(world, slot.peer)) /* else the wait no longer names it: the next one has its index */
            i++;
    return -1;
}

int xccl_wait_look(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline, unsigned turn) {
    int status = xccl_check_usable(world);
    if (status != XCCL_OK)
        return status;
    int lost = world->outlives_peers ? note_deaths(world, wait) : find_lost(world, wait, turn);
    if (lost >= 0) {
        /* a peer may signal and then leave: its state was read first, so the signal is visible now */
        if (wait->ready(wait->arg))
            return XCCL_OK;
        /* ... and so is the abort that made it leave */
        status = xccl_check_usable(world);
        return status != XCCL_OK ? status : fail_lost(world, lost);
    }
    if (world->outlives_peers && wait->ready(wait->arg))
        return XCCL_OK;
    if (xccl_now_ns() >= deadline)
        return wait->ready(wait->arg) ? XCCL_OK : fail_timeout(world, wait);
    if (world->interrupted && world->interrupted())
        return xccl_fail(XCCL_ERR_INTERRUPTED, "rank %d: %s was interrupted", world->rank, own_operation(world));
    return XCCL_AGAIN;
}
