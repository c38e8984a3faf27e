/* wait_look.c - what may end a wait early. */
#include "shm.h"
#include "status.h"
#include "wait_report.h"

/* Processes looked up in /proc on each look, besides those waited for: a death is found by somebody soon and
 * marked in the rank table, where all see it. */
enum { PROBES_PER_LOOK = 4 };

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
        return status != XCCL_OK ? status : xccl_shm_fail_lost(world, lost, xccl_wait_operation(world));
    }
    if (world->outlives_peers && wait->ready(wait->arg))
        return XCCL_OK;
    if (xccl_now_ns() >= deadline)
        return wait->ready(wait->arg) ? XCCL_OK : xccl_wait_fail_timeout(world, wait);
    if (world->interrupted && world->interrupted())
        return xccl_fail(XCCL_ERR_INTERRUPTED, "rank %d: %s was interrupted", world->rank, xccl_wait_operation(world));
    return XCCL_AGAIN;
}
