/* Opening and closing send/receive on a communicator. */
#include <stdio.h>
#include <stdlib.h>

#include "heap.h"
#include "layers.h"
#include "p2p.h"
#include "status.h"

static int64_t time_left(int64_t deadline) {
    if (deadline == INT64_MAX)
        return XCCL_TIMEOUT_NONE;
    int64_t left = deadline - xccl_now_ns();
    return left > 0 ? left : 0;
}

/* ---- open ---- */

enum { LEAST_DATA = 4 * XCCL_LINE }; /* the unit of a ring's data: a quarter of it is whole lines */

/* Ring from member `from` to member `to`. */
static xccl_ring_shape_t shape_of(const xccl_p2p_t *p2p, int from, int to) {
    const xccl_config_t *config = &p2p->world->header->config;
    uint64_t size = (uint64_t)p2p->comm->size;
    xccl_ring_shape_t shape = {
        .lines = size > XCCL_P2P_LINES ? XCCL_P2P_LINES_MANY : XCCL_P2P_LINES,
        .data_bytes = (config->p2p_slot_bytes * config->p2p_slots + LEAST_DATA - 1) / LEAST_DATA * LEAST_DATA,
    };
    /* before the lines: reading those upwards would prefetch it, and hide how far the peer is */
    shape.tail_at = p2p->fields_at + (uint64_t)to * XCCL_LINE;
    shape.lines_at = p2p->fields_at + (size + (uint64_t)from * shape.lines) * XCCL_LINE;
    shape.data_at = p2p->data_at + (uint64_t)from * shape.data_bytes;
    return shape;
}

/* The three blocks; what was allocated before a failure goes with the communicator, which is broken then. */
static int allocate(xccl_p2p_t *p2p, int64_t deadline) {
    enum { TAG = 0x703270 }; /* "p2p" */
    uint64_t size = (uint64_t)p2p->comm->size;
    xccl_ring_shape_t shape = shape_of(p2p, 0, 0);
    int status = xccl_heap_alloc(p2p->comm, XCCL_AREA_META, size * (shape.lines + 1) * XCCL_LINE, XCCL_HEAP_COMMIT, TAG,
                                 time_left(deadline), &p2p->fields_at);
    if (status == XCCL_OK)
        status = xccl_heap_alloc(p2p->comm, XCCL_AREA_META, (uint64_t)XCCL_P2P_MAX_ACKS * XCCL_LINE,
                                 XCCL_HEAP_ADDRESS_ONLY, TAG, time_left(deadline), &p2p->acks_at);
    if (status == XCCL_OK)
        status = xccl_heap_alloc(p2p->comm, XCCL_AREA_MANAGED, size * shape.data_bytes, XCCL_HEAP_ADDRESS_ONLY, TAG,
                                 time_left(deadline), &p2p->data_at);
    return status;
}

/* Ticks of FAR_NS, from those of the time since `start_ns` and `start_ticks`; 0 if that was too short to tell. A line
 * takes 20-60 ns from a core that shares the last-level cache, and 115-200 ns from one that does not. */
static uint64_t far_ticks(int64_t start_ns, uint64_t start_ticks) {
    enum { FAR_NS = 100, LEAST_NS = 10000 };
    int64_t passed = xccl_now_ns() - start_ns;
    return passed < LEAST_NS ? 0 : (xccl_ring_ticks() - start_ticks) * FAR_NS / (uint64_t)passed;
}

static void open_rings(xccl_p2p_t *p2p, uint64_t line_is_far) {
    const xccl_comm_t *comm = p2p->comm;
    for (int pe = 0; pe < comm->size; pe++) {
        xccl_p2p_outgoing_t *out = &p2p->outgoing[pe];
        xccl_ring_shape_t shape = shape_of(p2p, comm->rank, pe);
        xccl_ring_open_producer(&out->ring, p2p->world, shape, comm->ranks[pe], &p2p->ends[(uint64_t)pe * shape.lines],
                                0);
        out->ring.far_ticks = line_is_far;
        p2p->incoming[pe].source = pe;
        xccl_ring_open_consumer(&p2p->incoming[pe].ring, p2p->world, shape_of(p2p, pe, comm->rank), comm->ranks[pe], 0);
    }
}

int xccl_p2p_open(xccl_comm_t *comm, int64_t deadline) {
    size_t size = (size_t)comm->size;
    int64_t start_ns = xccl_now_ns();
    uint64_t start_ticks = xccl_ring_ticks();
    xccl_p2p_t *p2p = calloc(1, sizeof *p2p);
    if (!p2p)
        return xccl_fail(XCCL_ERR_MEMORY, "no memory for send/receive");
    comm->p2p = p2p;
    p2p->comm = comm;
    p2p->world = comm->world;
    p2p->outgoing = calloc(size, sizeof *p2p->outgoing);
    p2p->incoming = calloc(size, sizeof *p2p->incoming);
    p2p->ends = calloc(size * shape_of(p2p, 0, 0).lines, sizeof *p2p->ends);
    int status = XCCL_OK;
    if (!p2p->outgoing || !p2p->incoming || !p2p->ends)
        status = xccl_fail(XCCL_ERR_MEMORY, "no memory for send/receive with %d ranks", comm->size);
    if (status == XCCL_OK)
        status = allocate(p2p, deadline);
    if (status != XCCL_OK) {
        xccl_p2p_discard(comm);
        return status;
    }
    open_rings(p2p, far_ticks(start_ns, start_ticks));
    return XCCL_OK;
}

/* ---- close ---- */

/* A send that close has to complete: not one given up, nor one to the own rank, which nobody can receive any more. */
static const xccl_request_t *first_pending_send(const xccl_p2p_t *p2p) {
    for (int dest = 0; dest < p2p->comm->size && p2p->num_queued > 0; dest++)
        for (const xccl_request_t *send = p2p->outgoing[dest].queue.first; send; send = send->next)
            if (!send->cancelled)
                return send;
    for (const xccl_request_t *send = p2p->awaiting.first; send; send = send->next)
        if (!send->cancelled && send->peer != p2p->comm->rank)
            return send;
    return NULL;
}

static bool is_flushed(void *arg) {
    xccl_p2p_t *p2p = arg;
    for (int dest = 0; dest < p2p->comm->size && p2p->num_queued > 0; dest++)
        xccl_p2p_push(p2p, dest);
    xccl_p2p_check_acks(p2p);
    return first_pending_send(p2p) == NULL;
}

static bool unflushed(void *arg, int index, xccl_awaited_t *out) {
    xccl_p2p_t *p2p = arg;
    const xccl_request_t *send = first_pending_send(p2p);
    if (index > 0 || !send)
        return false;
    *out = (xccl_awaited_t){.peer = p2p->comm->ranks[send->peer],
                            .expected = send->bytes,
                            .seen = send->moved,
                            .what = "receive of a pending send"};
    return true;
}

/* Names receives whose requests somebody holds. Their number. */
static uint64_t describe_posted(const xccl_p2p_t *p2p, char *text, size_t text_bytes) {
    uint64_t count = 0;
    for (const xccl_request_t *receive = p2p->posted.first; receive; receive = receive->next) {
        if (receive->abandoned)
            continue;
        size_t length = strlen(text);
        if (++count <= 4)
            snprintf(text + length, text_bytes - length, "%s%llu bytes from rank %d with tag %lld",
                     count > 1 ? ", " : "", (unsigned long long)receive->bytes, receive->peer, (long long)receive->tag);
    }
    return count;
}

/* USAGE if closing would lose something: nothing is dropped in silence. */
static int check_leftovers(xccl_p2p_t *p2p) {
    char text[512] = "";
    int status = xccl_p2p_progress(p2p);
    if (status != XCCL_OK)
        return status;
    if (p2p->failure) {
        status = xccl_fail(XCCL_ERR_USAGE, "rank %d, close: a request that nobody waited for had failed: %s",
                           p2p->comm->rank, p2p->failure);
        free(p2p->failure);
        p2p->failure = NULL;
        return status;
    }
    uint64_t count = describe_posted(p2p, text, sizeof text);
    if (count > 0)
        return xccl_fail(
            XCCL_ERR_USAGE,
            "rank %d, close: %llu receives are pending (-1 is any): %s. Wait for their requests or drop them, "
            "then close again",
            p2p->comm->rank, (unsigned long long)count, text);
    count = xccl_p2p_describe_unreceived(p2p, text, sizeof text);
    if (count > 0)
        return xccl_fail(
            XCCL_ERR_USAGE,
            "rank %d, close: %llu messages or more were sent to this rank and never received: %s. Receive them, "
            "then close again",
            p2p->comm->rank, (unsigned long long)count, text);
    return XCCL_OK;
}

/* All members learn whether one of them has leftovers, so that they stay in step. */
static int agree_on_leftovers(xccl_p2p_t *p2p, int64_t deadline) {
    xccl_comm_t *comm = p2p->comm;
    /* behind this barrier, what members have sent is in the rings */
    int status = xccl_comm_sync(comm, deadline);
    if (status != XCCL_OK)
        return status;
    int mine = check_leftovers(p2p);
    unsigned char record[XCCL_AGREE_BYTES] = {0}, all[(size_t)comm->size * XCCL_AGREE_BYTES];
    memcpy(record, &mine, sizeof mine);
    status = xccl_comm_agree(comm, record, all, deadline);
    if (status != XCCL_OK || mine != XCCL_OK)
        return status != XCCL_OK ? status : mine;
    for (int pe = 0; pe < comm->size; pe++) {
        int theirs;
        memcpy(&theirs, all + (size_t)pe * XCCL_AGREE_BYTES, sizeof theirs);
        if (theirs != XCCL_OK)
            return xccl_fail(theirs, "rank %d, close: rank %d has messages or receives left over, and the details",
                             comm->rank, pe);
    }
    return XCCL_OK;
}

static int free_blocks(xccl_p2p_t *p2p, int64_t deadline) {
    int status = xccl_heap_free(p2p->comm, XCCL_AREA_META, p2p->fields_at, time_left(deadline));
    if (status == XCCL_OK)
        status = xccl_heap_free(p2p->comm, XCCL_AREA_META, p2p->acks_at, time_left(deadline));
    if (status == XCCL_OK)
        status = xccl_heap_free(p2p->comm, XCCL_AREA_MANAGED, p2p->data_at, time_left(deadline));
    return status;
}

int xccl_p2p_close(xccl_comm_t *comm, int64_t deadline) {
    xccl_p2p_t *p2p = comm->p2p;
    xccl_wait_t wait = {.ready = is_flushed, .awaited = unflushed, .arg = p2p};
    int status = xccl_wait(comm->world, &wait, deadline);
    if (status == XCCL_OK)
        status = comm->context == 0 ? check_leftovers(p2p) : agree_on_leftovers(p2p, deadline);
    if (status == XCCL_OK && comm->context != 0)
        status = free_blocks(p2p, deadline);
    return status;
}

/* ---- discard ---- */

static void end_list(xccl_request_list_t *list) {
    while (list->first)
        xccl_p2p_complete(list->first,
                          xccl_fail(XCCL_ERR_USAGE, "the communicator was closed before this request completed"));
}

static void discard_incoming(xccl_p2p_incoming_t *in) {
    if (in->request)
        xccl_p2p_complete(in->request,
                          xccl_fail(XCCL_ERR_USAGE, "the communicator was closed before this request completed"));
    for (xccl_unexpected_t *message = in->first, *next; message; message = next) {
        next = message->next;
        free(message);
    }
}

void xccl_p2p_discard(xccl_comm_t *comm) {
    xccl_p2p_t *p2p = comm->p2p;
    if (!p2p)
        return;
    xccl_progress_remove(p2p->world, xccl_p2p_progress, p2p);
    end_list(&p2p->posted);
    end_list(&p2p->awaiting);
    for (int pe = 0; pe < comm->size; pe++) {
        if (p2p->outgoing)
            end_list(&p2p->outgoing[pe].queue);
        if (p2p->incoming)
            discard_incoming(&p2p->incoming[pe]);
    }
    free(p2p->outgoing);
    free(p2p->incoming);
    free(p2p->ends);
    free(p2p->free_acks);
    free(p2p->failure);
    free(p2p);
    comm->p2p = NULL;
}
