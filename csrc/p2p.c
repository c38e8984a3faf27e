#include "p2p.h"

#include <stdio.h>
#include <stdlib.h>

#include "heap.h"
#include "layers.h"
#include "status.h"

/* ---- requests ---- */

xccl_request_t *xccl_p2p_new_request(xccl_p2p_t *p2p, bool is_send, int peer, int64_t tag, const void *buffer,
                                     uint64_t bytes) {
    xccl_request_t *request = calloc(1, sizeof *request);
    if (!request) {
        xccl_fail(XCCL_ERR_MEMORY, "no memory for a request");
        return NULL;
    }
    request->p2p = p2p;
    request->is_send = is_send;
    request->peer = peer;
    request->tag = tag;
    request->buffer = (unsigned char *)buffer;
    request->bytes = bytes;
    request->order = p2p->next_order++;
    if (!xccl_race_is_off(p2p->world)) {
        request->checked = p2p->world;
        request->site = xccl_race_site(p2p->world);
    }
    return request;
}

void xccl_p2p_list_append(xccl_request_list_t *list, xccl_request_t *request) {
    request->list = list;
    request->next = NULL;
    request->previous = list->last;
    *(list->last ? &list->last->next : &list->first) = request;
    list->last = request;
}

void xccl_p2p_list_remove(xccl_request_t *request) {
    xccl_request_list_t *list = request->list;
    *(request->previous ? &request->previous->next : &list->first) = request->next;
    *(request->next ? &request->next->previous : &list->last) = request->previous;
    request->list = NULL;
    request->next = request->previous = NULL;
}

static void free_request(xccl_request_t *request) {
    free(request->failure);
    free(request);
}

void xccl_p2p_complete(xccl_request_t *request, int status) {
    if (request->list)
        xccl_p2p_list_remove(request);
    if (status < 0 && request->abandoned && !request->p2p->failure)
        request->p2p->failure = strdup(xccl_error_message());
    if (status < 0 && !request->abandoned)
        request->failure = xccl_failure_keep();
    if (request->checked && status == XCCL_OK)
        request->other = request->p2p->comm->ranks[request->is_send ? request->peer : request->message.source];
    request->p2p = NULL;
    request->done = true;
    request->status = status;
    if (request->abandoned)
        free_request(request);
}

static int result_of(const xccl_request_t *request, xccl_message_t *out) {
    if (request->status != XCCL_OK)
        return xccl_failure_again(request->failure, request->status);
    *out = request->message;
    if (!request->checked)
        return XCCL_OK;
    const xccl_race_transfer_t transfer = {request->is_send, request->sync,  request->buffer,
                                           request->bytes,   request->other, request->site};
    return xccl_race_completed(request->checked, &transfer);
}

/* ---- progress ---- */

int xccl_p2p_progress(void *arg) {
    xccl_p2p_t *p2p = arg;
    int size = p2p->comm->size;
    for (int dest = 0; dest < size && p2p->num_queued > 0; dest++)
        xccl_p2p_push(p2p, dest);
    xccl_p2p_check_acks(p2p);
    if (!p2p->posted.first && p2p->num_assembling == 0)
        return XCCL_OK;
    return xccl_p2p_pull_from(p2p, XCCL_ANY_SOURCE);
}

void xccl_p2p_settle_hook(xccl_p2p_t *p2p) {
    bool pending = p2p->num_queued > 0 || p2p->awaiting.first || p2p->posted.first || p2p->num_assembling > 0;
    if (pending == p2p->hooked)
        return;
    if (pending) {
        /* there are as many places for hooks as communicators */
        p2p->hooked = xccl_progress_add(p2p->world, xccl_p2p_progress, p2p) == XCCL_OK;
    } else {
        xccl_progress_remove(p2p->world, xccl_p2p_progress, p2p);
        p2p->hooked = false;
    }
}

/* What this request itself needs. */
static int advance(xccl_request_t *request) {
    xccl_p2p_t *p2p = request->p2p;
    if (!request->is_send)
        return xccl_p2p_pull_from(p2p, request->peer);
    if (request->list != &p2p->awaiting) {
        xccl_p2p_push(p2p, request->peer);
        return XCCL_OK;
    }
    int status = request->ack != 0 && xccl_p2p_is_offer(request->way) ? xccl_p2p_help(request) : XCCL_OK;
    xccl_p2p_check_acks(p2p);
    return status;
}

/* ---- waiting ---- */

typedef struct waiting_t {
    xccl_p2p_t *p2p;
    xccl_request_t *request;
    uint64_t moves; /* of the communicator when the wait began */
    bool to_the_end;
    int status;
    char what[96];
} waiting_t;

static bool is_over_or_moved(void *arg) {
    waiting_t *waiting = arg;
    if (!waiting->request->done)
        waiting->status = advance(waiting->request);
    return waiting->request->done || waiting->status != XCCL_OK ||
           (waiting->p2p->moves != waiting->moves && !waiting->to_the_end);
}

static bool all_have_left(const xccl_p2p_t *p2p) {
    for (int pe = 0; pe < p2p->comm->size; pe++) {
        int rank = p2p->comm->ranks[pe];
        if (rank != p2p->world->rank && atomic_load(&p2p->world->ranks[rank].state) != XCCL_RANK_CLOSED)
            return false;
    }
    return p2p->comm->size > 1;
}

bool xccl_p2p_describe_source(const xccl_p2p_t *p2p, int source, int64_t tag, int index, char *what, size_t what_bytes,
                              xccl_awaited_t *out) {
    if (index > 0)
        return false;
    char tag_text[32] = "any tag";
    if (tag != XCCL_ANY_TAG)
        snprintf(tag_text, sizeof tag_text, "tag %lld", (long long)tag);
    snprintf(what, what_bytes, "message with %s%s", tag_text, source == XCCL_ANY_SOURCE ? " from any source" : "");
    *out = (xccl_awaited_t){.peer = -1, .expected = 1, .what = what};
    if (source != XCCL_ANY_SOURCE) {
        uint64_t seen = p2p->incoming[source].ring.tail;
        *out = (xccl_awaited_t){p2p->comm->ranks[source], seen + 1, seen, what};
    } else if (all_have_left(p2p)) {
        out->peer = p2p->comm->ranks[p2p->comm->rank == 0 ? 1 : 0];
    }
    return true;
}

static bool describe_send(const xccl_request_t *send, int index, char *what, size_t what_bytes, xccl_awaited_t *out) {
    if (index > 0)
        return false;
    const xccl_p2p_t *p2p = send->p2p;
    const xccl_ring_producer_t *ring = &p2p->outgoing[send->peer].ring;
    bool published = send->list == &p2p->awaiting;
    snprintf(what, what_bytes, "%s for %llu bytes with tag %lld", published ? "acknowledgement" : "ring slot",
             (unsigned long long)send->bytes, (long long)send->tag);
    *out = (xccl_awaited_t){.peer = p2p->comm->ranks[send->peer], .expected = 1, .what = what};
    if (!published) {
        out->expected = ring->cached_tail + 1;
        out->seen = ring->cached_tail;
    }
    return true;
}

static bool awaited(void *arg, int index, xccl_awaited_t *out) {
    waiting_t *waiting = arg;
    const xccl_request_t *request = waiting->request;
    if (request->done)
        return false;
    if (request->is_send)
        return describe_send(request, index, waiting->what, sizeof waiting->what, out);
    int source = request->peer;
    /* matched already: the rest comes from one source */
    for (int i = 0; source == XCCL_ANY_SOURCE && i < request->p2p->comm->size; i++)
        if (request->p2p->incoming[i].request == request)
            source = i;
    return xccl_p2p_describe_source(request->p2p, source, request->tag, index, waiting->what, sizeof waiting->what,
                                    out);
}

/* Each chunk that moves starts the wait anew, from its spinning end: the next one is soon to come. */
int xccl_p2p_await(xccl_request_t *request, int64_t deadline, xccl_message_t *out) {
    waiting_t waiting = {.p2p = request->p2p, .request = request};
    xccl_wait_t wait = {.ready = is_over_or_moved, .awaited = awaited, .arg = &waiting};
    for (bool again = false; !request->done; again = true) {
        /* past the deadline the wait must end this, however much still moves */
        waiting.to_the_end = again && xccl_now_ns() >= xccl_deadline_at(waiting.p2p->world, deadline);
        waiting.moves = waiting.p2p->moves;
        int status = xccl_wait(waiting.p2p->world, &wait, deadline);
        if (status == XCCL_OK)
            status = waiting.status;
        if (status != XCCL_OK && !request->done)
            return status;
    }
    return result_of(request, out);
}

/* The call failed with `status` before its request was over. */
static int give_up(xccl_request_t *request, int status) {
    xccl_failure_t *failure = xccl_failure_keep();
    int outcome = status;
    if (!request->is_send) {
        int kept = xccl_p2p_cancel_recv(request);
        outcome = kept == XCCL_OK ? status : kept;
    } else if (xccl_p2p_cancel_send(request)) {
        outcome = XCCL_OK;
    }
    if (outcome == status)
        xccl_failure_again(failure, status);
    free(failure);
    return outcome;
}

int xccl_p2p_finish(xccl_p2p_t *p2p, xccl_request_t *request, int64_t deadline, xccl_message_t *out) {
    int status = xccl_p2p_await(request, deadline, out);
    if (request->done)
        free_request(request);
    else
        status = give_up(request, status);
    xccl_p2p_settle_hook(p2p);
    return status;
}

/* ---- calls on requests ---- */

/* A loop around test must notice that its peer has died, too. Looks ten times a second. */
static int check_peer(const xccl_request_t *request) {
    xccl_p2p_t *p2p = request->p2p;
    int64_t now = xccl_now_ns();
    if (now < p2p->next_look_ns)
        return XCCL_OK;
    p2p->next_look_ns = now + 100 * 1000000;
    for (int pe = 0; pe < p2p->comm->size; pe++) {
        int rank = p2p->comm->ranks[pe];
        if (rank != p2p->world->rank && xccl_shm_is_dead(p2p->world, rank))
            return xccl_shm_fail_lost(p2p->world, rank, "test");
    }
    return XCCL_OK;
}

int xccl_p2p_request_test(xccl_request_t *request, xccl_message_t *out) {
    if (request->done)
        return result_of(request, out);
    xccl_p2p_t *p2p = request->p2p;
    int status = xccl_comm_check(p2p->comm);
    if (status == XCCL_OK)
        status = xccl_progress(p2p->world);
    if (status == XCCL_OK && !request->done)
        status = advance(request);
    xccl_p2p_settle_hook(p2p);
    if (request->done)
        return result_of(request, out);
    if (status == XCCL_OK)
        status = check_peer(request);
    return status == XCCL_OK ? XCCL_AGAIN : status;
}

int xccl_p2p_request_wait(xccl_request_t *request, int64_t timeout_ns, xccl_message_t *out) {
    if (request->done)
        return result_of(request, out);
    xccl_p2p_t *p2p = request->p2p;
    int status = xccl_comm_check(p2p->comm);
    if (status != XCCL_OK)
        return status;
    status = xccl_op_begin(p2p->world, XCCL_OP_WAIT);
    if (status != XCCL_OK)
        return status;
    status = xccl_p2p_await(request, xccl_deadline(p2p->world, timeout_ns), out);
    xccl_p2p_settle_hook(p2p);
    return status;
}

int xccl_p2p_request_is_done(const xccl_request_t *request) {
    return request->done;
}

void xccl_p2p_request_free(xccl_request_t *request) {
    if (request->done)
        free_request(request);
    else
        request->abandoned = true;
}

/* ---- arguments ---- */

int xccl_p2p_check_args(const xccl_comm_t *comm, const char *operation, const void *buffer, uint64_t bytes, int peer,
                        int64_t tag, bool any) {
    int status = xccl_comm_check(comm);
    if (status == XCCL_OK && !(any && peer == XCCL_ANY_SOURCE))
        status = xccl_comm_check_pe(comm, peer, operation);
    if (status != XCCL_OK)
        return status;
    if (tag < 0 && !(any && tag == XCCL_ANY_TAG))
        return xccl_fail(XCCL_ERR_USAGE, "rank %d, %s: a tag is a number >= 0%s, got %lld", comm->rank, operation,
                         any ? " or ANY_TAG" : "", (long long)tag);
    if (bytes >> 55 || (!buffer && bytes > 0))
        return xccl_fail(XCCL_ERR_USAGE, "rank %d, %s: %llu bytes at %p are no buffer", comm->rank, operation,
                         (unsigned long long)bytes, buffer);
    return XCCL_OK;
}
