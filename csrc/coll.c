/* coll.c - collectives that move data, and the state of a communicator. */
#include <stdlib.h>

#include "cma.h"
#include "coll.h"
#include "status.h"

/* ---- state ---- */

static uint64_t inline_bytes(int size) {
    uint64_t lines = XCCL_COLL_INBOX_BYTES / (2 * (uint64_t)size * XCCL_LINE);
    uint64_t most = lines > 2 ? (lines - 1) * XCCL_LINE : XCCL_LINE;
    return most < XCCL_COLL_INLINE_BYTES ? most : XCCL_COLL_INLINE_BYTES;
}

static void release(xccl_coll_t *coll) {
    xccl_coll_stage_close(coll);
    free(coll->sources);
    free(coll->order);
    free(coll->peers);
    free(coll);
}

static xccl_coll_t *create(xccl_comm_t *comm) {
    xccl_coll_t *coll = calloc(1, sizeof *coll);
    if (coll == NULL)
        return NULL;
    coll->comm = comm;
    coll->world = comm->world;
    coll->rank = comm->rank;
    coll->size = comm->size;
    coll->order = calloc((size_t)comm->size, sizeof *coll->order);
    coll->peers = calloc((size_t)comm->size, sizeof *coll->peers);
    coll->sources = calloc((size_t)comm->size, sizeof *coll->sources);
    coll->inline_bytes = inline_bytes(comm->size);
    coll->cache_bytes = xccl_coll_cache_bytes();
    if (!xccl_coll_stage_open(coll) || coll->order == NULL || coll->peers == NULL || coll->sources == NULL) {
        release(coll);
        return NULL;
    }
    for (int i = 0; i < comm->size - 1; i++)
        coll->order[i] = (comm->rank + 1 + i) % comm->size;
    return coll;
}

int xccl_coll_open(xccl_comm_t *comm, int64_t deadline) {
    xccl_coll_t *coll = create(comm);
    if (coll == NULL)
        return xccl_fail(XCCL_ERR_MEMORY, "no memory for the collectives of %d ranks", comm->size);
    comm->coll = coll;
    int64_t left = deadline == INT64_MAX ? XCCL_TIMEOUT_NONE : deadline - xccl_now_ns();
    uint64_t inbox_bytes = xccl_coll_slot_offset(coll, coll->size, 0);
    uint64_t lines = (uint64_t)XCCL_COLL_CHANNELS * XCCL_COLL_COUNTERS * (uint64_t)coll->size;
    uint64_t inbox;
    int status = xccl_heap_alloc(comm, XCCL_AREA_META, inbox_bytes + lines * XCCL_LINE, XCCL_HEAP_COMMIT,
                                 coll->block_bytes, left > 0 ? left : 0, &inbox);
    if (status == XCCL_OK)
        status = xccl_heap_alloc(comm, XCCL_AREA_MANAGED, coll->ring_bytes, XCCL_HEAP_ADDRESS_ONLY, coll->block_bytes,
                                 left > 0 ? left : 0, &coll->staging);
    if (status < 0) {
        xccl_coll_discard(comm);
        return status;
    }
    coll->inbox = inbox;
    coll->counters = inbox + inbox_bytes;
    coll->peers_read = true; /* known since the members have agreed on the blocks */
    for (int pe = 0; pe < comm->size; pe++)
        coll->peers_read = coll->peers_read && xccl_cma_can_read(comm->world, comm->ranks[pe]);
    return XCCL_OK;
}

int xccl_coll_close(xccl_comm_t *comm, int64_t deadline) {
    int64_t left = deadline == INT64_MAX ? XCCL_TIMEOUT_NONE : deadline - xccl_now_ns();
    int status = xccl_heap_free(comm, XCCL_AREA_META, comm->coll->inbox, left > 0 ? left : 0);
    if (status == XCCL_OK)
        status = xccl_heap_free(comm, XCCL_AREA_MANAGED, comm->coll->staging, left > 0 ? left : 0);
    xccl_coll_discard(comm);
    return status;
}

void xccl_coll_discard(xccl_comm_t *comm) {
    if (comm->coll == NULL)
        return;
    release(comm->coll);
    comm->coll = NULL;
}

/* ---- begin ---- */

int xccl_coll_begin(xccl_comm_t *comm, xccl_op_t op, int reduce, xccl_dtype_t dtype, uint64_t param,
                    int64_t timeout_ns) {
    TRY(xccl_comm_check(comm));
    xccl_coll_t *coll = comm->coll;
    if (dtype < 0 || dtype > XCCL_BYTES)
        return xccl_fail(XCCL_ERR_USAGE, "%s: dtype %d is not an xccl_dtype_t", xccl_op_name(op), (int)dtype);
    if (coll->unfinished)
        return xccl_fail(XCCL_ERR_USAGE,
                         "%s on rank %d: an all_to_all_v was begun and not finished on this communicator; finish it",
                         xccl_op_name(op), coll->rank);
    TRY(xccl_op_begin(comm->world, op));
    coll->epoch++;
    coll->signature = xccl_coll_signature(op, reduce, dtype, param);
    coll->deadline = xccl_deadline(comm->world, timeout_ns);
    coll->any_size = coll->reduces = coll->out_beyond_cache = false;
    coll->differs = -1;
    return XCCL_OK;
}

int xccl_coll_settle(xccl_comm_t *comm, int status) {
    if (status < 0)
        comm->broken = true;
    return status;
}

int xccl_coll_enter(xccl_comm_t *comm, xccl_race_buffers_t buffers) {
    return xccl_coll_settle(comm, xccl_race_enter(comm, XCCL_RACE_COLL, comm->coll->epoch, buffers));
}

int xccl_coll_leave(xccl_comm_t *comm, int status, int pe, xccl_race_buffers_t buffers) {
    if (xccl_coll_settle(comm, status) < 0)
        return status;
    return xccl_race_leave(comm, XCCL_RACE_COLL, comm->coll->epoch, pe, buffers);
}

int xccl_coll_check_apart(const xccl_comm_t *comm, xccl_op_t op, const void *x, uint64_t x_bytes, const void *out,
                          uint64_t out_bytes) {
    uintptr_t a = (uintptr_t)x, b = (uintptr_t)out;
    if (x_bytes == 0 || out_bytes == 0 || a + x_bytes <= b || b + out_bytes <= a)
        return XCCL_OK;
    return xccl_fail(XCCL_ERR_USAGE,
                     "%s on rank %d: the %llu bytes of the input at %p overlap the %llu bytes of the output at %p; "
                     "give an output of its own",
                     xccl_op_name(op), comm->rank, (unsigned long long)x_bytes, x, (unsigned long long)out_bytes, out);
}

/* ---- exchanges ---- */

static void copy(const xccl_coll_t *coll, void *to, const void *from, uint64_t bytes) {
    if (bytes > 0 && to != from)
        xccl_coll_copy(to, from, bytes, coll->out_beyond_cache);
}

/* Sends peers[].out and receives peers[].in, all of them known; the own part is copied here, too. */
static int exchange(xccl_coll_t *coll) {
    xccl_coll_peer_t *own = &coll->peers[coll->rank];
    TRY(xccl_coll_send_first(coll));
    copy(coll, own->in, own->out, own->out_bytes);
    TRY(xccl_coll_receive_headers(coll, coll->order, coll->size - 1));
    TRY(xccl_coll_deliver(coll));
    return coll->x_in_place ? xccl_coll_await_taken(coll) : XCCL_OK;
}

/* The messages when every member sends `bytes` to every member. */
static void set_uniform(xccl_coll_t *coll, const void *x, uint64_t out_step, uint64_t bytes, void *out) {
    for (int pe = 0; pe < coll->size; pe++) {
        xccl_coll_peer_t *peer = &coll->peers[pe];
        peer->out = (const unsigned char *)x + (uint64_t)pe * out_step;
        peer->in = (unsigned char *)out + (uint64_t)pe * bytes;
        peer->out_bytes = peer->in_bytes = bytes;
    }
    uint64_t parts = out_step == 0 ? 1 : (uint64_t)coll->size;
    xccl_coll_set_source(coll, x, parts * bytes, bytes, out_step == 0);
    xccl_coll_choose_result_stores(coll, (parts + (uint64_t)coll->size) * bytes);
}

int xccl_coll_barrier(xccl_comm_t *comm, int64_t timeout_ns) {
    TRY(xccl_coll_begin(comm, XCCL_OP_BARRIER, 0, XCCL_BYTES, 0, timeout_ns));
    const xccl_race_buffers_t none = {0};
    TRY(xccl_coll_enter(comm, none));
    set_uniform(comm->coll, NULL, 0, 0, NULL);
    return xccl_coll_leave(comm, exchange(comm->coll), XCCL_RACE_ALL, none);
}

int xccl_coll_all_gather(xccl_comm_t *comm, const void *x, uint64_t bytes, xccl_dtype_t dtype, int64_t timeout_ns,
                         void *out) {
    if (x != (unsigned char *)out + (uint64_t)comm->rank * bytes)
        TRY(xccl_coll_check_apart(comm, XCCL_OP_ALL_GATHER, x, bytes, out, (uint64_t)comm->size * bytes));
    TRY(xccl_coll_begin(comm, XCCL_OP_ALL_GATHER, 0, dtype, 0, timeout_ns));
    const xccl_race_buffers_t buffers = {x, bytes, out, (uint64_t)comm->size * bytes};
    TRY(xccl_coll_enter(comm, buffers));
    set_uniform(comm->coll, x, 0, bytes, out);
    return xccl_coll_leave(comm, exchange(comm->coll), XCCL_RACE_ALL, buffers);
}

int xccl_coll_all_to_all(xccl_comm_t *comm, const void *x, uint64_t bytes, xccl_dtype_t dtype, int64_t timeout_ns,
                         void *out) {
    uint64_t total = (uint64_t)comm->size * bytes;
    TRY(xccl_coll_check_apart(comm, XCCL_OP_ALL_TO_ALL, x, total, out, total));
    TRY(xccl_coll_begin(comm, XCCL_OP_ALL_TO_ALL, 0, dtype, 0, timeout_ns));
    const xccl_race_buffers_t buffers = {x, total, out, total};
    TRY(xccl_coll_enter(comm, buffers));
    set_uniform(comm->coll, x, bytes, bytes, out);
    return xccl_coll_leave(comm, exchange(comm->coll), XCCL_RACE_ALL, buffers);
}

/* ---- broadcast ---- */

static int send_to_all(xccl_coll_t *coll, const void *data, uint64_t bytes) {
    for (int pe = 0; pe < coll->size; pe++) {
        coll->peers[pe].out = data;
        coll->peers[pe].out_bytes = bytes;
        coll->peers[pe].in_bytes = coll->peers[pe].in_done = 0;
    }
    xccl_coll_set_source(coll, data, bytes, bytes, true);
    TRY(xccl_coll_send_first(coll));
    /* Nobody answers a broadcast: the receivers count even an inline message, so that its slot becomes free. */
    if (bytes <= coll->inline_bytes)
        for (int i = 0; i < coll->size - 1; i++)
            coll->peers[coll->order[i]].units[0]++;
    TRY(xccl_coll_deliver(coll));
    return coll->x_in_place ? xccl_coll_await_taken(coll) : XCCL_OK;
}

static int receive_from(xccl_coll_t *coll, int root, uint64_t bytes, void *out) {
    for (int pe = 0; pe < coll->size; pe++)
        coll->peers[pe].out_bytes = coll->peers[pe].in_bytes = coll->peers[pe].in_done = 0;
    coll->peers[root].in = out;
    coll->peers[root].in_bytes = bytes;
    coll->x_in_place = coll->x_by_cma = coll->streams = coll->samples = false;
    xccl_coll_choose_result_stores(coll, bytes);
    TRY(xccl_coll_receive_headers(coll, &root, 1));
    TRY(xccl_coll_deliver(coll));
    if ((coll->peers[root].in_mode & (XCCL_COLL_STAGED | XCCL_COLL_IN_PLACE)) == 0)
        xccl_coll_take(coll, root, 0);
    return XCCL_OK;
}

int xccl_coll_broadcast(xccl_comm_t *comm, const void *data, uint64_t bytes, xccl_dtype_t dtype, int root,
                        int64_t timeout_ns, void *out) {
    TRY(xccl_comm_check_pe(comm, root, "broadcast"));
    if (comm->rank == root && data != out)
        TRY(xccl_coll_check_apart(comm, XCCL_OP_BROADCAST, data, bytes, out, bytes));
    TRY(xccl_coll_begin(comm, XCCL_OP_BROADCAST, 0, dtype, (uint64_t)root, timeout_ns));
    const bool is_root = comm->rank == root;
    const xccl_race_buffers_t buffers = {data, is_root ? bytes : 0, out, is_root && data == out ? 0 : bytes};
    TRY(xccl_coll_enter(comm, buffers));
    if (!is_root)
        return xccl_coll_leave(comm, receive_from(comm->coll, root, bytes, out), root, buffers);
    xccl_coll_choose_result_stores(comm->coll, bytes);
    copy(comm->coll, out, data, bytes);
    return xccl_coll_leave(comm, send_to_all(comm->coll, data, bytes), root, buffers);
}

/* ---- all_to_all_v ---- */

static int check_rows(const xccl_comm_t *comm, const char *name, const uint64_t *bytes, uint64_t row_bytes) {
    for (int pe = 0; pe < comm->size; pe++)
        if (row_bytes == 0 ? bytes[pe] != 0 : bytes[pe] % row_bytes != 0)
            return xccl_fail(XCCL_ERR_USAGE,
                             "all_to_all_v on rank %d: %s[%d] is %llu, not a multiple of row_bytes %llu", comm->rank,
                             name, pe, (unsigned long long)bytes[pe], (unsigned long long)row_bytes);
    return XCCL_OK;
}

static void set_messages_out(xccl_coll_t *coll, const void *x, const uint64_t *send_bytes) {
    uint64_t total = 0, longest = 0;
    for (int pe = 0; pe < coll->size; pe++) {
        coll->peers[pe].out = (const unsigned char *)x + total;
        coll->peers[pe].out_bytes = send_bytes[pe];
        total += send_bytes[pe];
        if (pe != coll->rank && send_bytes[pe] > longest)
            longest = send_bytes[pe];
    }
    xccl_coll_set_source(coll, x, total, longest, false);
    xccl_coll_choose_result_stores(coll, 2 * total);
}

/* Members agree on row_bytes, so all that was sent is whole rows. */
static int check_received_rows(xccl_coll_t *coll, uint64_t row_bytes) {
    for (int pe = 0; pe < coll->size; pe++) {
        uint64_t bytes = coll->peers[pe].in_bytes, rest = row_bytes == 0 ? bytes : bytes % row_bytes;
        if (rest != 0)
            return xccl_comm_fail_damaged(coll->comm, pe, "bytes", bytes, bytes - rest, bytes - rest);
    }
    return XCCL_OK;
}

/* Sends all headers and receives those of all. */
static int begin_v(xccl_coll_t *coll, const void *x, const uint64_t *send_bytes) {
    set_messages_out(coll, x, send_bytes);
    TRY(xccl_coll_send_first(coll));
    return xccl_coll_receive_headers(coll, coll->order, coll->size - 1);
}

static int finish_v(xccl_coll_t *coll, void *out) {
    uint64_t at = 0;
    for (int pe = 0; pe < coll->size; pe++) {
        coll->peers[pe].in = (unsigned char *)out + at;
        at += coll->peers[pe].in_bytes;
    }
    const xccl_coll_peer_t *own = &coll->peers[coll->rank];
    copy(coll, own->in, own->out, own->out_bytes);
    TRY(xccl_coll_deliver(coll));
    return coll->x_in_place ? xccl_coll_await_taken(coll) : XCCL_OK;
}

static uint64_t sum(const uint64_t *bytes, int count) {
    uint64_t total = 0;
    for (int i = 0; i < count; i++)
        total += bytes[i];
    return total;
}

int xccl_coll_all_to_all_v(xccl_comm_t *comm, const void *x, const uint64_t *send_bytes, uint64_t row_bytes,
                           xccl_dtype_t dtype, const uint64_t *recv_bytes, int64_t timeout_ns, void *out) {
    xccl_coll_t *coll = comm->coll;
    TRY(check_rows(comm, "send_bytes", send_bytes, row_bytes));
    TRY(check_rows(comm, "recv_bytes", recv_bytes, row_bytes));
    TRY(xccl_coll_check_apart(comm, XCCL_OP_ALL_TO_ALL_V, x, sum(send_bytes, comm->size), out,
                              sum(recv_bytes, comm->size)));
    if (send_bytes[comm->rank] != recv_bytes[comm->rank])
        return xccl_fail(
            XCCL_ERR_USAGE, "all_to_all_v on rank %d: it sends %llu bytes to itself and expects %llu from itself",
            comm->rank, (unsigned long long)send_bytes[comm->rank], (unsigned long long)recv_bytes[comm->rank]);
    TRY(xccl_coll_begin(comm, XCCL_OP_ALL_TO_ALL_V, 0, dtype, row_bytes, timeout_ns));
    for (int pe = 0; pe < comm->size; pe++)
        coll->peers[pe].in_bytes = recv_bytes[pe];
    const xccl_race_buffers_t buffers = {x, sum(send_bytes, comm->size), out, sum(recv_bytes, comm->size)};
    TRY(xccl_coll_enter(comm, buffers));
    int status = begin_v(coll, x, send_bytes);
    return xccl_coll_leave(comm, status < 0 ? status : finish_v(coll, out), XCCL_RACE_ALL, buffers);
}

int xccl_coll_all_to_all_v_begin(xccl_comm_t *comm, const void *x, const uint64_t *send_bytes, uint64_t row_bytes,
                                 xccl_dtype_t dtype, int64_t timeout_ns, uint64_t *recv_bytes) {
    xccl_coll_t *coll = comm->coll;
    TRY(check_rows(comm, "send_bytes", send_bytes, row_bytes));
    TRY(xccl_coll_begin(comm, XCCL_OP_ALL_TO_ALL_V, 0, dtype, row_bytes, timeout_ns));
    coll->any_size = true;
    coll->peers[comm->rank].in_bytes = send_bytes[comm->rank];
    TRY(xccl_coll_enter(comm, (xccl_race_buffers_t){.x = x, .x_bytes = sum(send_bytes, comm->size)}));
    TRY(xccl_coll_settle(comm, begin_v(coll, x, send_bytes)));
    TRY(xccl_coll_settle(comm, check_received_rows(coll, row_bytes)));
    for (int pe = 0; pe < comm->size; pe++)
        recv_bytes[pe] = coll->peers[pe].in_bytes;
    coll->unfinished = true;
    return XCCL_OK;
}

static xccl_race_buffers_t buffers_v(const xccl_comm_t *comm, const void *out) {
    xccl_race_buffers_t buffers = {.x = comm->coll->x, .out = out};
    for (int pe = 0; pe < comm->size; pe++) {
        buffers.x_bytes += comm->coll->peers[pe].out_bytes;
        buffers.out_bytes += comm->coll->peers[pe].in_bytes;
    }
    return buffers;
}

int xccl_coll_all_to_all_v_finish(xccl_comm_t *comm, int64_t timeout_ns, void *out) {
    TRY(xccl_comm_check(comm));
    xccl_coll_t *coll = comm->coll;
    if (!coll->unfinished)
        return xccl_fail(XCCL_ERR_USAGE, "all_to_all_v_finish on rank %d: nothing was begun", comm->rank);
    coll->unfinished = false;
    coll->deadline = xccl_deadline(comm->world, timeout_ns);
    const xccl_race_buffers_t buffers = buffers_v(comm, out);
    int status = xccl_coll_check_apart(comm, XCCL_OP_ALL_TO_ALL_V, buffers.x, buffers.x_bytes, out, buffers.out_bytes);
    return xccl_coll_leave(comm, status < 0 ? status : finish_v(coll, out), XCCL_RACE_ALL, buffers);
}
