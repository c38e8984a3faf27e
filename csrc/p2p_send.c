#include "p2p.h"

#include <stdlib.h>

#include "copy.h"
#include "heap.h"
#include "status.h"

/* ---- acknowledgement lines ---- */

static uint64_t load_ack(const xccl_request_t *send) {
    return xccl_gas_load(xccl_gas_local(send->p2p->world, xccl_p2p_ack_offset(send->p2p, send->ack)));
}

/* Reserves one more page of lines. */
static int grow_acks(xccl_p2p_t *p2p) {
    enum { LINES_PER_PAGE = XCCL_PAGE / XCCL_LINE };
    uint64_t lines = p2p->num_acks + LINES_PER_PAGE;
    uint32_t *free_acks = realloc(p2p->free_acks, lines * sizeof *free_acks);
    if (!free_acks)
        return xccl_fail(XCCL_ERR_MEMORY, "no memory for %llu acknowledgements", (unsigned long long)lines);
    p2p->free_acks = free_acks;
    int status = xccl_heap_commit(p2p->world, xccl_p2p_ack_offset(p2p, p2p->num_acks + 1), XCCL_PAGE);
    if (status != XCCL_OK)
        return status;
    for (uint64_t ack = lines; ack > p2p->num_acks; ack--)
        free_acks[p2p->num_free_acks++] = (uint32_t)ack;
    p2p->num_acks = lines;
    return XCCL_OK;
}

/* Gives the send a line of its own. AGAIN: so many wait already that this one has to queue. */
static int take_ack(xccl_request_t *send) {
    xccl_p2p_t *p2p = send->p2p;
    if (p2p->num_free_acks == 0) {
        if (p2p->num_acks == XCCL_P2P_MAX_ACKS)
            return XCCL_AGAIN;
        int status = grow_acks(p2p);
        if (status != XCCL_OK)
            return status;
    }
    send->ack = p2p->free_acks[--p2p->num_free_acks];
    send->number = ++p2p->next_number;
    xccl_p2p_ack_line_t *line = xccl_gas_local(p2p->world, xccl_p2p_ack_offset(p2p, send->ack));
    /* relaxed: the offer, published later with release, is what leads anybody here */
    atomic_store_explicit(&line->joint, 0, memory_order_relaxed);
    atomic_store_explicit(&line->claimed, 0, memory_order_relaxed);
    atomic_store_explicit(&line->sent, 0, memory_order_relaxed);
    atomic_store_explicit(&line->state, xccl_p2p_ack_word(send->number, XCCL_P2P_OFFERED), memory_order_relaxed);
    return XCCL_OK;
}

static void return_ack(xccl_request_t *send) {
    if (send->ack != 0)
        send->p2p->free_acks[send->p2p->num_free_acks++] = (uint32_t)send->ack;
    send->ack = 0;
}

/* ---- publishing ---- */

/* Reserves the pages of all data that the message will use first, so that it cannot fail halfway. Short of memory, the
 * ring goes around in what it has. */
static int reserve(xccl_p2p_t *p2p, xccl_p2p_outgoing_t *out, uint64_t bytes) {
    enum { LEAST_RING = 64 << 10 };
    xccl_ring_producer_t *ring = &out->ring;
    uint64_t needed = bytes < ring->limit - ring->offset ? ring->offset + bytes : ring->limit;
    if (needed <= out->reserved)
        return XCCL_OK;
    uint64_t length = XCCL_PAGE;
    while (length < needed)
        length *= 2; /* few system calls while sizes grow */
    if (length > ring->limit)
        length = ring->limit;
    uint64_t start = ring->shape.data_at + out->reserved;
    int status = xccl_heap_commit_at(p2p->world, ring->consumer, start, length - out->reserved);
    if (status == XCCL_ERR_MEMORY && out->reserved >= LEAST_RING) {
        xccl_ring_limit(ring, out->reserved);
        return XCCL_OK;
    }
    if (status == XCCL_OK)
        out->reserved = length;
    return status;
}

/* Bytes of the chunks of a message. Eight of them, so that the copy in of all but the first overlaps with the copy out
 * of all but the last; not below 4 KiB, whose copy takes about as long as passing a line. */
static uint64_t chunk_bytes(const xccl_p2p_t *p2p, const xccl_p2p_outgoing_t *out, uint64_t bytes) {
    enum { CHUNKS = 8, LEAST = 4096 };
    uint64_t most = p2p->world->header->config.p2p_slot_bytes;
    if (most > out->ring.limit / 4)
        most = out->ring.limit / 4;
    uint64_t chunk = bytes / CHUNKS < LEAST ? LEAST : bytes / CHUNKS;
    return (chunk < most ? chunk : most) / XCCL_LINE * XCCL_LINE;
}

/* Publishes a field of any kind but INLINE and those with a piece of data. */
static void publish_field(xccl_p2p_outgoing_t *out, const xccl_request_t *send, xccl_p2p_kind_t kind) {
    xccl_p2p_field_t *field = xccl_ring_content(&out->ring);
    field->event_id = send->tag;
    field->kind_and_bytes = send->bytes << 8 | (uint64_t)kind;
    field->body.at.offset = send->offset;
    field->body.at.ack = send->ack;
    field->body.at.number = send->number;
    xccl_ring_publish(&out->ring);
}

/* Steps 1 to 3 for the next `length` bytes of the message, for which there is room. */
static void publish_chunk(xccl_p2p_outgoing_t *out, const xccl_request_t *send, uint64_t length) {
    xccl_ring_producer_t *ring = &out->ring;
    bool hand_back;
    uint64_t piece = xccl_ring_take_piece(ring, length, &hand_back);
    /* steps 1 and 2: from the app data area to the receiver's managed area */
    void *to = xccl_gas_at(ring->world, ring->consumer, ring->shape.data_at + piece);
    if (xccl_ring_is_far(ring))
        xccl_copy_streaming(to, send->buffer + send->moved, length);
    else
        xccl_copy(to, send->buffer + send->moved, length);
    /* step 3: event id and chunk id to the receiver's metadata area; moves count only after it (bug class 9) */
    uint64_t kind = (send->chunks == 0 ? XCCL_P2P_FIRST : XCCL_P2P_CHUNK) | (hand_back ? XCCL_P2P_HAND_BACK : 0);
    xccl_p2p_field_t *field = xccl_ring_content(ring);
    field->event_id = send->tag;
    field->kind_and_bytes = send->bytes << 8 | kind;
    field->body.at.chunk_id = send->chunks;
    field->body.at.offset = piece;
    field->body.at.ack = send->ack;
    field->body.at.number = send->number;
    field->body.at.length = length;
    xccl_ring_publish(ring);
}

static int publish_inline(xccl_p2p_outgoing_t *out, const void *buffer, uint64_t bytes, int64_t tag) {
    if (!xccl_ring_has_line(&out->ring))
        return XCCL_AGAIN;
    xccl_p2p_field_t *field = xccl_ring_content(&out->ring);
    field->event_id = tag;
    field->kind_and_bytes = bytes << 8 | XCCL_P2P_INLINE;
    xccl_p2p_copy_inline(field->body.payload, buffer, bytes);
    xccl_ring_publish(&out->ring);
    return XCCL_OK;
}

static int publish_offer(xccl_p2p_outgoing_t *out, xccl_request_t *send) {
    if (!xccl_ring_has_line(&out->ring))
        return XCCL_AGAIN;
    int status = take_ack(send);
    if (status != XCCL_OK)
        return status;
    publish_field(out, send, send->way);
    return XCCL_OK;
}

/* All chunks that there is room for. AGAIN: the ring is full, more later. */
static int publish_chunks(xccl_p2p_outgoing_t *out, xccl_request_t *send) {
    xccl_p2p_t *p2p = send->p2p;
    if (send->chunks == 0) {
        if (!xccl_ring_has_line(&out->ring))
            return XCCL_AGAIN;
        int status = reserve(p2p, out, send->bytes);
        if (status == XCCL_OK && send->sync && send->ack == 0)
            status = take_ack(send);
        if (status != XCCL_OK)
            return status;
    }
    uint64_t most = chunk_bytes(p2p, out, send->bytes);
    do {
        uint64_t left = send->bytes - send->moved;
        uint64_t length = left < most ? left : most;
        if (!xccl_ring_has_piece(&out->ring, length))
            return XCCL_AGAIN;
        publish_chunk(out, send, length);
        send->moved += length;
        send->chunks++;
    } while (send->moved < send->bytes);
    return XCCL_OK;
}

static int publish_cancel(xccl_p2p_outgoing_t *out, const xccl_request_t *send) {
    if (!xccl_ring_has_line(&out->ring))
        return XCCL_AGAIN;
    publish_field(out, send, XCCL_P2P_CANCEL);
    return XCCL_OK;
}

static int publish(xccl_p2p_outgoing_t *out, xccl_request_t *send) {
    if (send->cancelled)
        return publish_cancel(out, send);
    if (send->way == XCCL_P2P_INLINE)
        return publish_inline(out, send->buffer, send->bytes, send->tag);
    return xccl_p2p_is_offer(send->way) ? publish_offer(out, send) : publish_chunks(out, send);
}

/* The first send of the queue has left it, with `status`. */
static void end_publishing(xccl_p2p_t *p2p, xccl_request_t *send, int status) {
    xccl_p2p_list_remove(send);
    p2p->num_queued--;
    if (status == XCCL_OK && send->ack != 0 && !send->cancelled) {
        xccl_p2p_list_append(&p2p->awaiting, send);
    } else {
        return_ack(send);
        xccl_p2p_complete(send, status);
    }
}

/* A full ring has to wait for its tail word; one that holds nonsense never tells. */
static int check_tail(const xccl_p2p_t *p2p, const xccl_ring_producer_t *ring, int dest) {
    if (!ring->has_bad_tail)
        return XCCL_AGAIN;
    return xccl_comm_fail_damaged(p2p->comm, dest, "tail of the ring", ring->bad_tail, ring->cached_tail, ring->head);
}

void xccl_p2p_push(xccl_p2p_t *p2p, int dest) {
    xccl_p2p_outgoing_t *out = &p2p->outgoing[dest];
    uint64_t before = out->ring.head;
    while (out->queue.first) {
        int status = publish(out, out->queue.first);
        if (status == XCCL_AGAIN)
            status = check_tail(p2p, &out->ring, dest);
        if (status == XCCL_AGAIN)
            break;
        end_publishing(p2p, out->queue.first, status);
    }
    p2p->moves += out->ring.head - before;
}

void xccl_p2p_check_acks(xccl_p2p_t *p2p) {
    for (xccl_request_t *send = p2p->awaiting.first, *next; send; send = next) {
        next = send->next;
        /* a send to the own rank has no line: the receive completes it */
        if (send->ack == 0 || load_ack(send) != xccl_p2p_ack_word(send->number, XCCL_P2P_RECEIVED))
            continue;
        return_ack(send);
        xccl_p2p_complete(send, XCCL_OK);
    }
}

/* ---- giving up ---- */

static void drop(xccl_request_t *send) {
    return_ack(send);
    send->abandoned = true;
    xccl_p2p_complete(send, XCCL_OK);
}

/* Takes an offer back. True: too late, the receiver has it. Until the receiver has finished copying, the buffer
 * cannot be given back to the caller. */
static bool withdraw(xccl_request_t *send) {
    xccl_p2p_list_remove(send); /* the wait below must not complete it */
    xccl_world_t *world = send->p2p->world;
    uint64_t offset = xccl_p2p_ack_offset(send->p2p, send->ack);
    uint64_t offered = xccl_p2p_ack_word(send->number, XCCL_P2P_OFFERED);
    uint64_t seen = xccl_gas_compare_swap_at(world, world->rank, offset, offered,
                                             xccl_p2p_ack_word(send->number, XCCL_P2P_WITHDRAWN));
    if (seen != xccl_p2p_ack_word(send->number, XCCL_P2P_TAKEN))
        return seen == xccl_p2p_ack_word(send->number, XCCL_P2P_RECEIVED); /* else withdrawn, or the word is damaged */
    /* Copying is under way: this ends soon, or the receiver has died. */
    enum { COPY_SECONDS = 60 };
    (void)xccl_wait_word(world, xccl_gas_local(world, offset), xccl_p2p_ack_word(send->number, XCCL_P2P_RECEIVED),
                         send->p2p->comm->ranks[send->peer], "end of copying",
                         xccl_now_ns() + COPY_SECONDS * 1000000000ll);
    return load_ack(send) == xccl_p2p_ack_word(send->number, XCCL_P2P_RECEIVED);
}

bool xccl_p2p_cancel_send(xccl_request_t *send) {
    xccl_p2p_t *p2p = send->p2p;
    if (send->peer == p2p->comm->rank) {
        xccl_p2p_unsend_self(send);
        drop(send);
        return false;
    }
    if (send->list == &p2p->awaiting) {
        if (xccl_p2p_is_offer(send->way)) {
            bool received = withdraw(send);
            drop(send);
            return received;
        }
        /* The message is with the receiver in full and will be delivered; its line is in use until then. */
        send->cancelled = send->abandoned = true;
        return false;
    }
    if (send->chunks == 0) {
        xccl_p2p_list_remove(send);
        p2p->num_queued--;
        drop(send);
        return false;
    }
    /* Part of it is in the ring: the receiver must forget that part, in its turn. */
    send->cancelled = send->abandoned = true;
    send->buffer = NULL;
    return false;
}

/* ---- calls ---- */

/* Sets way and offset. `waits`: the call returns only when the message is on its way, or sent in full. */
static void choose_way(xccl_request_t *send, bool waits) {
    xccl_p2p_t *p2p = send->p2p;
    send->way = XCCL_P2P_FIRST;
    if (send->bytes <= XCCL_P2P_INLINE_BYTES && !send->sync) {
        send->way = XCCL_P2P_INLINE;
    } else if (send->bytes >= p2p->world->header->config.p2p_slot_bytes &&
               xccl_gas_is_symmetric(p2p->world, send->buffer, send->bytes, &send->offset)) {
        send->way = XCCL_P2P_OFFER;
    } else if ((waits || send->bytes > p2p->outgoing[send->peer].ring.limit) &&
               xccl_p2p_offers_by_cma(p2p, send->peer, send->bytes)) {
        /* a send that does not wait is done when its message fits the ring, whether the receiver comes or not */
        send->way = XCCL_P2P_CMA_OFFER;
        send->offset = (uint64_t)(uintptr_t)send->buffer;
    }
}

static void enqueue(xccl_request_t *send) {
    xccl_p2p_list_append(&send->p2p->outgoing[send->peer].queue, send);
    send->p2p->num_queued++;
    xccl_p2p_push(send->p2p, send->peer);
}

/* Queues the send and publishes what there is room for. */
static int start(xccl_comm_t *comm, const void *buffer, uint64_t bytes, int dest, int64_t tag, bool sync, bool waits,
                 xccl_request_t **out) {
    xccl_p2p_t *p2p = comm->p2p;
    xccl_request_t *send = xccl_p2p_new_request(p2p, true, dest, tag, buffer, bytes);
    if (!send)
        return XCCL_ERR_MEMORY;
    send->sync = sync;
    send->message = (xccl_message_t){comm->rank, tag, bytes};
    if (dest == comm->rank) {
        int status = xccl_p2p_send_self(send);
        if (status != XCCL_OK) {
            drop(send);
            return status;
        }
    } else {
        choose_way(send, waits);
        enqueue(send);
    }
    *out = send;
    return XCCL_OK;
}

/* Also tells the race checker. */
static int check_send(const xccl_comm_t *comm, const char *operation, const void *buffer, uint64_t bytes, int dest,
                      int64_t tag, xccl_send_mode_t mode) {
    int status = xccl_p2p_check_args(comm, operation, buffer, bytes, dest, tag, false);
    if (status == XCCL_OK && mode != XCCL_SEND_DEFAULT && mode != XCCL_SEND_SYNC)
        return xccl_fail(XCCL_ERR_USAGE, "rank %d, %s: unknown mode %d", comm->rank, operation, (int)mode);
    if (status == XCCL_OK)
        status = xccl_race_touch(comm->world, buffer, bytes, XCCL_RACE_READ, XCCL_OP_SEND);
    if (status == XCCL_OK)
        xccl_race_sending(comm->world, comm->ranks[dest]);
    return status;
}

/* The common case without a request: nothing queued before it, and room for all of it. */
static bool send_at_once(xccl_p2p_t *p2p, const void *buffer, uint64_t bytes, int dest, int64_t tag) {
    xccl_p2p_outgoing_t *out = &p2p->outgoing[dest];
    if (out->queue.first || dest == p2p->comm->rank)
        return false;
    if (bytes <= XCCL_P2P_INLINE_BYTES)
        return publish_inline(out, buffer, bytes, tag) == XCCL_OK;
    /* an offer needs a request, which awaits its acknowledgement; messages of one chunk are too short for one */
    if (bytes > chunk_bytes(p2p, out, bytes) || bytes >= p2p->world->header->config.p2p_slot_bytes ||
        reserve(p2p, out, bytes) != XCCL_OK || !xccl_ring_has_piece(&out->ring, bytes))
        return false;
    xccl_request_t send = {.tag = tag, .buffer = (unsigned char *)buffer, .bytes = bytes};
    publish_chunk(out, &send, bytes);
    return true;
}

/* Waits a while for the receiver of an offer; then sends the message in chunks, if the ring holds them. Nothing has
 * been sent behind the offer, so the order of messages stays. What fails here fails again in the wait that follows. */
static void insist(xccl_request_t *send, int64_t deadline) {
    xccl_p2p_t *p2p = send->p2p;
    xccl_ring_producer_t *ring = &p2p->outgoing[send->peer].ring;
    if (send->bytes > ring->limit)
        return;
    int64_t end = xccl_deadline_at(p2p->world, deadline), until = xccl_p2p_patience(send->bytes);
    xccl_message_t message;
    int status = xccl_p2p_await(send, until < end ? until : end, &message);
    xccl_p2p_note_offer(p2p, send->peer, send->done);
    if (send->done || status != XCCL_ERR_TIMEOUT || until >= end || send->list != &p2p->awaiting)
        return;
    if (withdraw(send)) {
        return_ack(send);
        xccl_p2p_complete(send, XCCL_OK);
        return;
    }
    return_ack(send);
    send->way = XCCL_P2P_FIRST;
    enqueue(send);
}

int xccl_p2p_send(xccl_comm_t *comm, const void *buffer, uint64_t bytes, int dest, int64_t tag, xccl_send_mode_t mode,
                  int64_t timeout_ns) {
    int status = check_send(comm, "send", buffer, bytes, dest, tag, mode);
    if (status != XCCL_OK)
        return status;
    xccl_world_t *world = comm->world;
    if (mode == XCCL_SEND_DEFAULT && world->num_hooks == 0 && xccl_faults_are_off(world) &&
        send_at_once(comm->p2p, buffer, bytes, dest, tag))
        return xccl_op_begin(world, XCCL_OP_SEND); /* behind it: the message is on its way meanwhile */
    status = xccl_op_begin(world, XCCL_OP_SEND);
    if (status == XCCL_OK)
        status = xccl_progress(world);
    if (status != XCCL_OK)
        return status;
    if (mode == XCCL_SEND_DEFAULT && send_at_once(comm->p2p, buffer, bytes, dest, tag))
        return XCCL_OK;
    xccl_request_t *send;
    status = start(comm, buffer, bytes, dest, tag, mode == XCCL_SEND_SYNC, true, &send);
    if (status != XCCL_OK)
        return status;
    if (!send->done && dest == comm->rank) {
        xccl_p2p_cancel_send(send);
        return xccl_fail(
            XCCL_ERR_USAGE,
            "rank %d, send: a sync send to the own rank (tag %lld) would wait for itself: post an irecv before it",
            comm->rank, (long long)tag);
    }
    int64_t deadline = xccl_deadline(comm->world, timeout_ns);
    if (send->way == XCCL_P2P_CMA_OFFER && mode == XCCL_SEND_DEFAULT)
        insist(send, deadline);
    xccl_message_t message;
    return xccl_p2p_finish(comm->p2p, send, deadline, &message);
}

int xccl_p2p_isend(xccl_comm_t *comm, const void *buffer, uint64_t bytes, int dest, int64_t tag, xccl_send_mode_t mode,
                   xccl_request_t **out) {
    int status = check_send(comm, "isend", buffer, bytes, dest, tag, mode);
    if (status != XCCL_OK)
        return status;
    xccl_request_t *send = NULL;
    status = xccl_op_begin(comm->world, XCCL_OP_SEND);
    if (status != XCCL_OK)
        return status;
    status = start(comm, buffer, bytes, dest, tag, mode == XCCL_SEND_SYNC, false, &send);
    /* What has failed already is told now: the caller may wait for something else first, and for ever. */
    if (status == XCCL_OK && send->done && send->status != XCCL_OK) {
        xccl_message_t message;
        return xccl_p2p_finish(comm->p2p, send, 0, &message);
    }
    if (status == XCCL_OK)
        *out = send;
    xccl_p2p_settle_hook(comm->p2p);
    return status;
}
