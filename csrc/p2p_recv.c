#include "p2p.h"

#include <stdlib.h>

#include "copy.h"
#include "status.h"

static int damaged(const xccl_p2p_t *p2p, const xccl_p2p_incoming_t *in, const char *field, uint64_t got,
                   uint64_t least, uint64_t most) {
    return xccl_comm_fail_damaged(p2p->comm, in->source, field, got, least, most);
}

static void complete_receive(xccl_request_t *receive, int source, int64_t tag, uint64_t bytes) {
    receive->message = (xccl_message_t){source, tag, bytes};
    xccl_p2p_complete(receive, XCCL_OK);
}

/* ---- messages in chunks ---- */

static void end_assembly(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in) {
    in->assembling = false;
    in->request = NULL;
    in->message = NULL;
    p2p->num_assembling--;
}

static void begin_assembly(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, const xccl_p2p_field_t *field) {
    in->assembling = true;
    in->tag = field->event_id;
    in->bytes = xccl_p2p_bytes_of(field);
    in->received = 0;
    in->ack = field->body.at.ack;
    in->number = field->body.at.number;
    in->began = xccl_ticks();
    p2p->num_assembling++;
}

/* The chunk lies in the data area, and is not more than what is missing. */
static bool chunk_is_sound(const xccl_p2p_incoming_t *in, const xccl_p2p_field_t *field, uint64_t missing) {
    uint64_t data_bytes = in->ring.shape.data_bytes, length = field->body.at.length;
    return length <= missing && (length > 0 || missing == 0) && length <= data_bytes &&
           field->body.at.offset <= data_bytes - length;
}

/* Steps 5 to 8 of the chunk that is next in the ring. */
static void take_chunk(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, const xccl_p2p_field_t *field) {
    uint64_t chunk = field->body.at.length;
    /* steps 5 and 6: from the own managed area to the app data area */
    xccl_copy_part(in->target + in->received, in->ring.data + field->body.at.offset, chunk, in->bytes,
                   p2p->world->streaming_bytes);
    /* step 7: the place goes back to the sender */
    xccl_ring_consume(&in->ring, xccl_p2p_hands_back(field));
    in->received += chunk;
    if (in->received < in->bytes)
        return;
    xccl_request_t *receive = in->request;
    int64_t tag = in->tag;
    xccl_p2p_note_cost(p2p, in, in->bytes, xccl_ticks() - in->began, false);
    end_assembly(p2p, in);
    if (!receive)
        return; /* kept: acknowledged when it is received */
    xccl_p2p_acknowledge(p2p, in->source, in->ack, in->number);
    complete_receive(receive, in->source, tag, in->bytes);
}

/* `missing` bytes of the message are to come. */
static int check_chunk(const xccl_p2p_t *p2p, const xccl_p2p_incoming_t *in, const xccl_p2p_field_t *field,
                       uint64_t missing) {
    if (chunk_is_sound(in, field, missing))
        return XCCL_OK;
    uint64_t data_bytes = in->ring.shape.data_bytes, length = field->body.at.length;
    uint64_t most = missing < data_bytes ? missing : data_bytes;
    if (length > most || (length == 0 && missing > 0))
        return damaged(p2p, in, "length of a chunk", length, missing > 0, most);
    return damaged(p2p, in, "offset of a chunk", field->body.at.offset, 0, data_bytes - length);
}

/* The sender gave up halfway: the receive waits again, as if nothing had come. */
static void take_cancel(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in) {
    xccl_request_t *receive = in->request;
    xccl_unexpected_t *message = in->message;
    xccl_ring_consume(&in->ring, false);
    end_assembly(p2p, in);
    if (message) {
        xccl_p2p_unkeep(in, message);
        free(message);
    }
    if (receive)
        xccl_p2p_post(p2p, receive);
}

static int continue_assembly(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, const xccl_p2p_field_t *field) {
    xccl_p2p_kind_t kind = xccl_p2p_kind_of(field);
    if (kind == XCCL_P2P_CANCEL) {
        take_cancel(p2p, in);
        return XCCL_OK;
    }
    if (kind != XCCL_P2P_CHUNK)
        return damaged(p2p, in, "kind of a further chunk", (uint64_t)kind, XCCL_P2P_CHUNK, XCCL_P2P_CHUNK);
    if (xccl_p2p_bytes_of(field) != in->bytes)
        return damaged(p2p, in, "bytes of the message, in a further chunk,", xccl_p2p_bytes_of(field), in->bytes,
                       in->bytes);
    int status = check_chunk(p2p, in, field, in->bytes - in->received);
    if (status == XCCL_OK)
        take_chunk(p2p, in, field);
    return status;
}

/* ---- new messages ---- */

static xccl_p2p_offer_t offer_of(const xccl_p2p_field_t *field) {
    return (xccl_p2p_offer_t){xccl_p2p_kind_of(field), field->body.at.offset, field->body.at.ack,
                              field->body.at.number};
}

static int deliver(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, const xccl_p2p_field_t *field, xccl_request_t *receive) {
    const xccl_p2p_offer_t offer = offer_of(field);
    int status;
    switch (xccl_p2p_kind_of(field)) {
    case XCCL_P2P_INLINE:
        xccl_p2p_copy_inline(receive->buffer, field->body.payload, receive->bytes);
        xccl_ring_consume(&in->ring, false);
        xccl_p2p_unpost(receive);
        complete_receive(receive, in->source, field->event_id, receive->bytes);
        return XCCL_OK;
    case XCCL_P2P_OFFER:
    case XCCL_P2P_CMA_OFFER:
        xccl_ring_consume(&in->ring, false);
        status = xccl_p2p_take_offer(p2p, in, &offer, receive->buffer, receive->bytes);
        if (status != XCCL_OK)
            return status < 0 ? status : XCCL_OK;
        xccl_p2p_unpost(receive);
        complete_receive(receive, in->source, field->event_id, receive->bytes);
        return XCCL_OK;
    default:
        xccl_p2p_unpost(receive);
        begin_assembly(p2p, in, field);
        in->request = receive;
        in->target = receive->buffer;
        take_chunk(p2p, in, field);
        return XCCL_OK;
    }
}

/* Moves the message to the unexpected queue. */
static int keep(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, const xccl_p2p_field_t *field) {
    xccl_p2p_kind_t kind = xccl_p2p_kind_of(field);
    bool is_offer = xccl_p2p_is_offer(kind);
    uint64_t bytes = xccl_p2p_bytes_of(field);
    xccl_unexpected_t *message = xccl_p2p_keep(in, field->event_id, bytes, is_offer ? 0 : bytes);
    if (!message)
        return xccl_fail(
            XCCL_ERR_MEMORY,
            "rank %d: no memory to set aside a message of %llu bytes from rank %d with tag %lld, which nobody "
            "has asked for yet; it stays queued",
            p2p->comm->rank, (unsigned long long)bytes, in->source, (long long)field->event_id);
    if (kind == XCCL_P2P_INLINE) {
        memcpy(message->data, field->body.payload, bytes);
        xccl_ring_consume(&in->ring, false);
        return XCCL_OK;
    }
    message->offer = offer_of(field);
    if (is_offer) {
        xccl_ring_consume(&in->ring, false);
        return XCCL_OK;
    }
    begin_assembly(p2p, in, field);
    in->message = message;
    in->target = message->data;
    take_chunk(p2p, in, field);
    return XCCL_OK;
}

int xccl_p2p_check_field(const xccl_p2p_t *p2p, const xccl_p2p_incoming_t *in, const xccl_p2p_field_t *field) {
    uint64_t bytes = xccl_p2p_bytes_of(field);
    xccl_p2p_kind_t kind = xccl_p2p_kind_of(field);
    switch (kind) {
    case XCCL_P2P_INLINE:
        return bytes <= XCCL_P2P_INLINE_BYTES
                   ? XCCL_OK
                   : damaged(p2p, in, "bytes of an inline message", bytes, 0, XCCL_P2P_INLINE_BYTES);
    case XCCL_P2P_FIRST:
        if (field->body.at.ack > XCCL_P2P_MAX_ACKS)
            return damaged(p2p, in, "acknowledgement line", field->body.at.ack, 0, XCCL_P2P_MAX_ACKS);
        return check_chunk(p2p, in, field, bytes);
    case XCCL_P2P_OFFER:
    case XCCL_P2P_CMA_OFFER:
        return xccl_p2p_check_offer(p2p, in->source, field);
    default:
        return damaged(p2p, in, "kind of a new message", (uint64_t)kind, XCCL_P2P_INLINE, XCCL_P2P_CMA_OFFER);
    }
}

static bool is_wanted(const xccl_p2p_t *p2p, const xccl_p2p_incoming_t *in) {
    return in->wanted > 0 || p2p->wanted_any > 0;
}

static int take_message(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, const xccl_p2p_field_t *field, bool drain) {
    if (!drain && !is_wanted(p2p, in))
        return XCCL_OK;
    int status = xccl_p2p_check_field(p2p, in, field);
    if (status != XCCL_OK)
        return status;
    xccl_request_t *receive = xccl_p2p_match(p2p, in->source, field->event_id, xccl_p2p_bytes_of(field));
    if (receive)
        status = deliver(p2p, in, field, receive);
    else if (drain || is_wanted(p2p, in)) /* asked again: receives with another size have failed */
        status = keep(p2p, in, field);
    return status;
}

static int pull(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, bool drain) {
    const xccl_p2p_field_t *line;
    /* step 4: poll the own metadata area */
    if (!in->assembling && (line = xccl_ring_peek(&in->ring))) {
        const xccl_p2p_field_t field = xccl_p2p_read_field(line);
        int status = take_message(p2p, in, &field, drain);
        if (status != XCCL_OK)
            return status;
    }
    while (in->assembling && (line = xccl_ring_peek(&in->ring))) {
        const xccl_p2p_field_t field = xccl_p2p_read_field(line);
        int status = continue_assembly(p2p, in, &field);
        if (status != XCCL_OK)
            return status;
    }
    return XCCL_OK;
}

int xccl_p2p_pull(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, bool drain) {
    uint64_t before = in->ring.tail;
    int status = pull(p2p, in, drain);
    p2p->moves += in->ring.tail - before;
    return status;
}

int xccl_p2p_pull_from(xccl_p2p_t *p2p, int source) {
    if (source != XCCL_ANY_SOURCE)
        return xccl_p2p_pull(p2p, &p2p->incoming[source], false);
    int size = p2p->comm->size, turn = p2p->turn;
    for (int i = 0; i < size; i++) {
        int status = xccl_p2p_pull(p2p, &p2p->incoming[(turn + i) % size], false);
        if (status != XCCL_OK)
            return status;
    }
    return XCCL_OK;
}

/* ---- from the unexpected queue ---- */

/* The receive takes over a message whose chunks are still coming. */
static void adopt_assembly(xccl_p2p_incoming_t *in, xccl_unexpected_t *message, xccl_request_t *receive) {
    memcpy(receive->buffer, message->data, in->received);
    in->request = receive;
    in->message = NULL;
    in->target = receive->buffer;
}

int xccl_p2p_take_unexpected(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, xccl_unexpected_t *message,
                             xccl_request_t *receive) {
    int status = XCCL_OK;
    if (xccl_p2p_is_offer(message->offer.kind)) {
        status = xccl_p2p_take_offer(p2p, in, &message->offer, receive->buffer, receive->bytes);
    } else if (in->message == message) {
        adopt_assembly(in, message, receive);
        free(message);
        return XCCL_OK;
    } else {
        if (message->bytes > 0)
            memcpy(receive->buffer, message->data, message->bytes);
        xccl_p2p_acknowledge(p2p, in->source, message->offer.ack, message->offer.number);
        if (message->sender)
            xccl_p2p_complete(message->sender, XCCL_OK);
    }
    if (status == XCCL_OK)
        complete_receive(receive, in->source, message->tag, message->bytes);
    free(message);
    return status;
}

/* ---- giving up ---- */

/* Keeps what has come of the message that fills the receive, so that another receive gets it. */
static int detach(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, const xccl_request_t *receive) {
    xccl_unexpected_t *message = xccl_p2p_keep(in, in->tag, in->bytes, in->bytes);
    if (!message) {
        /* its first part is lost with the buffer */
        p2p->comm->broken = true;
        end_assembly(p2p, in);
        return xccl_fail(
            XCCL_ERR_MEMORY,
            "rank %d, recv: no memory to keep the half-received message of %llu bytes from rank %d with tag %lld",
            p2p->comm->rank, (unsigned long long)in->bytes, in->source, (long long)in->tag);
    }
    memcpy(message->data, receive->buffer, in->received);
    message->offer = (xccl_p2p_offer_t){XCCL_P2P_FIRST, 0, in->ack, in->number};
    in->request = NULL;
    in->message = message;
    in->target = message->data;
    return XCCL_OK;
}

int xccl_p2p_cancel_recv(xccl_request_t *receive) {
    xccl_p2p_t *p2p = receive->p2p;
    int status = XCCL_OK;
    if (receive->list)
        xccl_p2p_unpost(receive);
    else
        for (int source = 0; source < p2p->comm->size; source++)
            if (p2p->incoming[source].request == receive)
                status = detach(p2p, &p2p->incoming[source], receive);
    receive->abandoned = true;
    xccl_p2p_complete(receive, XCCL_OK);
    return status;
}

/* ---- calls ---- */

/* Nothing but the next line of the source's ring can serve a receive. */
static bool only_ring_serves(const xccl_p2p_t *p2p, const xccl_p2p_incoming_t *in) {
    return !p2p->posted.first && !in->first && !in->assembling;
}

/* Takes the next message without a request, if it is there, is the one asked for, and has come whole. AGAIN: not so. */
static int receive_at_once(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, void *buffer, uint64_t bytes, int64_t tag,
                           xccl_message_t *out) {
    const xccl_p2p_field_t *line = xccl_ring_peek(&in->ring);
    if (!line)
        return XCCL_AGAIN;
    xccl_p2p_field_t field = {.event_id = (int64_t)xccl_gas_read(&line->event_id),
                              .kind_and_bytes = xccl_gas_read(&line->kind_and_bytes)};
    if (xccl_p2p_bytes_of(&field) != bytes || (tag != XCCL_ANY_TAG && tag != field.event_id))
        return XCCL_AGAIN;
    *out = (xccl_message_t){in->source, field.event_id, bytes};
    if (xccl_p2p_kind_of(&field) == XCCL_P2P_INLINE && bytes <= XCCL_P2P_INLINE_BYTES) {
        xccl_p2p_copy_inline(buffer, line->body.payload, bytes);
        xccl_ring_consume(&in->ring, false);
        return XCCL_OK;
    }
    field = xccl_p2p_read_field(line);
    if (xccl_p2p_is_offer(xccl_p2p_kind_of(&field))) {
        int status = xccl_p2p_check_offer(p2p, in->source, &field);
        if (status != XCCL_OK)
            return status;
        const xccl_p2p_offer_t offer = offer_of(&field);
        xccl_ring_consume(&in->ring, false);
        return xccl_p2p_take_offer_jointly(p2p, in, &offer, buffer, bytes);
    }
    if (xccl_p2p_kind_of(&field) != XCCL_P2P_FIRST || field.body.at.length != bytes ||
        !chunk_is_sound(in, &field, bytes) || field.body.at.ack > XCCL_P2P_MAX_ACKS)
        return XCCL_AGAIN;
    xccl_copy(buffer, in->ring.data + field.body.at.offset, bytes);
    xccl_ring_consume(&in->ring, xccl_p2p_hands_back(&field));
    xccl_p2p_acknowledge(p2p, in->source, field.body.at.ack, field.body.at.number);
    return XCCL_OK;
}

typedef struct line_wait_t {
    const xccl_p2p_t *p2p;
    const xccl_p2p_incoming_t *in;
    int64_t tag;
    char what[96];
} line_wait_t;

static bool line_is_published(void *arg) {
    const line_wait_t *wait = arg;
    return xccl_ring_peek(&wait->in->ring) != NULL;
}

static bool line_awaited(void *arg, int index, xccl_awaited_t *out) {
    line_wait_t *wait = arg;
    return xccl_p2p_describe_source(wait->p2p, wait->in->source, wait->tag, index, wait->what, sizeof wait->what, out);
}

/* Receives without a request, waiting for the next line alone. AGAIN: what has come needs one. */
static int receive_directly(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, void *buffer, uint64_t bytes, int64_t tag,
                            int64_t deadline, xccl_message_t *out) {
    line_wait_t line = {.p2p = p2p, .in = in, .tag = tag};
    xccl_wait_t wait = {.ready = line_is_published, .awaited = line_awaited, .arg = &line};
    int status = xccl_wait(p2p->world, &wait, deadline);
    if (status != XCCL_OK)
        return status;
    return receive_at_once(p2p, in, buffer, bytes, tag, out);
}

/* Also tells the race checker. */
static int check_recv(const xccl_comm_t *comm, const char *operation, const void *buffer, uint64_t bytes, int source,
                      int64_t tag) {
    int status = xccl_p2p_check_args(comm, operation, buffer, bytes, source, tag, true);
    if (status == XCCL_OK)
        status = xccl_race_touch(comm->world, buffer, bytes, XCCL_RACE_WRITE, XCCL_OP_RECV);
    if (status == XCCL_OK)
        xccl_race_receiving(comm, source);
    return status;
}

/* A receive without a request is complete. */
static int note_received(const xccl_comm_t *comm, const void *buffer, const xccl_message_t *message) {
    const xccl_race_transfer_t transfer = {.buffer = buffer,
                                           .bytes = message->bytes,
                                           .rank = comm->ranks[message->source],
                                           .site = xccl_race_site(comm->world)};
    return xccl_race_completed(comm->world, &transfer);
}

static int start(xccl_comm_t *comm, void *buffer, uint64_t bytes, int source, int64_t tag, xccl_request_t **out) {
    xccl_request_t *receive = xccl_p2p_new_request(comm->p2p, false, source, tag, buffer, bytes);
    if (!receive)
        return XCCL_ERR_MEMORY;
    xccl_p2p_post(comm->p2p, receive);
    *out = receive;
    return XCCL_OK;
}

int xccl_p2p_recv(xccl_comm_t *comm, void *buffer, uint64_t bytes, int source, int64_t tag, int64_t timeout_ns,
                  xccl_message_t *out) {
    int status = check_recv(comm, "recv", buffer, bytes, source, tag);
    if (status != XCCL_OK)
        return status;
    status = xccl_op_begin(comm->world, XCCL_OP_RECV);
    if (status == XCCL_OK)
        status = xccl_progress(comm->world);
    if (status != XCCL_OK)
        return status;
    xccl_p2p_t *p2p = comm->p2p;
    xccl_p2p_incoming_t *in = source == XCCL_ANY_SOURCE ? NULL : &p2p->incoming[source];
    bool direct = in && only_ring_serves(p2p, in);
    int64_t deadline = xccl_deadline(comm->world, timeout_ns);
    if (direct) {
        status = receive_at_once(p2p, in, buffer, bytes, tag, out);
        if (status == XCCL_AGAIN)
            status = receive_directly(p2p, in, buffer, bytes, tag, deadline, out);
        if (status != XCCL_AGAIN)
            return status == XCCL_OK ? note_received(comm, buffer, out) : status;
    }
    xccl_request_t *receive;
    status = start(comm, buffer, bytes, source, tag, &receive);
    if (status != XCCL_OK)
        return status;
    return xccl_p2p_finish(p2p, receive, deadline, out);
}

int xccl_p2p_irecv(xccl_comm_t *comm, void *buffer, uint64_t bytes, int source, int64_t tag, xccl_request_t **out) {
    int status = check_recv(comm, "irecv", buffer, bytes, source, tag);
    if (status != XCCL_OK)
        return status;
    xccl_request_t *receive;
    status = xccl_op_begin(comm->world, XCCL_OP_RECV);
    if (status == XCCL_OK)
        status = start(comm, buffer, bytes, source, tag, &receive);
    if (status != XCCL_OK)
        return status;
    status = receive->done ? XCCL_OK : xccl_p2p_pull_from(comm->p2p, source);
    if (status == XCCL_OK)
        *out = receive;
    else
        xccl_p2p_cancel_recv(receive);
    xccl_p2p_settle_hook(comm->p2p);
    return status;
}
