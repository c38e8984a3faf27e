#include "p2p.h"

#include <stdio.h>
#include <stdlib.h>

#include "status.h"

static bool tag_fits(int64_t wanted, int64_t tag) {
    return wanted == XCCL_ANY_TAG || wanted == tag;
}

static bool source_fits(int wanted, int source) {
    return wanted == XCCL_ANY_SOURCE || wanted == source;
}

/* ---- posted receives ---- */

/* In posting order: a receive that is posted again after its message was cancelled gets its old place back. */
static void insert_posted(xccl_p2p_t *p2p, xccl_request_t *receive) {
    xccl_request_list_t *posted = &p2p->posted;
    xccl_request_t *before = posted->last;
    while (before && before->order > receive->order)
        before = before->previous;
    receive->list = posted;
    receive->previous = before;
    receive->next = before ? before->next : posted->first;
    *(receive->next ? &receive->next->previous : &posted->last) = receive;
    *(before ? &before->next : &posted->first) = receive;
}

static uint64_t *wanted_count(xccl_p2p_t *p2p, const xccl_request_t *receive) {
    return receive->peer == XCCL_ANY_SOURCE ? &p2p->wanted_any : &p2p->incoming[receive->peer].wanted;
}

void xccl_p2p_unpost(xccl_request_t *receive) {
    xccl_p2p_list_remove(receive);
    --*wanted_count(receive->p2p, receive);
}

static int wrong_size(const xccl_request_t *receive, int source, int64_t tag, uint64_t bytes) {
    return xccl_fail(
        XCCL_ERR_USAGE,
        "rank %d, recv: the message from rank %d with tag %lld has %llu bytes, the buffer has %llu. It stays "
        "queued: receive it into a buffer of its size, which probe tells",
        receive->p2p->comm->rank, source, (long long)tag, (unsigned long long)bytes,
        (unsigned long long)receive->bytes);
}

/* The next time ANY_SOURCE begins with another source, so that none is passed over for ever. */
static void pass_turn(xccl_p2p_t *p2p, int source) {
    p2p->turn = (source + 1) % p2p->comm->size;
}

xccl_request_t *xccl_p2p_match(xccl_p2p_t *p2p, int source, int64_t tag, uint64_t bytes) {
    for (xccl_request_t *receive = p2p->posted.first, *next; receive; receive = next) {
        next = receive->next;
        if (!source_fits(receive->peer, source) || !tag_fits(receive->tag, tag))
            continue;
        if (receive->bytes == bytes) {
            if (receive->peer == XCCL_ANY_SOURCE)
                pass_turn(p2p, source);
            return receive;
        }
        int status = wrong_size(receive, source, tag, bytes);
        xccl_p2p_unpost(receive);
        xccl_p2p_complete(receive, status);
    }
    return NULL;
}

/* ---- unexpected messages ---- */

xccl_unexpected_t *xccl_p2p_keep(xccl_p2p_incoming_t *in, int64_t tag, uint64_t bytes, uint64_t room) {
    xccl_unexpected_t *message = malloc(sizeof *message + room);
    if (!message)
        return NULL;
    *message = (xccl_unexpected_t){.tag = tag, .bytes = bytes};
    *(in->last ? &in->last->next : &in->first) = message;
    in->last = message;
    return message;
}

void xccl_p2p_unkeep(xccl_p2p_incoming_t *in, xccl_unexpected_t *message) {
    xccl_unexpected_t *before = NULL;
    for (xccl_unexpected_t *m = in->first; m != message; m = m->next)
        before = m;
    *(before ? &before->next : &in->first) = message->next;
    if (in->last == message)
        in->last = before;
}

static bool is_live(const xccl_p2p_t *p2p, const xccl_p2p_incoming_t *in, const xccl_unexpected_t *message) {
    return !xccl_p2p_is_offer(message->offer.kind) ||
           xccl_p2p_offer_lives(p2p, in->source, message->offer.ack, message->offer.number);
}

/* First kept message of the source with such a tag. Offers withdrawn meanwhile are dropped on the way. */
static xccl_unexpected_t *find_kept(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, int64_t tag) {
    for (xccl_unexpected_t *message = in->first, *next; message; message = next) {
        next = message->next;
        if (!tag_fits(tag, message->tag))
            continue;
        if (is_live(p2p, in, message))
            return message;
        xccl_p2p_unkeep(in, message);
        free(message);
    }
    return NULL;
}

/* The k-th source that a receive from `source` looks at; NULL when there are no more. */
static xccl_p2p_incoming_t *nth_source(xccl_p2p_t *p2p, int source, int k) {
    if (source != XCCL_ANY_SOURCE)
        return k == 0 ? &p2p->incoming[source] : NULL;
    int size = p2p->comm->size;
    return k < size ? &p2p->incoming[(p2p->turn + k) % size] : NULL;
}

/* True: the receive is complete, or is filled by a message that is still coming, or has failed. */
static bool serve_from(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, xccl_request_t *receive) {
    xccl_unexpected_t *message;
    while ((message = find_kept(p2p, in, receive->tag))) {
        if (message->bytes != receive->bytes) {
            xccl_p2p_complete(receive, wrong_size(receive, in->source, message->tag, message->bytes));
            return true;
        }
        xccl_p2p_unkeep(in, message);
        int status = xccl_p2p_take_unexpected(p2p, in, message, receive);
        if (status < 0)
            xccl_p2p_complete(receive, status);
        if (status != XCCL_AGAIN)
            return true;
    }
    return false;
}

void xccl_p2p_post(xccl_p2p_t *p2p, xccl_request_t *receive) {
    xccl_p2p_incoming_t *in;
    bool any = receive->peer == XCCL_ANY_SOURCE;
    for (int k = 0; (in = nth_source(p2p, receive->peer, k)); k++)
        if (serve_from(p2p, in, receive)) {
            if (any)
                pass_turn(p2p, in->source);
            return;
        }
    insert_posted(p2p, receive);
    ++*wanted_count(p2p, receive);
}

/* ---- sends to the own rank ---- */

int xccl_p2p_send_self(xccl_request_t *send) {
    xccl_p2p_t *p2p = send->p2p;
    int rank = p2p->comm->rank;
    xccl_request_t *receive = xccl_p2p_match(p2p, rank, send->tag, send->bytes);
    if (receive) {
        if (send->bytes > 0)
            memmove(receive->buffer, send->buffer, send->bytes);
        receive->message = send->message;
        xccl_p2p_unpost(receive);
        xccl_p2p_complete(receive, XCCL_OK);
        xccl_p2p_complete(send, XCCL_OK);
        return XCCL_OK;
    }
    xccl_unexpected_t *message = xccl_p2p_keep(&p2p->incoming[rank], send->tag, send->bytes, send->bytes);
    if (!message)
        return xccl_fail(XCCL_ERR_MEMORY, "rank %d, send: no memory to keep a message of %llu bytes to the own rank",
                         rank, (unsigned long long)send->bytes);
    if (send->bytes > 0)
        memcpy(message->data, send->buffer, send->bytes);
    if (send->sync) {
        message->sender = send;
        xccl_p2p_list_append(&p2p->awaiting, send);
    } else {
        xccl_p2p_complete(send, XCCL_OK);
    }
    return XCCL_OK;
}

void xccl_p2p_unsend_self(xccl_request_t *send) {
    xccl_p2p_incoming_t *in = &send->p2p->incoming[send->p2p->comm->rank];
    for (xccl_unexpected_t *message = in->first; message; message = message->next)
        if (message->sender == send) {
            xccl_p2p_unkeep(in, message);
            free(message);
            return;
        }
}

/* ---- probe ---- */

typedef struct probe_t {
    xccl_comm_t *comm;
    int source;
    int64_t tag;
    int status;
    xccl_message_t found;
    char what[96];
} probe_t;

static bool is_message(const xccl_p2p_field_t *field) {
    xccl_p2p_kind_t kind = xccl_p2p_kind_of(field);
    return kind == XCCL_P2P_INLINE || kind == XCCL_P2P_FIRST || xccl_p2p_is_offer(kind);
}

static bool is_posted_for(const xccl_p2p_t *p2p, int source, int64_t tag) {
    for (const xccl_request_t *receive = p2p->posted.first; receive; receive = receive->next)
        if (source_fits(receive->peer, source) && tag_fits(receive->tag, tag))
            return true;
    return false;
}

static bool is_for_probe(const xccl_p2p_t *p2p, const xccl_p2p_incoming_t *in, const xccl_p2p_field_t *field,
                         int64_t tag) {
    if (in->assembling || !is_message(field) || !tag_fits(tag, field->event_id) ||
        is_posted_for(p2p, in->source, field->event_id))
        return false;
    return !xccl_p2p_is_offer(xccl_p2p_kind_of(field)) ||
           xccl_p2p_offer_lives(p2p, in->source, field->body.at.ack, field->body.at.number);
}

/* True: found, or failed. What a receive like the probe would take stays in the ring; messages before it do not. */
static bool probe_source(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, probe_t *probe) {
    for (;;) {
        const xccl_unexpected_t *message = find_kept(p2p, in, probe->tag);
        if (message) {
            probe->found = (xccl_message_t){in->source, message->tag, message->bytes};
            return true;
        }
        const xccl_p2p_field_t *line = xccl_ring_peek(&in->ring);
        if (!line)
            return false;
        const xccl_p2p_field_t field = xccl_p2p_read_field(line);
        probe->status = in->assembling ? XCCL_OK : xccl_p2p_check_field(p2p, in, &field);
        if (probe->status != XCCL_OK)
            return true;
        if (is_for_probe(p2p, in, &field, probe->tag)) {
            probe->found = (xccl_message_t){in->source, field.event_id, xccl_p2p_bytes_of(&field)};
            return true;
        }
        probe->status = xccl_p2p_pull(p2p, in, true);
        if (probe->status != XCCL_OK)
            return true;
    }
}

/* True: found, or failed. */
static bool probe_once(void *arg) {
    probe_t *probe = arg;
    xccl_p2p_t *p2p = probe->comm->p2p;
    xccl_p2p_incoming_t *in;
    for (int k = 0; (in = nth_source(p2p, probe->source, k)); k++)
        if (probe_source(p2p, in, probe))
            return true;
    return false;
}

static bool probe_awaited(void *arg, int index, xccl_awaited_t *out) {
    probe_t *probe = arg;
    return xccl_p2p_describe_source(probe->comm->p2p, probe->source, probe->tag, index, probe->what, sizeof probe->what,
                                    out);
}

int xccl_p2p_probe(xccl_comm_t *comm, int source, int64_t tag, int64_t timeout_ns, xccl_message_t *out) {
    int status = xccl_p2p_check_args(comm, "probe", NULL, 0, source, tag, true);
    if (status != XCCL_OK)
        return status;
    status = xccl_op_begin(comm->world, XCCL_OP_RECV);
    if (status != XCCL_OK)
        return status;
    probe_t probe = {.comm = comm, .source = source, .tag = tag};
    xccl_wait_t wait = {.ready = probe_once, .awaited = probe_awaited, .arg = &probe};
    status = xccl_wait(comm->world, &wait, xccl_deadline(comm->world, timeout_ns));
    if (status == XCCL_OK)
        status = probe.status;
    if (status == XCCL_OK)
        *out = probe.found;
    xccl_p2p_settle_hook(comm->p2p);
    return status;
}

int xccl_p2p_iprobe(xccl_comm_t *comm, int source, int64_t tag, xccl_message_t *out) {
    int status = xccl_p2p_check_args(comm, "iprobe", NULL, 0, source, tag, true);
    if (status == XCCL_OK)
        status = xccl_progress(comm->world);
    if (status != XCCL_OK)
        return status;
    probe_t probe = {.comm = comm, .source = source, .tag = tag};
    bool over = probe_once(&probe);
    xccl_p2p_settle_hook(comm->p2p);
    if (!over)
        return XCCL_AGAIN;
    if (probe.status == XCCL_OK)
        *out = probe.found;
    return probe.status;
}

/* ---- at close ---- */

static void describe(char *text, size_t text_bytes, uint64_t *count, int source, int64_t tag, uint64_t bytes) {
    enum { SHOWN = 4 };
    size_t length = strlen(text);
    if (++*count <= SHOWN)
        snprintf(text + length, text_bytes - length, "%s%llu bytes from rank %d with tag %lld", *count > 1 ? ", " : "",
                 (unsigned long long)bytes, source, (long long)tag);
}

uint64_t xccl_p2p_describe_unreceived(xccl_p2p_t *p2p, char *text, size_t text_bytes) {
    uint64_t count = 0;
    for (int source = 0; source < p2p->comm->size; source++) {
        xccl_p2p_incoming_t *in = &p2p->incoming[source];
        for (const xccl_unexpected_t *message = in->first; message; message = message->next)
            if (is_live(p2p, in, message))
                describe(text, text_bytes, &count, source, message->tag, message->bytes);
        const xccl_p2p_field_t *line = in->assembling ? NULL : xccl_ring_peek(&in->ring);
        if (!line)
            continue;
        const xccl_p2p_field_t field = xccl_p2p_read_field(line);
        if (is_message(&field))
            describe(text, text_bytes, &count, source, field.event_id, xccl_p2p_bytes_of(&field));
    }
    return count;
}
