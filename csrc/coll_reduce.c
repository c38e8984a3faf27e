/* coll_reduce.c - collectives that reduce.
 *
 * A round is one chunk of the messages. All members cut alike, so a round has the same elements everywhere, whether a
 * member stages them or lets its peers read them in place. Each element is reduced by one member, over the members
 * 0, 1, ... in order.
 */
#include <stdlib.h>

#include "coll.h"
#include "copy.h"
#include "reduce.h"
#include "status.h"

typedef struct reduction_t {
    xccl_coll_t *coll;
    xccl_dtype_t dtype;
    xccl_reduce_op_t op;
    uint64_t itemsize;
    uint64_t bytes; /* of a message */
    const unsigned char *x;
    unsigned char *out;
    const void **sources; /* by member */
} reduction_t;

static int check_reduction(const xccl_comm_t *comm, xccl_op_t kind, xccl_dtype_t dtype, xccl_reduce_op_t op,
                           const void *x, const void *out) {
    if (dtype < 0 || dtype > XCCL_BYTES || op < 0 || op > XCCL_PROD || !xccl_reduce_supports(dtype, op))
        return xccl_fail(XCCL_ERR_USAGE, "%s on rank %d: dtype %s has no reduction %s", xccl_op_name(kind), comm->rank,
                         xccl_coll_dtype_name(dtype), xccl_coll_reduce_name(op));
    uint64_t itemsize = xccl_reduce_itemsize(dtype);
    if ((uintptr_t)x % itemsize != 0 || (uintptr_t)out % itemsize != 0)
        return xccl_fail(XCCL_ERR_USAGE, "%s on rank %d: input at %p and output at %p must be aligned to %llu bytes",
                         xccl_op_name(kind), comm->rank, x, out, (unsigned long long)itemsize);
    return XCCL_OK;
}

/* Waits for round k of all peers. */
static int await_round(reduction_t *r, uint64_t k) {
    /* the headers brought chunk 0 */
    return k == 0 ? XCCL_OK : xccl_coll_await_units(r->coll, 0);
}

/* Tells the peers that round k of their messages has been read. */
static void take_round(reduction_t *r, bool last) {
    for (int i = 0; i < r->coll->size - 1; i++) {
        int pe = r->coll->order[i];
        int mode = r->coll->peers[pe].in_mode;
        if ((mode & XCCL_COLL_STAGED) || ((mode & XCCL_COLL_IN_PLACE) && last))
            xccl_coll_take(r->coll, pe, 0);
    }
}

static uint64_t num_rounds(const reduction_t *r) {
    return (r->bytes - 1) / r->coll->chunk_bytes + 1;
}

static uint64_t round_bytes(const reduction_t *r, uint64_t k) {
    uint64_t left = r->bytes - k * r->coll->chunk_bytes;
    return left < r->coll->chunk_bytes ? left : r->coll->chunk_bytes;
}

/* Learns what the first round cost to load, for one copy that was stored. */
static void note_reduction(reduction_t *r, uint64_t ticks) {
    xccl_coll_t *coll = r->coll;
    uint64_t copies = coll->stages && coll->shared ? 1 : (uint64_t)coll->size - 1;
    xccl_coll_note_load(coll, ticks / copies, round_bytes(r, 0),
                        coll->streams ? XCCL_COLL_BY_STREAM : XCCL_COLL_BY_CACHE);
}

/* Reduces [at, at+bytes) of the messages, where this rank's own message starts at `own`, to `to`. */
static void reduce_range(reduction_t *r, const unsigned char *own, uint64_t at, uint64_t bytes, void *to) {
    for (int pe = 0; pe < r->coll->size; pe++)
        r->sources[pe] = pe == r->coll->rank ? own + at : xccl_coll_message_at(r->coll, pe, at);
    uint64_t start = r->coll->samples ? xccl_ticks() : 0;
    xccl_reduce(r->dtype, r->op, to, r->sources, r->coll->size, bytes / r->itemsize);
    if (r->coll->samples && at < r->coll->chunk_bytes)
        note_reduction(r, xccl_ticks() - start);
}

/* Sends the first chunks, or all there is if it is short; receives all headers. */
static int start(reduction_t *r) {
    TRY(xccl_coll_send_first(r->coll));
    return xccl_coll_receive_headers(r->coll, r->coll->order, r->coll->size - 1);
}

/* ---- reduce_scatter: each member gets its part of all messages ---- */

static int reduce_scatter(reduction_t *r) {
    xccl_coll_t *coll = r->coll;
    const unsigned char *own = r->x + (uint64_t)coll->rank * r->bytes;
    for (int pe = 0; pe < coll->size; pe++) {
        coll->peers[pe].out = r->x + (uint64_t)pe * r->bytes;
        coll->peers[pe].out_bytes = coll->peers[pe].in_bytes = r->bytes;
    }
    coll->reduces = true;
    xccl_coll_set_source(coll, r->x, (uint64_t)coll->size * r->bytes, r->bytes, false);
    TRY(start(r));
    if (r->bytes <= coll->inline_bytes || coll->size == 1) {
        reduce_range(r, own, 0, r->bytes, r->out);
        return XCCL_OK;
    }
    uint64_t rounds = num_rounds(r), chunks = xccl_coll_chunks_to_send(coll);
    for (uint64_t k = 0; k < rounds; k++) {
        if (k + 1 < chunks)
            TRY(xccl_coll_send_chunk(coll, k + 1));
        TRY(await_round(r, k));
        uint64_t at = k * coll->chunk_bytes;
        reduce_range(r, own, at, round_bytes(r, k), r->out + at);
        take_round(r, k + 1 == rounds);
    }
    return coll->x_in_place ? xccl_coll_await_taken(coll) : XCCL_OK;
}

int xccl_coll_reduce_scatter(xccl_comm_t *comm, const void *x, uint64_t count, xccl_dtype_t dtype, xccl_reduce_op_t op,
                             int64_t timeout_ns, void *out) {
    TRY(check_reduction(comm, XCCL_OP_REDUCE_SCATTER, dtype, op, x, out));
    uint64_t itemsize = xccl_reduce_itemsize(dtype), bytes = count * itemsize;
    TRY(xccl_coll_check_apart(comm, XCCL_OP_REDUCE_SCATTER, x, (uint64_t)comm->size * bytes, out, bytes));
    TRY(xccl_coll_begin(comm, XCCL_OP_REDUCE_SCATTER, (int)op, dtype, 0, timeout_ns));
    reduction_t r = {comm->coll, dtype, op, itemsize, bytes, x, out, comm->coll->sources};
    const xccl_race_buffers_t buffers = {x, (uint64_t)comm->size * bytes, out, bytes};
    TRY(xccl_coll_enter(comm, buffers));
    return xccl_coll_leave(comm, reduce_scatter(&r), XCCL_RACE_ALL, buffers);
}

/* ---- all_reduce: each member reduces a slice of every round, then all collect the slices ---- */

/* Where the slice of member `pe` starts in a round of `bytes` bytes: whole lines, shared out evenly. */
static uint64_t slice_start(const reduction_t *r, uint64_t bytes, int pe) {
    uint64_t lines = (bytes + XCCL_LINE - 1) / XCCL_LINE;
    uint64_t start_byte = lines * (uint64_t)pe / (uint64_t)r->coll->size * XCCL_LINE;
    return start_byte < bytes ? start_byte : bytes;
}

/* Reduces the own slice of round k to `out`, and publishes it: in `out`, or in the lot, where nobody
 * but this rank reads this slice of x. */
static void reduce_slice(reduction_t *r, uint64_t k) {
    xccl_coll_t *coll = r->coll;
    uint64_t at = k * coll->chunk_bytes, bytes = round_bytes(r, k);
    uint64_t from = slice_start(r, bytes, coll->rank), to = slice_start(r, bytes, coll->rank + 1);
    reduce_range(r, r->x, at + from, to - from, r->out + at + from);
    if (!coll->result_in_place)
        xccl_coll_copy(xccl_gas_at(coll->world, coll->world->rank, xccl_coll_lot_offset(coll, k) + from),
                       r->out + at + from, to - from, coll->streams);
    for (int i = 0; i < coll->size - 1; i++) {
        xccl_coll_publish(coll, coll->order[i], 1);
        if (!coll->result_in_place)
            xccl_coll_lot_note(coll, k, coll->order[i], 1);
    }
}

/* Copies the slices of the others of round k. */
static int collect_slices(reduction_t *r, uint64_t k) {
    xccl_coll_t *coll = r->coll;
    uint64_t at = k * coll->chunk_bytes, bytes = round_bytes(r, k);
    TRY(xccl_coll_await_units(coll, 1));
    for (int i = 0; i < coll->size - 1; i++) {
        int pe = coll->order[i];
        const xccl_coll_peer_t *peer = &coll->peers[pe];
        uint64_t from = slice_start(r, bytes, pe), to = slice_start(r, bytes, pe + 1);
        uint64_t start_at = peer->in_mode & XCCL_COLL_RESULT_IN_PLACE
                                ? peer->in_result + at
                                : coll->staging + xccl_coll_lot_place(coll, peer->in_result, peer->in_lot_bytes, k);
        xccl_gas_get_at(coll->world, r->out + at + from, coll->comm->ranks[pe], start_at + from, to - from);
        xccl_coll_take(coll, pe, 1);
    }
    return XCCL_OK;
}

static int all_reduce(reduction_t *r) {
    xccl_coll_t *coll = r->coll;
    for (int pe = 0; pe < coll->size; pe++) {
        coll->peers[pe].out = r->x;
        coll->peers[pe].out_bytes = coll->peers[pe].in_bytes = r->bytes;
    }
    coll->reduces = true;
    xccl_coll_set_source(coll, r->x, r->bytes, r->bytes, true);
    if (r->bytes <= coll->inline_bytes || coll->size == 1) {
        TRY(start(r));
        reduce_range(r, r->x, 0, r->bytes, r->out);
        return XCCL_OK;
    }
    coll->result_in_place = r->bytes >= XCCL_COLL_IN_PLACE_BYTES &&
                            xccl_gas_is_symmetric(coll->world, r->out, r->bytes, &coll->result_offset);
    coll->stages = !(coll->x_in_place && coll->result_in_place);
    TRY(start(r));
    uint64_t rounds = num_rounds(r);
    for (uint64_t k = 0; k < rounds; k++) {
        if (k + 1 < rounds && coll->stages)
            TRY(xccl_coll_send_chunk(coll, k + 1));
        TRY(await_round(r, k));
        reduce_slice(r, k);
        take_round(r, k + 1 == rounds);
        TRY(collect_slices(r, k));
    }
    return coll->x_in_place || coll->result_in_place ? xccl_coll_await_taken(coll) : XCCL_OK;
}

int xccl_coll_all_reduce(xccl_comm_t *comm, const void *x, uint64_t count, xccl_dtype_t dtype, xccl_reduce_op_t op,
                         int64_t timeout_ns, void *out) {
    TRY(check_reduction(comm, XCCL_OP_ALL_REDUCE, dtype, op, x, out));
    uint64_t itemsize = xccl_reduce_itemsize(dtype), bytes = count * itemsize;
    if (x != out)
        TRY(xccl_coll_check_apart(comm, XCCL_OP_ALL_REDUCE, x, bytes, out, bytes));
    TRY(xccl_coll_begin(comm, XCCL_OP_ALL_REDUCE, (int)op, dtype, 0, timeout_ns));
    reduction_t r = {comm->coll, dtype, op, itemsize, bytes, x, out, comm->coll->sources};
    const xccl_race_buffers_t buffers = {x, bytes, out, bytes};
    TRY(xccl_coll_enter(comm, buffers));
    return xccl_coll_leave(comm, all_reduce(&r), XCCL_RACE_ALL, buffers);
}
