/* coll_exchange.c - how messages leave and how they are taken. */
#include <stddef.h>

#include "coll.h"
#include "status.h"

uint64_t xccl_coll_slot_offset(const xccl_coll_t *coll, int source, int parity) {
    return coll->inbox + (2 * (uint64_t)source + parity) * (sizeof(xccl_coll_header_t) + coll->inline_bytes);
}

/* ---- slots ---- */

static bool slot_known_free(const xccl_coll_peer_t *peer) {
    return peer->sent < 2 || peer->heard > peer->slot_epoch[peer->sent & 1];
}

/* Waits until the next slot at `pe` may be overwritten: the argument is at xccl_coll_header_t. */
static int claim_slot(xccl_coll_t *coll, int pe) {
    const xccl_coll_peer_t *peer = &coll->peers[pe];
    if (slot_known_free(peer))
        return XCCL_OK;
    return xccl_coll_await_slot(coll, pe, peer->slot_units[peer->sent & 1]);
}

/* Publishes the slot with its header; the payload behind the header has been written. */
static void send_header(xccl_coll_t *coll, int pe, int mode, uint64_t bytes) {
    xccl_coll_peer_t *peer = &coll->peers[pe];
    int parity = peer->sent & 1;
    uint64_t at = xccl_coll_slot_offset(coll, coll->rank, parity);
    const uint64_t words[2] = {coll->signature | (uint64_t)mode, bytes};
    xccl_gas_put_at(coll->world, coll->comm->ranks[pe], at + offsetof(xccl_coll_header_t, signature), words,
                    sizeof words);
    xccl_gas_signal_at(coll->world, coll->comm->ranks[pe], at, coll->epoch);
    peer->slot_epoch[parity] = coll->epoch;
    peer->slot_units[parity] = peer->units[0];
    peer->sent++;
    /* The next message goes to the other slot, which the peer has read and will not look at before it has sent its own:
     * to own that line by then takes one way off the next operation. */
    xccl_gas_expect_to_write(coll->world, coll->comm->ranks[pe], xccl_coll_slot_offset(coll, coll->rank, !parity));
}

static void write_slot(xccl_coll_t *coll, int pe, uint64_t place, const void *data, uint64_t bytes) {
    uint64_t at = xccl_coll_slot_offset(coll, coll->rank, coll->peers[pe].sent & 1);
    xccl_gas_put_at(coll->world, coll->comm->ranks[pe], at + place, data, bytes);
}

static uint64_t payload_place(uint64_t bytes) {
    return bytes <= XCCL_COLL_HEADER_PAYLOAD ? offsetof(xccl_coll_header_t, payload) : sizeof(xccl_coll_header_t);
}

static int push(xccl_coll_t *coll, int pe) {
    const xccl_coll_peer_t *peer = &coll->peers[pe];
    TRY(claim_slot(coll, pe));
    if (peer->out_bytes > 0) {
        uint64_t slot = xccl_coll_slot_offset(coll, coll->rank, peer->sent & 1);
        xccl_coll_store(coll, pe, slot + payload_place(peer->out_bytes), peer->out, peer->out_bytes);
    }
    send_header(coll, pe, XCCL_COLL_INLINE | (coll->streams ? XCCL_COLL_STREAMED : 0), peer->out_bytes);
    return XCCL_OK;
}

void xccl_coll_refuse(xccl_coll_t *coll) {
    for (int i = 0; i < coll->size - 1; i++) {
        xccl_coll_peer_t *peer = &coll->peers[coll->order[i]];
        if (slot_known_free(peer))
            send_header(coll, coll->order[i], XCCL_COLL_REFUSED, 0);
    }
}

/* ---- staging ---- */

static bool is_staged(const xccl_coll_t *coll, const xccl_coll_peer_t *peer) {
    return peer->out_bytes > coll->inline_bytes && !coll->x_in_place;
}

void xccl_coll_set_source(xccl_coll_t *coll, const void *x, uint64_t x_bytes, uint64_t message_bytes, bool shared) {
    coll->x = x;
    coll->shared = shared;
    bool is_long = message_bytes >= XCCL_COLL_IN_PLACE_BYTES && message_bytes > coll->inline_bytes;
    coll->x_in_place = is_long && xccl_gas_is_symmetric(coll->world, x, x_bytes, &coll->x_offset);
    coll->result_in_place = false;
    xccl_coll_stage_cut(coll, message_bytes);
    xccl_coll_choose_way(coll, coll->x_in_place ? 0 : message_bytes, is_long && coll->peers_read && !coll->reduces);
    if (coll->x_by_cma) {
        coll->x_in_place = true;
        coll->x_offset = (uint64_t)(uintptr_t)x;
    }
    coll->stages = coll->size > 1 && message_bytes > coll->inline_bytes && !coll->x_in_place;
}

uint64_t xccl_coll_chunks_to_send(const xccl_coll_t *coll) {
    uint64_t longest = 0;
    for (int i = 0; i < coll->size - 1; i++) {
        const xccl_coll_peer_t *peer = &coll->peers[coll->order[i]];
        if (is_staged(coll, peer) && peer->out_bytes > longest)
            longest = peer->out_bytes;
    }
    return longest == 0 ? 0 : (longest - 1) / coll->chunk_bytes + 1;
}

/* Copies chunk k of the message to `pe` into its place in the lot; `shared` messages lie there once. */
static void fill_lot(xccl_coll_t *coll, int pe, uint64_t k) {
    const xccl_coll_peer_t *peer = &coll->peers[pe];
    uint64_t at = k * coll->chunk_bytes, left = peer->out_bytes - at;
    xccl_coll_store(coll, coll->rank, xccl_coll_lot_offset(coll, k) + xccl_coll_place_in_lot(coll, pe), peer->out + at,
                    left < coll->chunk_bytes ? left : coll->chunk_bytes);
}

/* The header of a message that the receiver fetches. */
static int announce(xccl_coll_t *coll, int pe) {
    xccl_coll_peer_t *peer = &coll->peers[pe];
    int mode = (coll->x_in_place ? XCCL_COLL_IN_PLACE : XCCL_COLL_STAGED) | (coll->streams ? XCCL_COLL_STREAMED : 0) |
               (coll->result_in_place ? XCCL_COLL_RESULT_IN_PLACE : 0) | (coll->x_by_cma ? XCCL_COLL_CMA : 0);
    /* as in xccl_coll_header_t */
    const uint64_t words[5] = {
        coll->x_in_place ? coll->x_offset + (uint64_t)(peer->out - coll->x) : coll->first_place,
        xccl_coll_place_in_lot(coll, pe),
        coll->chunk_bytes,
        coll->lot_bytes,
        coll->result_in_place ? coll->result_offset : coll->first_place,
    };
    TRY(claim_slot(coll, pe));
    write_slot(coll, pe, offsetof(xccl_coll_header_t, offset), words, sizeof words);
    send_header(coll, pe, mode, peer->out_bytes);
    peer->units[0]++;
    if (!coll->x_in_place)
        xccl_coll_lot_note(coll, 0, pe, 0);
    return XCCL_OK;
}

int xccl_coll_send_first(xccl_coll_t *coll) {
    if (coll->stages)
        TRY(xccl_coll_lot_claim(coll));
    bool filled = false;
    for (int i = 0; i < coll->size - 1; i++) {
        int pe = coll->order[i];
        const xccl_coll_peer_t *peer = &coll->peers[pe];
        if (peer->out_bytes <= coll->inline_bytes) {
            TRY(push(coll, pe));
            continue;
        }
        if (is_staged(coll, peer) && !(coll->shared && filled))
            fill_lot(coll, pe, 0);
        filled = true;
        TRY(announce(coll, pe));
    }
    return XCCL_OK;
}

int xccl_coll_send_chunk(xccl_coll_t *coll, uint64_t k) {
    TRY(xccl_coll_lot_claim(coll));
    bool filled = false;
    for (int i = 0; i < coll->size - 1; i++) {
        int pe = coll->order[i];
        const xccl_coll_peer_t *peer = &coll->peers[pe];
        if (!is_staged(coll, peer) || peer->out_bytes <= k * coll->chunk_bytes)
            continue;
        if (!(coll->shared && filled))
            fill_lot(coll, pe, k);
        filled = true;
        xccl_coll_publish(coll, pe, 0);
        xccl_coll_lot_note(coll, k, pe, 0);
    }
    return XCCL_OK;
}

void xccl_coll_publish(xccl_coll_t *coll, int pe, int channel) {
    xccl_coll_peer_t *peer = &coll->peers[pe];
    peer->units[channel]++;
    uint64_t at = xccl_coll_counter_offset(coll, XCCL_COLL_READY, channel, coll->rank);
    xccl_gas_signal_at(coll->world, coll->comm->ranks[pe], at, peer->units[channel]);
}

/* ---- taking ---- */

void xccl_coll_take(xccl_coll_t *coll, int pe, int channel) {
    xccl_coll_peer_t *peer = &coll->peers[pe];
    peer->taken[channel]++;
    uint64_t at = xccl_coll_counter_offset(coll, XCCL_COLL_TAKEN, channel, coll->rank);
    /* release: this rank's reads of the unit come before the peer's next writes to that memory */
    xccl_gas_signal_at(coll->world, coll->comm->ranks[pe], at, peer->taken[channel]);
}

const unsigned char *xccl_coll_message_at(const xccl_coll_t *coll, int pe, uint64_t at) {
    const xccl_coll_peer_t *peer = &coll->peers[pe];
    int world_rank = coll->comm->ranks[pe];
    if (peer->in_mode & XCCL_COLL_IN_PLACE)
        return (unsigned char *)xccl_gas_at(coll->world, world_rank, peer->in_offset) + at;
    if (peer->in_mode & XCCL_COLL_STAGED) {
        uint64_t chunk = at / peer->in_chunk;
        uint64_t lot = xccl_coll_lot_place(coll, peer->in_offset, peer->in_lot_bytes, chunk);
        return (unsigned char *)xccl_gas_at(coll->world, world_rank, coll->staging + lot + peer->in_place) +
               (at - chunk * peer->in_chunk);
    }
    uint64_t slot = xccl_coll_slot_offset(coll, pe, (peer->received - 1) & 1);
    return (unsigned char *)xccl_gas_at(coll->world, coll->world->rank, slot) + payload_place(peer->in_bytes) + at;
}

/* Copies the next chunk of the message from `pe`. */
static int take_chunk(xccl_coll_t *coll, int pe) {
    xccl_coll_peer_t *peer = &coll->peers[pe];
    uint64_t bytes = peer->in_bytes - peer->in_done;
    if ((peer->in_mode & XCCL_COLL_STAGED) && bytes > peer->in_chunk)
        bytes = peer->in_chunk;
    if (peer->in_mode & XCCL_COLL_CMA)
        TRY(xccl_coll_load_by_cma(coll, pe, peer->in + peer->in_done, peer->in_offset + peer->in_done, bytes));
    else
        xccl_coll_load(coll, peer->in + peer->in_done, xccl_coll_message_at(coll, pe, peer->in_done), bytes,
                       peer->in_mode & XCCL_COLL_STREAMED);
    peer->in_done += bytes;
    if (peer->in_mode & (XCCL_COLL_STAGED | XCCL_COLL_IN_PLACE))
        xccl_coll_take(coll, pe, 0);
    return XCCL_OK;
}

int xccl_coll_deliver(xccl_coll_t *coll) {
    uint64_t chunks = xccl_coll_chunks_to_send(coll), sent = 1;
    for (;;) {
        bool moved = false, complete = true;
        if (sent < chunks && xccl_coll_lot_free(coll)) {
            TRY(xccl_coll_send_chunk(coll, sent++));
            moved = true;
        }
        for (int i = 0; i < coll->size - 1; i++) {
            int pe = coll->order[i];
            if (xccl_coll_can_take(coll, pe)) {
                TRY(take_chunk(coll, pe));
                moved = true;
            }
            complete = complete && coll->peers[pe].in_done == coll->peers[pe].in_bytes;
        }
        if (complete && sent >= chunks)
            return XCCL_OK;
        if (!moved)
            TRY(xccl_coll_await_movable(coll, sent < chunks));
    }
}
