/* p2p_way.c - whether a large message from an ordinary buffer goes in chunks or is read by the kernel.
 *
 * Chunks are copied twice, by two cores at once, through memory that both have to take from each other's caches. The
 * kernel copies once, for a system call and the look-up of each page. Which is faster depends on the size, on where the
 * two cores are and on the machine, so it is measured for each pair of ranks and each size: by the receiver, which sees
 * both, and which writes its preference, a bit for each size, into the word behind the tail of the sender's ring. Only
 * time depends on it.
 *
 * A message in chunks leaves its sender free as soon as it is in the ring; an offer keeps it until the receiver comes.
 * If that takes longer than chunks would have, the offer is withdrawn for chunks, and the next messages are not offered
 * either. So a rank never waits much longer than it would have to, and a program that sends before it receives on both
 * sides goes on as far as the ring holds its messages. */
#include "cma.h"
#include "copy.h"
#include "p2p.h"

enum {
    LEAST_BYTES = 16 << 10, /* below, the system call alone takes as long as both copies */
    TRIALS = 4,             /* messages with which a size begins: both ways in turn */
    TRY_EVERY = 64,         /* messages: so often the other way is tried */
    PATIENCE_NS = 50000,    /* at least; a few switches between ranks of one core */
    BYTES_PER_NS = 4,       /* chunks go about as fast */
    MOST_LATE = 6           /* a pause is 16 << late messages at most */
};

static uint64_t preference_offset(const xccl_ring_shape_t *shape) {
    return shape->tail_at + sizeof(uint64_t);
}

static int class_of(uint64_t bytes) {
    int class = xccl_cost_class(bytes);
    return class < XCCL_P2P_CLASSES ? class : XCCL_P2P_CLASSES - 1;
}

/* ---- sender ---- */

bool xccl_p2p_offers_by_cma(xccl_p2p_t *p2p, int dest, uint64_t bytes) {
    xccl_p2p_outgoing_t *out = &p2p->outgoing[dest];
    if (bytes < LEAST_BYTES || !xccl_cma_can_read(p2p->world, p2p->comm->ranks[dest]))
        return false;
    if (out->choice.pause > 0) {
        out->choice.pause--;
        return false;
    }
    const _Atomic uint64_t *word = xccl_gas_local(p2p->world, preference_offset(&out->ring.shape));
    uint32_t turn = out->choice.turns[class_of(bytes)]++;
    /* relaxed: nothing is read through it */
    bool chunks = atomic_load_explicit(word, memory_order_relaxed) >> class_of(bytes) & 1;
    bool tries = turn < TRIALS ? turn % 2 == 1 : turn % TRY_EVERY == 0;
    return chunks == tries;
}

int64_t xccl_p2p_patience(uint64_t bytes) {
    int64_t patience = (int64_t)(bytes / BYTES_PER_NS);
    return xccl_now_ns() + (patience > PATIENCE_NS ? patience : PATIENCE_NS);
}

void xccl_p2p_note_offer(xccl_p2p_t *p2p, int dest, bool in_time) {
    xccl_p2p_choice_t *choice = &p2p->outgoing[dest].choice;
    if (in_time) {
        choice->late = 0;
        return;
    }
    choice->pause = 16u << choice->late;
    choice->late += choice->late < MOST_LATE;
}

/* ---- receiver ---- */

void xccl_p2p_note_cost(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, uint64_t bytes, uint64_t ticks, bool by_cma) {
    if (bytes < LEAST_BYTES || p2p->world->header->config.no_cma)
        return;
    int class = class_of(bytes);
    xccl_p2p_costs_t *costs = &in->costs;
    /* the copy in of the first of eight chunks is over before the receiver sees anything */
    xccl_cost_add(by_cma ? &costs->cma[class] : &costs->chunks[class], by_cma ? ticks : ticks + ticks / 8, bytes);
    if (costs->cma[class].samples == 0 || costs->chunks[class].samples == 0)
        return;
    uint64_t bit = 1ull << class;
    bool chunks = xccl_cost_estimate(&costs->chunks[class]) < xccl_cost_estimate(&costs->cma[class]);
    uint64_t prefers = chunks ? costs->prefers_chunks | bit : costs->prefers_chunks & ~bit;
    if (prefers == costs->prefers_chunks)
        return;
    costs->prefers_chunks = prefers;
    _Atomic uint64_t *word = xccl_gas_at(p2p->world, p2p->comm->ranks[in->source], preference_offset(&in->ring.shape));
    /* relaxed: nothing is read through it, and nobody waits for it */
    atomic_store_explicit(word, prefers, memory_order_relaxed);
}
