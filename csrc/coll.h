/* coll.h - collectives (coll layer; internal part).
 *
 * Every collective is an exchange: each member sends a message to some of the others (coll_exchange.c), and what
 * arrives is copied (coll.c) or reduced (coll_reduce.c). All state belongs to one communicator.
 *
 * A message starts with a header in the receiver's inbox. Inline, the payload comes with it: one line moves for
 * up to 40 bytes, nobody answers. Otherwise the header says where the receiver can read the payload: at once in the
 * sender's symmetric array, or chunk by chunk in the sender's staging ring (coll_stage.c). The receiver reads once,
 * straight to the place where the user wants it, and counts what it has taken at the sender.
 *
 * Per communicator and member, in every window:
 *
 *   META     | inbox: member 0: slot 0, slot 1 | member 1: ... | counters: 64-byte lines, see xccl_coll_counter_t |
 *   MANAGED  | staging ring |
 */
#ifndef XCCL_COLL_H
#define XCCL_COLL_H

#include <stdatomic.h>
#include <stdbool.h>

#include "comm.h"
#include "cost.h"
#include "gas.h"
#include "racecheck.h"
#include "layers.h"

/* Passes an error on. */
#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        int try_status = (call);                                                                                       \
        if (try_status < 0)                                                                                            \
            return try_status;                                                                                         \
    } while (0)

enum {
    XCCL_COLL_HEADER_PAYLOAD = 40,       /* bytes of payload in the header's own line */
    XCCL_COLL_INLINE_BYTES = 4096,       /* longest inline message, fewer with very many members */
    XCCL_COLL_INBOX_BYTES = 2 << 20,     /* upper bound for the inbox of a rank, as far as one line a slot allows */
    XCCL_COLL_IN_PLACE_BYTES = 64 << 10, /* shorter messages are staged even from symmetric memory: staging does
                                            not wait for the receivers */
    XCCL_COLL_CHANNELS = 2,              /* 0: messages, 1: results of all_reduce */
    XCCL_COLL_RING_BLOCKS = 4,           /* staging blocks that the ring has room for */
    XCCL_COLL_MOST_LOTS = 128            /* lots of the ring at a time, fewer with very many members */
};

/* How a message travels; part of the signature that may differ between members. */
enum {
    XCCL_COLL_INLINE = 0,
    XCCL_COLL_STAGED = 1,
    XCCL_COLL_IN_PLACE = 2,
    XCCL_COLL_REFUSED = 3,         /* no message: the sender found that the members do not agree */
    XCCL_COLL_RESULT_IN_PLACE = 4, /* flag: the sender's part of the result is read in its symmetric `out` */
    XCCL_COLL_STREAMED = 8,        /* flag: stored around the caches */
    XCCL_COLL_CMA = 16,            /* flag, with IN_PLACE: in the sender's ordinary memory, see cma.h */
    XCCL_COLL_MODE_MASK = 31
};

/*   header, the first line of a slot
 *   0       8           16      24                                              64
 *   | epoch | signature | bytes | offset | place | chunk | lot_bytes | result |     staged, in place
 *   | epoch | signature | bytes | payload up to 40 bytes                      |     or behind the header    inline
 *
 * epoch is written last with release order and read first with acquire order: it publishes the whole slot.
 *
 * Why a slot may be overwritten: messages to one receiver alternate between its two slots. Before message m the
 * sender knows that the receiver has finished the operation of message m-2 (claim_slot): either it has received
 * a message of a later operation from it (heard > epoch of m-2), or the receiver has taken a unit that was
 * counted after m-2 was sent. When everybody hears from everybody the first holds without waiting: the sender
 * has finished the operation of m-1, so it heard from the receiver there, so the receiver had finished that of m-2.
 * broadcast does not answer, so there even inline messages are counted as taken. */
typedef struct xccl_coll_header_t {
    _Alignas(64) _Atomic uint64_t epoch;
    uint64_t signature;
    uint64_t bytes;
    union {
        struct {
            uint64_t offset;    /* in place: of the message in the window, or its address with CMA; staged: of the
                                   first lot in the ring */
            uint64_t place;     /* staged: of the message in each lot */
            uint64_t chunk;     /* staged: bytes of the message in each lot */
            uint64_t lot_bytes; /* staged: bytes of a lot */
            uint64_t result;    /* all_reduce: of `out` in the window, or of the first lot in the ring */
        };
        unsigned char payload[XCCL_COLL_HEADER_PAYLOAD];
    };
} xccl_coll_header_t;
_Static_assert(sizeof(xccl_coll_header_t) == XCCL_LINE, "a header is one line");

/* A header as it was read, once: what is checked is what is used, whatever becomes of the slot. The last five are 0 for
 * inline messages. */
typedef struct xccl_coll_words_t {
    uint64_t epoch, signature, bytes, offset, place, chunk, lot_bytes, result;
} xccl_coll_words_t;

/* A word that no member can have written. */
typedef struct xccl_coll_damage_t {
    const char *field; /* NULL: none */
    uint64_t got, least, most;
} xccl_coll_damage_t;

/* Lines per (channel, peer) in the own window. Each has one writer, the peer, and only grows. */
typedef enum xccl_coll_counter_t {
    XCCL_COLL_READY = 0, /* units that the peer has published to this rank */
    XCCL_COLL_TAKEN = 1, /* units of this rank that the peer has taken */
    XCCL_COLL_COUNTERS = 2
} xccl_coll_counter_t;

/* What this rank knows of one member; `unit` counts are cumulative per channel. */
typedef struct xccl_coll_peer_t {
    uint64_t sent, received;            /* messages; the parity names the slot */
    uint64_t slot_epoch[2];             /* of the last message in each of its slots */
    uint64_t slot_units[2];             /* units counted before that message */
    uint64_t seen_epoch[2];             /* last one read from its slots here */
    uint64_t heard;                     /* the peer has begun this epoch, so it has finished all before */
    uint64_t units[XCCL_COLL_CHANNELS]; /* published to the peer */
    uint64_t taken[XCCL_COLL_CHANNELS]; /* taken from the peer */

    /* the messages of the current operation */
    const unsigned char *out;
    uint64_t out_bytes;
    unsigned char *in;
    uint64_t in_bytes, in_done;
    int in_mode; /* this and what follows is copied from the header, and has been checked: see coll_check.c */
    uint64_t in_offset, in_place, in_chunk, in_lot_bytes, in_result;
} xccl_coll_peer_t;

/* Part of the staging ring that holds one chunk for each peer. */
typedef struct xccl_coll_lot_t {
    uint64_t begin, end; /* in the ring */
    uint64_t epoch;      /* of the operation that filled it */
} xccl_coll_lot_t;

/* How a long message from an ordinary array comes to its receiver. */
typedef enum xccl_coll_way_t {
    XCCL_COLL_BY_CACHE = 0,  /* staged, stored through the caches */
    XCCL_COLL_BY_STREAM = 1, /* staged, stored around them */
    XCCL_COLL_BY_CMA = 2,    /* read where it is, by the kernel */
    XCCL_COLL_WAYS = 3
} xccl_coll_way_t;

/* What messages of one size have cost on one way. */
typedef struct xccl_coll_costs_t {
    xccl_cost_t store, load; /* there is nothing to store BY_CMA */
    uint64_t operations;
} xccl_coll_costs_t;

typedef struct xccl_coll_t {
    xccl_comm_t *comm;
    xccl_world_t *world;
    int rank, size;
    uint64_t inbox, counters, staging; /* window offsets of the parts */
    uint64_t inline_bytes;             /* payload of a slot */
    uint64_t block_bytes;              /* most that a lot takes */
    uint64_t ring_bytes;
    uint64_t committed_bytes; /* of the ring, from its start */
    uint64_t ring_end;        /* of the newest lot */
    uint64_t num_lots;        /* places in `lots` */
    uint64_t oldest, next;    /* lots [oldest, next) are in use */
    xccl_coll_lot_t *lots;    /* by number modulo num_lots */
    uint64_t *lot_units;      /* [lot][member][channel]: the last unit that lies in the lot */
    int *order;               /* the other members, nearest first: spreads the load */
    const void **sources;     /* room for one pointer a member */
    xccl_coll_peer_t *peers;

    uint64_t cache_bytes;                           /* of the last-level cache */
    bool peers_read;                                /* all of them can read this process: see cma.h */
    xccl_coll_costs_t costs[2][64][XCCL_COLL_WAYS]; /* by: reduced or copied; logarithm of the size; way */

    /* the current operation */
    uint64_t epoch; /* counts operations of the communicator; never reset */
    uint64_t signature;
    int64_t deadline;
    const unsigned char *x;
    bool shared;           /* every peer gets all of x */
    bool x_in_place;       /* peers read long messages in x, which is symmetric, */
    bool x_by_cma;         /* or which they read through the kernel */
    bool result_in_place;  /* all_reduce: peers read this rank's part of the result in `out` */
    bool stages;           /* something is staged */
    bool streams;          /* messages are stored around the caches */
    bool samples;          /* stores and loads of messages are timed */
    bool reduces;          /* messages are reduced where they lie */
    bool out_beyond_cache; /* input and output of all ranks exceed the last-level cache */
    bool any_size;         /* the headers tell the sizes: all_to_all_v_begin */
    bool unfinished;       /* between all_to_all_v_begin and _finish */
    int differs;           /* a member whose header does not agree, or is damaged, found while waiting; -1: none */
    xccl_coll_words_t different; /* its header, */
    xccl_coll_damage_t damage;   /* or what is wrong with what it wrote */
    uint64_t x_offset;           /* of x in the window, if x_in_place, or its address; likewise result_offset */
    uint64_t result_offset;
    uint64_t chunk_bytes; /* of a staged message */
    uint64_t lot_bytes;
    uint64_t first_place; /* of the first lot in the ring */
    uint64_t first_lot;   /* `next` when the operation began */
} xccl_coll_t;

/* ---- coll.c ---- */

/* Starts an operation: checks the communicator, counts the epoch, sets signature and deadline. `param` is what else
 * must agree: the root, or the bytes of a row. */
int xccl_coll_begin(xccl_comm_t *comm, xccl_op_t op, int reduce, xccl_dtype_t dtype, uint64_t param,
                    int64_t timeout_ns);

/* Ends an operation that began: any error leaves the members out of step, so the communicator is unusable then. */
int xccl_coll_settle(xccl_comm_t *comm, int status);

/* USAGE if [x, x+x_bytes) and [out, out+out_bytes) overlap. */
int xccl_coll_check_apart(const xccl_comm_t *comm, xccl_op_t op, const void *x, uint64_t x_bytes, const void *out,
                          uint64_t out_bytes);

/* ---- coll_signature.c ---- */

/* The low bits are left for the mode. */
uint64_t xccl_coll_signature(xccl_op_t op, int reduce, xccl_dtype_t dtype, uint64_t param);

/* True if the header is of this operation and as long as expected from member `pe`. */
bool xccl_coll_agrees(const xccl_coll_t *coll, int pe, const xccl_coll_words_t *header);

xccl_dtype_t xccl_coll_dtype_of(uint64_t signature);
const char *xccl_coll_dtype_name(xccl_dtype_t dtype);
const char *xccl_coll_reduce_name(xccl_reduce_op_t op);

/* Describes how member coll->differs differs; returns USAGE. */
int xccl_coll_fail_mismatch(const xccl_coll_t *coll);

/* ---- coll_check.c ---- */

/* True if what the header of member `pe` says of where its message lies can be followed. If not, notes why. */
bool xccl_coll_is_sound(xccl_coll_t *coll, int pe, const xccl_coll_words_t *header);

/* Notes, and returns true, if member `pe` seems to have published more units on `channel` than it has room for. */
bool xccl_coll_is_ahead(xccl_coll_t *coll, int pe, int channel);

/* Units that a member may have published and this rank not taken: each lies in a lot, or was a message in a slot. */
static inline uint64_t xccl_coll_most_units(const xccl_coll_t *coll) {
    return 2 * coll->num_lots;
}

/* SYSTEM, with what was noted. */
int xccl_coll_fail_damaged(const xccl_coll_t *coll);

/* ---- coll_wait.c ---- */

/* The next header from `pe`, come or not. */
const xccl_coll_header_t *xccl_coll_header(const xccl_coll_t *coll, int pe);

/* Counter of `peer` in the window of any member. */
uint64_t xccl_coll_counter_offset(const xccl_coll_t *coll, xccl_coll_counter_t counter, int channel, int peer);

/* Every wait here ends with USAGE, too, when a member turns out to be in another call, or gave this one up. */

/* Waits for the next header of each of `count` members and checks that it agrees. */
int xccl_coll_receive_headers(xccl_coll_t *coll, const int *members, int count);

/* True if chunk-wise messages from `pe` have their next unit on `channel`. */
bool xccl_coll_unit_ready(const xccl_coll_t *coll, int pe, int channel);

/* Waits for the next unit of every other member on `channel`. */
int xccl_coll_await_units(xccl_coll_t *coll, int channel);

/* Waits until all members have taken all units: what they read is the user's again. */
int xccl_coll_await_taken(xccl_coll_t *coll);

/* Units of `channel` that `pe` has taken. */
uint64_t xccl_coll_units_taken(const xccl_coll_t *coll, int pe, int channel);

/* Units of `channel` that `pe` says it has published to this rank. */
uint64_t xccl_coll_units_published(const xccl_coll_t *coll, int pe, int channel);

/* Waits until the next lot may be filled. */
int xccl_coll_await_lot(xccl_coll_t *coll);

/* True if `pe` has taken everything that lies in `lot`. */
bool xccl_coll_lot_taken(const xccl_coll_t *coll, uint64_t lot, int pe);

/* Waits until something can be moved: see xccl_coll_deliver. */
int xccl_coll_await_movable(xccl_coll_t *coll, bool chunks_left);

/* True if there is something to copy from `pe` now. */
bool xccl_coll_can_take(const xccl_coll_t *coll, int pe);

/* Waits until member `pe` has taken more than `units` units of channel 0. */
int xccl_coll_await_slot(xccl_coll_t *coll, int pe, uint64_t units);

/* ---- coll_stage.c ---- */

/* Sizes of the ring; allocates what this rank keeps of it. False: no memory. */
bool xccl_coll_stage_open(xccl_coll_t *coll);
void xccl_coll_stage_close(xccl_coll_t *coll);

/* Cuts the messages of the operation into chunks. */
void xccl_coll_stage_cut(xccl_coll_t *coll, uint64_t message_bytes);

/* True if the next lot may be filled. Forgets lots that all have taken. */
bool xccl_coll_lot_free(xccl_coll_t *coll);

/* Takes the next lot; waits until it is free, and reserves its memory. */
int xccl_coll_lot_claim(xccl_coll_t *coll);

/* Bytes of the ring after which lots of this size, which is not 0, start over; alike on all members. */
uint64_t xccl_coll_lap(const xccl_coll_t *coll, uint64_t lot_bytes);

/* Place in the ring of lot `k` of an operation whose lots begin at `first`. */
uint64_t xccl_coll_lot_place(const xccl_coll_t *coll, uint64_t first, uint64_t lot_bytes, uint64_t k);

/* Window offset of lot `k` of the current operation. */
uint64_t xccl_coll_lot_offset(const xccl_coll_t *coll, uint64_t k);

/* Place of the message to `pe` in a lot. */
uint64_t xccl_coll_place_in_lot(const xccl_coll_t *coll, int pe);

/* Notes that the last unit published to `pe` on `channel` lies in lot `k` of the current operation. */
void xccl_coll_lot_note(xccl_coll_t *coll, uint64_t k, int pe, int channel);

/* ---- coll_store.c ---- */

/* Chooses the way of the operation's messages, of which the longest has `bytes`; chunks are cut already. Sets streams,
 * x_by_cma, samples. `cma`: the kernel's way is open. */
void xccl_coll_choose_way(xccl_coll_t *coll, uint64_t bytes, bool cma);

/* How results are stored; `rank_bytes` are input and output of one rank. */
void xccl_coll_choose_result_stores(xccl_coll_t *coll, uint64_t rank_bytes);

/* As memcpy, around the caches or not. */
void xccl_coll_copy(void *to, const void *from, uint64_t bytes, bool streams);

/* Copies a message to where it waits for its receiver, in the window of `pe`. */
void xccl_coll_store(xccl_coll_t *coll, int pe, uint64_t offset, const void *from, uint64_t bytes);

/* Copies a message, stored in such a way, to its end. */
void xccl_coll_load(xccl_coll_t *coll, void *to, const void *from, uint64_t bytes, bool streamed);

/* Reads a message, or its rest, in the memory of its sender `pe`. */
int xccl_coll_load_by_cma(xccl_coll_t *coll, int pe, void *to, uint64_t address, uint64_t bytes);

/* Learns that `ticks` were needed to load such a message. */
void xccl_coll_note_load(xccl_coll_t *coll, uint64_t ticks, uint64_t bytes, xccl_coll_way_t way);

/* Size of the last-level cache. */
uint64_t xccl_coll_cache_bytes(void);

/* ---- coll_exchange.c ---- */

/* Slot `parity` for messages from `source`, in the window of any member. */
uint64_t xccl_coll_slot_offset(const xccl_coll_t *coll, int source, int parity);

/* Says what is sent: `x` with x_bytes bytes in all. Messages too long for a slot are read in x if it is symmetric
 * and they have at least XCCL_COLL_IN_PLACE_BYTES, and staged in chunks otherwise. */
void xccl_coll_set_source(xccl_coll_t *coll, const void *x, uint64_t x_bytes, uint64_t message_bytes, bool shared);

/* Sends the header of every message in peers[].out, with the first chunk of staged ones. */
int xccl_coll_send_first(xccl_coll_t *coll);

/* Stages chunk k > 0 of every message that has one. */
int xccl_coll_send_chunk(xccl_coll_t *coll, uint64_t k);

/* Chunks of the longest staged message. */
uint64_t xccl_coll_chunks_to_send(const xccl_coll_t *coll);

/* Tells the members that wait for this rank that it found a mismatch. */
void xccl_coll_refuse(xccl_coll_t *coll);

/* Publishes one more unit to `pe`. */
void xccl_coll_publish(xccl_coll_t *coll, int pe, int channel);

/* Counts one more unit as taken from `pe`, and tells it. */
void xccl_coll_take(xccl_coll_t *coll, int pe, int channel);

/* Copies everything that the peers send to peers[].in, sending the own further chunks meanwhile. */
int xccl_coll_deliver(xccl_coll_t *coll);

/* The race checker's view of the operation that xccl_coll_begin began: what it reads and writes, and that it is over
 * with `status`, having heard of `pe` (or of all: XCCL_RACE_ALL). Both pass errors on, as xccl_coll_settle. */
int xccl_coll_enter(xccl_comm_t *comm, xccl_race_buffers_t buffers);
int xccl_coll_leave(xccl_comm_t *comm, int status, int pe, xccl_race_buffers_t buffers);

/* Address of byte `at` of the message from `pe`; its chunk must be there. */
const unsigned char *xccl_coll_message_at(const xccl_coll_t *coll, int pe, uint64_t at);

#endif
