/* p2p_offer.c - messages that are copied once, from where they are.
 *
 * The receiver of an offer copies from the sender's window, or from its process. While it does, the sender of a
 * blocking send would only wait. If it is awake and the message is long, both copy: a core alone keeps memory busy for
 * half the time. They claim blocks of the message in turn, by a counter in the acknowledgement
 * line:
 *
 *     receiver                                       sender
 *     OFFERED -> TAKEN
 *     target, then joint = number            -->     sees its message's number
 *     claims a block, copies it from the source      claims a block, copies it to the target, counts `sent`
 *     ...                                            ...
 *     waits for the sender's last block
 *     RECEIVED                               -->     its buffer is the caller's again
 *
 * A sender that does not look (it is in another call, or stopped) claims nothing, and the receiver copies all. Only a
 * receive that blocks does this: it may have to wait for the block that the sender is at. */
#include "cma.h"
#include "copy.h"
#include "p2p.h"

enum {
    BLOCK = 64 << 10, /* half of it for messages of less than two: each gets a part */
    LEAST_BLOCKS = 2,
    COPY_SECONDS = 60 /* a block takes microseconds: the sender is stopped, or dead */
};

static xccl_p2p_ack_line_t *ack_line(const xccl_p2p_t *p2p, int member, uint64_t ack) {
    return xccl_gas_at(p2p->world, p2p->comm->ranks[member], xccl_p2p_ack_offset(p2p, ack));
}

void xccl_p2p_acknowledge(xccl_p2p_t *p2p, int source, uint64_t ack, uint64_t number) {
    if (ack != 0)
        xccl_gas_signal_at(p2p->world, p2p->comm->ranks[source], xccl_p2p_ack_offset(p2p, ack),
                           xccl_p2p_ack_word(number, XCCL_P2P_RECEIVED));
}

/* ---- offers ---- */

bool xccl_p2p_offer_lives(const xccl_p2p_t *p2p, int source, uint64_t ack, uint64_t number) {
    return xccl_gas_load(&ack_line(p2p, source, ack)->state) == xccl_p2p_ack_word(number, XCCL_P2P_OFFERED);
}

int xccl_p2p_check_offer(const xccl_p2p_t *p2p, int source, const xccl_p2p_field_t *field) {
    uint64_t stride = p2p->world->stride, bytes = xccl_p2p_bytes_of(field), ack = field->body.at.ack;
    if (ack - 1 >= XCCL_P2P_MAX_ACKS)
        return xccl_comm_fail_damaged(p2p->comm, source, "acknowledgement line of an offer", ack, 1, XCCL_P2P_MAX_ACKS);
    if (xccl_p2p_kind_of(field) == XCCL_P2P_CMA_OFFER)
        return XCCL_OK; /* the kernel checks an address in the sender's process */
    if (bytes > stride)
        return xccl_comm_fail_damaged(p2p->comm, source, "bytes of an offer", bytes, 0, stride);
    if (!xccl_gas_in_window(p2p->world, field->body.at.offset, bytes))
        return xccl_comm_fail_damaged(p2p->comm, source, "offset of an offer", field->body.at.offset, 0,
                                      stride - bytes);
    return XCCL_OK;
}

/* From TAKEN on the sender leaves the buffer alone until it is acknowledged (bug classes 7, 11). The swap also orders
 * the copy after the sender's stores to the buffer. */
static bool claim_offer(xccl_p2p_t *p2p, int source, const xccl_p2p_offer_t *offer) {
    uint64_t offered = xccl_p2p_ack_word(offer->number, XCCL_P2P_OFFERED);
    return xccl_gas_compare_swap_at(p2p->world, p2p->comm->ranks[source], xccl_p2p_ack_offset(p2p, offer->ack), offered,
                                    xccl_p2p_ack_word(offer->number, XCCL_P2P_TAKEN)) == offered;
}

/* Copies [at, at+bytes) of a message of `whole` bytes from its source. */
static int pull(xccl_p2p_t *p2p, int source, const xccl_p2p_offer_t *offer, unsigned char *buffer, uint64_t at,
                uint64_t bytes, uint64_t whole) {
    int rank = p2p->comm->ranks[source];
    if (offer->kind == XCCL_P2P_CMA_OFFER)
        return xccl_cma_read(p2p->world, rank, buffer + at, offer->offset + at, bytes);
    xccl_copy_part(buffer + at, xccl_gas_at(p2p->world, rank, offer->offset + at), bytes, whole,
                   p2p->world->streaming_bytes);
    return XCCL_OK;
}

static void finish(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, const xccl_p2p_offer_t *offer, uint64_t bytes,
                   uint64_t start) {
    if (offer->kind == XCCL_P2P_CMA_OFFER)
        xccl_p2p_note_cost(p2p, in, bytes, xccl_ticks() - start, true);
    xccl_p2p_acknowledge(p2p, in->source, offer->ack, offer->number);
}

int xccl_p2p_take_offer(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, const xccl_p2p_offer_t *offer, void *buffer,
                        uint64_t bytes) {
    if (!claim_offer(p2p, in->source, offer))
        return XCCL_AGAIN;
    uint64_t start = xccl_ticks();
    int status = pull(p2p, in->source, offer, buffer, 0, bytes, bytes);
    if (status == XCCL_OK)
        finish(p2p, in, offer, bytes, start);
    return status;
}

/* ---- both ends copy ---- */

static uint64_t block_bytes(uint64_t bytes) {
    return bytes < 2 * BLOCK ? BLOCK / 2 : BLOCK;
}

static uint64_t num_blocks(uint64_t bytes) {
    return (bytes + block_bytes(bytes) - 1) / block_bytes(bytes);
}

/* Bytes of the next block that nobody has claimed, 0: there is none. */
static uint64_t claim_block(xccl_p2p_ack_line_t *line, uint64_t bytes, uint64_t *out_at) {
    /* relaxed: each number is given once, and that is all that matters */
    uint64_t block = atomic_fetch_add_explicit(&line->claimed, 1, memory_order_relaxed);
    if (block >= num_blocks(bytes))
        return 0;
    uint64_t length = block_bytes(bytes);
    *out_at = block * length;
    return bytes - *out_at < length ? bytes - *out_at : length;
}

/* Lets the sender copy to `buffer` as well; false if it cannot. */
static bool open_target(xccl_p2p_t *p2p, int source, const xccl_p2p_offer_t *offer, void *buffer, uint64_t bytes) {
    xccl_world_t *world = p2p->world;
    int rank = p2p->comm->ranks[source];
    xccl_p2p_ack_line_t *line = ack_line(p2p, source, offer->ack);
    uint64_t offset;
    bool in_window = xccl_gas_is_symmetric(world, buffer, bytes, &offset);
    /* One that sleeps has given its core away: it would come too late. Who may read a process may write to it.
     * relaxed: only time depends on it */
    if (num_blocks(bytes) < LEAST_BLOCKS || (!in_window && !xccl_cma_can_read(world, rank)) ||
        atomic_load_explicit(&world->ranks[rank].sleeping, memory_order_relaxed) != 0)
        return false;
    line->target = in_window ? offset : (uint64_t)(uintptr_t)buffer;
    line->in_window = in_window;
    uint64_t at = xccl_p2p_ack_offset(p2p, offer->ack) + offsetof(xccl_p2p_ack_line_t, joint);
    xccl_gas_signal_at(world, rank, at, offer->number);
    return true;
}

/* Copies what the sender leaves, and waits for its part. */
static int pull_jointly(xccl_p2p_t *p2p, int source, const xccl_p2p_offer_t *offer, void *buffer, uint64_t bytes) {
    xccl_p2p_ack_line_t *line = ack_line(p2p, source, offer->ack);
    uint64_t at, length, mine = 0;
    for (; (length = claim_block(line, bytes, &at)) > 0; mine++) {
        int status = pull(p2p, source, offer, buffer, at, length, bytes);
        if (status != XCCL_OK)
            return status;
    }
    /* past the deadline of the call, too: the sender may be writing to the buffer */
    return xccl_wait_word(p2p->world, &line->sent, num_blocks(bytes) - mine, p2p->comm->ranks[source], "last block",
                          xccl_now_ns() + COPY_SECONDS * 1000000000ll);
}

int xccl_p2p_take_offer_jointly(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, const xccl_p2p_offer_t *offer, void *buffer,
                                uint64_t bytes) {
    if (!claim_offer(p2p, in->source, offer))
        return XCCL_AGAIN;
    uint64_t start = xccl_ticks();
    int status = open_target(p2p, in->source, offer, buffer, bytes)
                     ? pull_jointly(p2p, in->source, offer, buffer, bytes)
                     : pull(p2p, in->source, offer, buffer, 0, bytes, bytes);
    if (status == XCCL_OK)
        finish(p2p, in, offer, bytes, start);
    return status;
}

static int push_block(xccl_request_t *send, const xccl_p2p_ack_line_t *line, uint64_t at, uint64_t bytes) {
    const xccl_p2p_t *p2p = send->p2p;
    xccl_world_t *world = p2p->world;
    int rank = p2p->comm->ranks[send->peer];
    uint64_t target = xccl_gas_read(&line->target);
    if (!xccl_gas_read(&line->in_window))
        return xccl_cma_write(world, rank, send->buffer + at, target + at, bytes);
    if (!xccl_gas_in_window(world, target, send->bytes))
        return xccl_comm_fail_damaged(p2p->comm, send->peer, "target of an offer", target, 0,
                                      world->stride - send->bytes);
    xccl_copy_part(xccl_gas_at(world, rank, target + at), send->buffer + at, bytes, send->bytes,
                   world->streaming_bytes);
    return XCCL_OK;
}

int xccl_p2p_help(xccl_request_t *send) {
    xccl_p2p_t *p2p = send->p2p;
    xccl_p2p_ack_line_t *line = ack_line(p2p, p2p->comm->rank, send->ack);
    /* acquire (in the load) pairs with the release of the receiver's signal: the target is there */
    if (send->helped || xccl_gas_load(&line->joint) != send->number)
        return XCCL_OK;
    send->helped = true;
    uint64_t at, length, sent = 0;
    while ((length = claim_block(line, send->bytes, &at)) > 0) {
        int status = push_block(send, line, at, length);
        if (status != XCCL_OK)
            return status;
        /* release: the block is there for who sees the count */
        XCCL_PUBLISH(p2p->world, &line->sent, ++sent, memory_order_release);
    }
    xccl_ring(p2p->world, p2p->comm->ranks[send->peer]);
    return XCCL_OK;
}
