/* p2p.h - send and receive (p2p layer; internal part).
 *
 * The protocol of the xDeepServe paper, section 3.1. Each ordered pair of members has a ring (ring.h) in the
 * destination's window: its lines are metadata fields, its data is managed data area. The sender's metadata
 * area holds the tail word of each of its rings and the acknowledgements. The eight steps of a chunk:
 *
 *     sender                                        receiver
 *     1 read the chunk from the app data area
 *     2 write it to the receiver's managed area
 *     3 write event id, chunk id to its metadata
 *                                                   4 poll the own metadata area
 *                                                   5 read the chunk from the own managed area
 *                                                   6 write it to the app data area
 *                                                   7 hand the place back: tail pointer to the sender's metadata
 *                                                   8 acknowledge the message in the sender's metadata area
 *
 * The data of a ring is the paper's ping-pong buffers: the receiver hands it back by quarters, so that copying
 * in (1-3) and copying out (4-7) overlap. Step 8 is done when the sender asked for it: in sync mode, and for
 * zero-copy. The event id is the tag.
 *
 * A message takes one of three ways:
 *   inline   up to XCCL_P2P_INLINE_BYTES travel in the field itself
 *   chunks   through the data area, as above
 *   offer    the message is large: only its place travels, and the receiver copies once, and acknowledges. From the
 *            sender's window, if the buffer is symmetric (zero-copy); from the sender's process, if the kernel lets
 *            it (cma.h) and that has been measured to be faster than chunks (p2p_way.c)
 *
 * Matching happens at the receiver, in local memory. What no posted receive matches stays in the ring, which is
 * the back-pressure, unless a receive waits for something behind it: then it moves to the unexpected queue of its
 * source. A withdrawn or timed-out call leaves both sides consistent; see cancel in p2p_send.c and p2p_recv.c.
 */
#ifndef XCCL_P2P_H
#define XCCL_P2P_H

#include "cost.h"
#include "racecheck.h"
#include "ring.h"

enum {
    XCCL_P2P_INLINE_BYTES = 40,
    XCCL_P2P_LINES = 64, /* of a ring */
    XCCL_P2P_LINES_MANY =
        16, /* of a ring, with more than XCCL_P2P_LINES ranks: the lines of a window are size * lines */
    XCCL_P2P_MAX_ACKS = 65536, /* messages of a rank that wait for an acknowledgement at once */
};

/* ---- what travels ---- */

typedef enum xccl_p2p_kind_t {
    XCCL_P2P_INLINE = 1,      /* a whole message */
    XCCL_P2P_FIRST = 2,       /* the first chunk of a message */
    XCCL_P2P_CHUNK = 3,       /* a further one */
    XCCL_P2P_OFFER = 4,       /* a whole message, in the sender's window */
    XCCL_P2P_CANCEL = 5,      /* the message whose chunks came last ends here: forget it */
    XCCL_P2P_CMA_OFFER = 6,   /* a whole message, in the sender's ordinary memory */
    XCCL_P2P_HAND_BACK = 0x80 /* added to FIRST or CHUNK: step 7 is due behind it */
} xccl_p2p_kind_t;

/*   content of a ring line
 *   0          8                16
 *   | event_id | kind and bytes | payload (40 bytes)                     |   inline
 *                               | chunk_id | offset | ack | number | len |   the others
 */
typedef struct xccl_p2p_field_t {
    int64_t event_id;        /* the tag */
    uint64_t kind_and_bytes; /* kind in the low 8 bits; above them the bytes of the whole message */
    union {
        unsigned char payload[XCCL_P2P_INLINE_BYTES];
        struct {
            uint64_t chunk_id;
            uint64_t offset; /* of the data: chunk: in the data area of the ring; offer: in the sender's window, or
                                its address in the sender's process */
            uint64_t ack;    /* index of the acknowledgement line + 1, 0: none wanted */
            uint64_t number; /* of the message, unique for its sender */
            uint64_t length; /* of the chunk */
        } at;
    } body;
} xccl_p2p_field_t;
_Static_assert(sizeof(xccl_p2p_field_t) == XCCL_RING_CONTENT_BYTES, "a field is the content of a line");

static inline xccl_p2p_kind_t xccl_p2p_kind_of(const xccl_p2p_field_t *field) {
    return (xccl_p2p_kind_t)(field->kind_and_bytes & 0x7f);
}
static inline bool xccl_p2p_is_offer(xccl_p2p_kind_t kind) {
    return kind == XCCL_P2P_OFFER || kind == XCCL_P2P_CMA_OFFER;
}
static inline bool xccl_p2p_hands_back(const xccl_p2p_field_t *field) {
    return field->kind_and_bytes & XCCL_P2P_HAND_BACK;
}
static inline uint64_t xccl_p2p_bytes_of(const xccl_p2p_field_t *field) {
    return field->kind_and_bytes >> 8;
}

/* The field as it is now, read once: what is checked is what is used. */
static inline xccl_p2p_field_t xccl_p2p_read_field(const xccl_p2p_field_t *field) {
    enum { WORDS = sizeof(xccl_p2p_field_t) / sizeof(uint64_t) };
    uint64_t words[WORDS];
    xccl_p2p_field_t copy;
    for (int i = 0; i < WORDS; i++)
        words[i] = xccl_gas_read((const uint64_t *)field + i);
    memcpy(&copy, words, sizeof copy);
    return copy;
}

/* Copies up to XCCL_P2P_INLINE_BYTES; a call of memcpy would take as long as the copy. */
static inline void xccl_p2p_copy_inline(void *to, const void *from, uint64_t bytes) {
    unsigned char *out = to;
    const unsigned char *in = from;
    uint64_t at = 0;
    for (; at + 8 <= bytes; at += 8)
        memcpy(out + at, in + at, 8);
    if (bytes & 4) {
        memcpy(out + at, in + at, 4);
        at += 4;
    }
    if (bytes & 2) {
        memcpy(out + at, in + at, 2);
        at += 2;
    }
    if (bytes & 1)
        out[at] = in[at];
}

/* An acknowledgement line says what became of one message: 4 * number + one of these. The number keeps a late
 * word about an earlier message on the line from being taken for this one. */
typedef enum xccl_p2p_ack_t {
    XCCL_P2P_OFFERED = 0,
    XCCL_P2P_TAKEN = 1,     /* receiver: I am copying now (compare-and-swap from OFFERED) */
    XCCL_P2P_WITHDRAWN = 2, /* sender: too late (compare-and-swap from OFFERED) */
    XCCL_P2P_RECEIVED = 3   /* receiver: step 8 */
} xccl_p2p_ack_t;

/*   acknowledgement line, in the sender's window
 *   0       8       16       24          32        40
 *   | state | joint | target | in_window | claimed | sent |
 * The sender clears it before it publishes the offer; what comes behind `state` serves copying by both ends: see
 * p2p_offer.c. */
typedef struct xccl_p2p_ack_line_t {
    _Alignas(64) _Atomic uint64_t state;
    _Atomic uint64_t joint;   /* number of the message that both may copy; written by the receiver */
    uint64_t target;          /* address in the receiver's process, or offset in its window */
    uint64_t in_window;       /* which of the two */
    _Atomic uint64_t claimed; /* blocks, by either */
    _Atomic uint64_t sent;    /* blocks that the sender has copied */
} xccl_p2p_ack_line_t;
_Static_assert(sizeof(xccl_p2p_ack_line_t) == XCCL_LINE, "one line for each acknowledgement");

static inline uint64_t xccl_p2p_ack_word(uint64_t number, xccl_p2p_ack_t state) {
    return 4 * number + (uint64_t)state;
}

/* ---- local state ---- */

typedef struct xccl_p2p_t xccl_p2p_t;

typedef struct xccl_request_list_t {
    xccl_request_t *first, *last;
} xccl_request_list_t;

/* On one list at a time: the queue of its destination, the receives posted, the sends that await their
 * acknowledgement; on none while chunks fill it and when it is done. */
struct xccl_request_t {
    xccl_p2p_t *p2p; /* NULL once done */
    xccl_request_t *next, *previous;
    xccl_request_list_t *list;
    bool is_send;
    bool done;
    bool abandoned; /* nobody holds it: freed when done */
    int peer;       /* member, or XCCL_ANY_SOURCE */
    int64_t tag;
    unsigned char *buffer; /* of a send: only read */
    uint64_t bytes;
    xccl_message_t message;         /* receive: what came */
    int status;                     /* when done */
    struct xccl_failure_t *failure; /* why, if it failed */
    uint64_t order;                 /* receive: place in posting order */
    /* send */
    xccl_p2p_kind_t way; /* INLINE, FIRST (chunks), OFFER or CMA_OFFER */
    bool sync;
    bool helped;     /* it has copied its part of the offer */
    bool cancelled;  /* its buffer is gone: publish CANCEL instead of more chunks, or outlive the acknowledgement */
    uint64_t offset; /* offer: of the buffer in the own window, or its address */
    uint64_t moved;  /* bytes published */
    uint64_t chunks; /* chunks published */
    uint64_t ack, number;
    xccl_world_t *checked; /* where the race checker is on; NULL elsewhere */
    int other;             /* for it: world rank of the other side, */
    uint32_t site;         /* and where the program began the request */
};

/* Where an offered message is; as in the field. */
typedef struct xccl_p2p_offer_t {
    xccl_p2p_kind_t kind;
    uint64_t offset, ack, number;
} xccl_p2p_offer_t;

/* A message kept in local memory, or an offer not yet taken. */
typedef struct xccl_unexpected_t {
    struct xccl_unexpected_t *next;
    int64_t tag;
    uint64_t bytes;
    xccl_p2p_offer_t offer; /* of a message kept whole: only its acknowledgement */
    xccl_request_t *sender; /* a sync send of this rank to itself */
    unsigned char data[];
} xccl_unexpected_t;

enum { XCCL_P2P_CLASSES = 40 }; /* of sizes, by xccl_cost_class */

/* What the sender of a pair remembers to choose between chunks and CMA_OFFER. */
typedef struct xccl_p2p_choice_t {
    uint32_t turns[XCCL_P2P_CLASSES]; /* messages of each size */
    uint32_t pause;                   /* messages that are not offered, because receivers came late */
    uint32_t late;                    /* offers in a row that were withdrawn */
} xccl_p2p_choice_t;

/* What its receiver measures for that. */
typedef struct xccl_p2p_costs_t {
    xccl_cost_t chunks[XCCL_P2P_CLASSES], cma[XCCL_P2P_CLASSES];
    uint64_t prefers_chunks; /* bit per size, as the sender knows it */
} xccl_p2p_costs_t;

typedef struct xccl_p2p_outgoing_t {
    xccl_ring_producer_t ring;
    xccl_request_list_t queue; /* sends not yet published in full, in order */
    uint64_t reserved;         /* bytes of the data area whose pages are reserved */
    xccl_p2p_choice_t choice;
} xccl_p2p_outgoing_t;

typedef struct xccl_p2p_incoming_t {
    xccl_ring_consumer_t ring;
    int source;
    uint64_t wanted; /* posted receives that name this source */
    xccl_unexpected_t *first, *last;
    /* The message whose chunks are arriving; it fills `request`, or `message`, the last unexpected one. */
    bool assembling;
    xccl_request_t *request;
    xccl_unexpected_t *message;
    unsigned char *target;
    int64_t tag;
    uint64_t bytes, received;
    uint64_t ack, number;
    uint64_t began; /* ticks at its first chunk */
    xccl_p2p_costs_t costs;
} xccl_p2p_incoming_t;

struct xccl_p2p_t {
    xccl_comm_t *comm;
    xccl_world_t *world;
    uint64_t fields_at; /* metadata block: tails of all destinations, then lines of all sources */
    uint64_t data_at;   /* managed block: ring data of all sources */
    uint64_t acks_at;   /* metadata block: acknowledgement lines */
    xccl_p2p_outgoing_t *outgoing;
    xccl_p2p_incoming_t *incoming;
    uint64_t *ends;               /* of all outgoing rings */
    xccl_request_list_t posted;   /* receives not yet matched, in posting order */
    xccl_request_list_t awaiting; /* sends that await their acknowledgement */
    uint64_t wanted_any;          /* posted receives of any source */
    uint64_t num_queued;          /* sends in the queues */
    uint64_t num_assembling;
    uint64_t next_order, next_number;
    uint64_t moves; /* lines published and consumed so far */
    int turn;       /* source that ANY_SOURCE looks at first */
    uint32_t *free_acks;
    uint64_t num_free_acks, num_acks; /* num_acks: lines whose pages are reserved */
    bool hooked;
    int64_t next_look_ns; /* when test looks for dead peers again */
    char *failure;        /* of the first abandoned request that failed: close reports it */
};

/* Offset of an acknowledgement line in the window of its sender. */
static inline uint64_t xccl_p2p_ack_offset(const xccl_p2p_t *p2p, uint64_t ack) {
    return p2p->acks_at + (ack - 1) * XCCL_LINE;
}

/* ---- requests and progress (p2p.c) ---- */

xccl_request_t *xccl_p2p_new_request(xccl_p2p_t *p2p, bool is_send, int peer, int64_t tag, const void *buffer,
                                     uint64_t bytes);
void xccl_p2p_list_append(xccl_request_list_t *list, xccl_request_t *request);
void xccl_p2p_list_remove(xccl_request_t *request);
/* Ends the request; with an error status the thread's message is kept for who waits. */
void xccl_p2p_complete(xccl_request_t *request, int status);
/* Waits for the request; its result, or why the wait ended early. */
int xccl_p2p_await(xccl_request_t *request, int64_t deadline, xccl_message_t *out);
/* The same for the request of a blocking call: it is over on return, completed or given up, and freed. */
int xccl_p2p_finish(xccl_p2p_t *p2p, xccl_request_t *request, int64_t deadline, xccl_message_t *out);
/* Says what a receive or probe of `source` and `tag` waits for; of the form of xccl_wait_t.awaited. */
bool xccl_p2p_describe_source(const xccl_p2p_t *p2p, int source, int64_t tag, int index, char *what, size_t what_bytes,
                              xccl_awaited_t *out);
/* OK if `comm` is usable and the arguments can be right, or USAGE. */
int xccl_p2p_check_args(const xccl_comm_t *comm, const char *operation, const void *buffer, uint64_t bytes, int peer,
                        int64_t tag, bool any);
/* The progress hook: everything that is pending on the communicator `arg`, once. */
int xccl_p2p_progress(void *arg);
/* Registers the progress hook while there is pending work. */
void xccl_p2p_settle_hook(xccl_p2p_t *p2p);

/* ---- sending (p2p_send.c) ---- */

/* Publishes what there is room for; requests complete in order. */
void xccl_p2p_push(xccl_p2p_t *p2p, int dest);
/* Completes the sends whose acknowledgement has come. */
void xccl_p2p_check_acks(xccl_p2p_t *p2p);
/* Gives a send up. True if it could not be taken back because it has just been received. Frees the request, now or
 * when the peer is done with it; its buffer is the caller's again. */
bool xccl_p2p_cancel_send(xccl_request_t *request);

/* ---- receiving (p2p_recv.c) ---- */

/* Takes at most one message, or the chunks that are there, from the ring. A message that nobody matches is taken
 * only if a posted receive may wait for one behind it, or with `drain`. */
int xccl_p2p_pull(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, bool drain);
/* xccl_p2p_pull for each source that a receive of `source` (or XCCL_ANY_SOURCE) may be served by. */
int xccl_p2p_pull_from(xccl_p2p_t *p2p, int source);
/* Gives the unexpected message, which is off its queue, to the receive. AGAIN: it was an offer withdrawn by now. */
int xccl_p2p_take_unexpected(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, xccl_unexpected_t *message,
                             xccl_request_t *request);
/* Gives a receive up: nothing is consumed. Frees the request. MEMORY if its half-received message cannot be kept. */
int xccl_p2p_cancel_recv(xccl_request_t *request);
/* OK if a new message may have this field; SYSTEM if no sender wrote it. */
int xccl_p2p_check_field(const xccl_p2p_t *p2p, const xccl_p2p_incoming_t *in, const xccl_p2p_field_t *field);

/* ---- offers (p2p_offer.c) ---- */

/* Step 8, if the sender wants it: then `ack` is not 0. */
void xccl_p2p_acknowledge(xccl_p2p_t *p2p, int source, uint64_t ack, uint64_t number);
/* OK if the field of an offer names memory that can be one, or SYSTEM. */
int xccl_p2p_check_offer(const xccl_p2p_t *p2p, int source, const xccl_p2p_field_t *field);
/* An offer that its sender has not withdrawn. */
bool xccl_p2p_offer_lives(const xccl_p2p_t *p2p, int source, uint64_t ack, uint64_t number);
/* Copies the offered message. AGAIN: its sender has withdrawn it. */
int xccl_p2p_take_offer(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, const xccl_p2p_offer_t *offer, void *buffer,
                        uint64_t bytes);
/* The same, together with the sender if it can; blocks until that has copied its part. */
int xccl_p2p_take_offer_jointly(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, const xccl_p2p_offer_t *offer, void *buffer,
                                uint64_t bytes);
/* The sender's part of that, once the receiver has begun. */
int xccl_p2p_help(xccl_request_t *send);

/* ---- chunks or CMA_OFFER (p2p_way.c) ---- */

/* The sender's choice for a message from an ordinary buffer; counts it. */
bool xccl_p2p_offers_by_cma(xccl_p2p_t *p2p, int dest, uint64_t bytes);
/* Time until which an offer may wait for its receiver before it is withdrawn, on the clock of xccl_now_ns. */
int64_t xccl_p2p_patience(uint64_t bytes);
/* Whether the receiver came in that time. */
void xccl_p2p_note_offer(xccl_p2p_t *p2p, int dest, bool in_time);
/* The receiver learns what a message cost, and tells the sender which way it prefers. */
void xccl_p2p_note_cost(xccl_p2p_t *p2p, xccl_p2p_incoming_t *in, uint64_t bytes, uint64_t ticks, bool by_cma);

/* ---- matching (p2p_match.c) ---- */

/* Serves the receive from the unexpected queues, or posts it. */
void xccl_p2p_post(xccl_p2p_t *p2p, xccl_request_t *request);
void xccl_p2p_unpost(xccl_request_t *request);
/* First posted receive for such a message, NULL if none. Those for it whose buffer has another size fail. */
xccl_request_t *xccl_p2p_match(xccl_p2p_t *p2p, int source, int64_t tag, uint64_t bytes);
/* Appends to the source's unexpected queue a message with room for `room` bytes of data; NULL: no memory. */
xccl_unexpected_t *xccl_p2p_keep(xccl_p2p_incoming_t *in, int64_t tag, uint64_t bytes, uint64_t room);
/* Takes the message off the source's queue. */
void xccl_p2p_unkeep(xccl_p2p_incoming_t *in, xccl_unexpected_t *message);
/* A send to this rank itself: to a posted receive, or kept. */
int xccl_p2p_send_self(xccl_request_t *send);
/* Undoes it for a sync send that waits. */
void xccl_p2p_unsend_self(xccl_request_t *send);
/* Describes messages that arrived and were never received, after `text`. Their number. */
uint64_t xccl_p2p_describe_unreceived(xccl_p2p_t *p2p, char *text, size_t text_bytes);

#endif
