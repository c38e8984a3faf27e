/* The floor under every latency: how long a cache line takes from one core to another. */
#include <stdatomic.h>
#include <stdbool.h>

#include "gas.h"
#include "status.h"
#include "wait.h"

#define SPINS 20000 /* looks at the word before the peer counts as descheduled: about 10 us */

/* Waits until the own word has `value`. The peer is not rung for each store, because a ring's full fence costs as
 * much as the line itself: whoever gives up spinning rings first, in case the peer sleeps and has not seen its word. */
static int await(xccl_world_t *world, const _Atomic uint64_t *mine, uint64_t value, int peer, int64_t deadline) {
    for (int i = 0; i < SPINS; i++)
        /* acquire: as in every wait, though no data comes with the word */
        if (atomic_load_explicit(mine, memory_order_acquire) >= value)
            return XCCL_OK;
    xccl_ring(world, peer);
    return xccl_wait_word(world, mine, value, peer, "bounce", deadline);
}

int xccl_gas_bounce(xccl_comm_t *comm, uint64_t *signal, int pe, uint64_t rounds, int64_t timeout_ns,
                    uint64_t *out_ns) {
    void *own, *remote;
    int status = xccl_gas_ptr(comm, signal, sizeof *signal, comm->rank, &own);
    if (status == XCCL_OK)
        status = xccl_gas_ptr(comm, signal, sizeof *signal, pe, &remote);
    if (status != XCCL_OK)
        return status;
    if (pe == comm->rank)
        return xccl_fail(XCCL_ERR_USAGE, "rank %d, bounce: the peer must be another rank", comm->rank);
    const _Atomic uint64_t *mine = own;
    _Atomic uint64_t *theirs = remote;
    bool first = comm->rank < pe;
    /* Where the last call ended, read on both ranks from the word of the first: it is written only by the second, which
     * is here, and never before the first has begun. */
    uint64_t base = atomic_load_explicit(first ? mine : theirs, memory_order_relaxed);
    int64_t deadline = xccl_deadline(comm->world, timeout_ns), start = xccl_now_ns();
    int peer = comm->ranks[pe];
    for (uint64_t value = base + 1; value <= base + rounds && status == XCCL_OK; value++) {
        if (!first)
            status = await(comm->world, mine, value, peer, deadline);
        /* release: as in every signal, though no data goes with the word */
        atomic_store_explicit(theirs, value, memory_order_release);
        if (first && status == XCCL_OK)
            status = await(comm->world, mine, value, peer, deadline);
    }
    xccl_ring(comm->world, peer); /* it may sleep before the last word */
    *out_ns = (uint64_t)(xccl_now_ns() - start);
    return status;
}
