/* ring.h - a single-producer single-consumer ring of lines, with an area for larger data (p2p layer).
 *
 * A position is a 64-byte line in the consumer's metadata area, and may come with one piece of the data area, in the
 * consumer's managed data area. Position p has line p mod lines:
 *
 *     producer                                       consumer's window
 *     head, cached tail (private)      line   | sequence | content ...          |  `lines` of them
 *     tail  (own metadata line) <--    data   | piece | piece | ... | (unused)  |  `data_bytes`
 *
 *   line     0          8                                                64
 *            | sequence | content (56 bytes)                             |
 *
 * Publishing. The producer fills the piece, writes the content of the line, and last stores sequence = p + 1 with
 * release order. The consumer, whose next position is p, loads the sequence with acquire order and takes the position
 * when it reads p + 1: it then sees content and piece. Flag and content share a line, so a small message costs the move
 * of one line.
 *
 * Dividing the data. Pieces have any length up to a quarter of the area. They follow one another densely, each from a
 * multiple of 64 bytes; one that does not fit before the end starts again at the front. Only the producer divides, and
 * says in the content where the piece is. Dense, so that the whole area is used in turn whatever the length of
 * messages: it is larger than a core's second-level cache, so when a place comes up again the consumer's cache has let
 * go of it, and the producer's stores need not take its lines out of another core, which is several times as slow.
 *
 * Releasing. Having copied a position out, the consumer counts tail up and now and then stores it in the producer's
 * tail word with release order, so that its reads come before the producer's next writes to line and piece. It does so
 * when half the lines are unreleased, and where the producer has asked for it (each quarter of the data area). So once
 * all is consumed the producer finds half the lines free, and room for any piece: batching never strands it (the store
 * also wakes it). Room for any piece: less than a quarter of the area is unreleased, less than a quarter at its end is
 * passed over, and the piece is at most a quarter.
 *
 * Overflow. head and tail are monotonic 64-bit counts that never wrap in practice: at 10^9 positions a second 2^64
 * takes 584 years. Even a wrap would be harmless: only head - tail is used, taken modulo 2^64, and
 * 0 <= head - tail <= lines always holds. A line that is not yet written in this lap holds sequence
 * p + 1 - lines of the last lap, or 0 when it is fresh; neither equals p + 1, because lines > 0 and p + 1 > 0. The same
 * holds for the counts of data bytes.
 *
 * A cached tail is a lower bound of the tail, so it can only understate the room.
 */
#ifndef XCCL_RING_H
#define XCCL_RING_H

#include "gas.h"

enum { XCCL_RING_CONTENT_BYTES = 56 };

typedef struct xccl_ring_line_t {
    _Alignas(64) _Atomic uint64_t sequence; /* position + 1 */
    unsigned char content[XCCL_RING_CONTENT_BYTES];
} xccl_ring_line_t;
_Static_assert(sizeof(xccl_ring_line_t) == XCCL_LINE, "a position's line is one cache line");

/* Equal on both sides. */
typedef struct xccl_ring_shape_t {
    uint64_t lines;      /* a power of two */
    uint64_t data_bytes; /* a multiple of 64, at least 256 */
    uint64_t lines_at;   /* offset of line 0 in the consumer's window */
    uint64_t data_at;    /* offset of the data area in the consumer's window */
    uint64_t tail_at;    /* offset of the tail word in the producer's window */
} xccl_ring_shape_t;

typedef struct xccl_ring_producer_t {
    xccl_world_t *world;
    xccl_ring_shape_t shape;
    int consumer;            /* world rank */
    xccl_ring_line_t *lines; /* in the consumer's window */
    const _Atomic uint64_t *tail;
    uint64_t head;        /* positions published */
    uint64_t cached_tail; /* tail as last read */
    uint64_t bad_tail;    /* last one that was not in [head - lines, head], so not the consumer's, */
    bool has_bad_tail;    /* if there was one */
    /* data: counts of bytes, those passed over included */
    uint64_t limit;     /* bytes of the area that may be used */
    uint64_t offset;    /* where the next piece begins, if it fits there */
    uint64_t taken;     /* bytes up to there */
    uint64_t data_tail; /* bytes that are free again, as of cached_tail */
    uint64_t asked;     /* `taken` when a hand-back was last asked for */
    uint64_t *ends;     /* per line: `taken` behind its position */
    uint64_t far_ticks; /* a line that takes so long comes from far away; 0: not known */
    int far_lines;      /* how often it did of late, 0 to 8 */
} xccl_ring_producer_t;

typedef struct xccl_ring_consumer_t {
    xccl_world_t *world;
    xccl_ring_shape_t shape;
    int producer; /* world rank */
    const xccl_ring_line_t *lines;
    const unsigned char *data;
    uint64_t tail;     /* positions consumed */
    uint64_t released; /* tail as the producer knows it */
} xccl_ring_consumer_t;

/* `position` is where both sides start: 0 on fresh memory. `ends` has room for shape.lines words. */
void xccl_ring_open_producer(xccl_ring_producer_t *ring, xccl_world_t *world, xccl_ring_shape_t shape, int consumer,
                             uint64_t *ends, uint64_t position);
void xccl_ring_open_consumer(xccl_ring_consumer_t *ring, xccl_world_t *world, xccl_ring_shape_t shape, int producer,
                             uint64_t position);

/* ---- producer ---- */

/* Time stamp, taken when all earlier loads are complete. 0 where there is none fine enough. */
uint64_t xccl_ring_ticks(void);

/* Reads the tail again. */
void xccl_ring_look(xccl_ring_producer_t *ring);

/* Room for a position. False is back-pressure: nothing has changed. */
static inline bool xccl_ring_has_line(xccl_ring_producer_t *ring) {
    if (ring->head - ring->cached_tail < ring->shape.lines)
        return true;
    xccl_ring_look(ring);
    return ring->head - ring->cached_tail < ring->shape.lines;
}

/* Room for a position with a piece of `bytes`, at most a quarter of the limit. */
bool xccl_ring_has_piece(xccl_ring_producer_t *ring, uint64_t bytes);

/* Takes the piece for the next position; there must be room. Its offset in the data area. *out_hand_back: the consumer
 * is to release when it has consumed the position. */
uint64_t xccl_ring_take_piece(xccl_ring_producer_t *ring, uint64_t bytes, bool *out_hand_back);

/* The consumer's core is far from this one (another chip, another socket): its dirty lines come one by one and slowly.
 * Known from the way of the tail word, so it follows when the scheduler moves a rank. */
static inline bool xccl_ring_is_far(const xccl_ring_producer_t *ring) {
    return ring->far_lines >= 4;
}

/* Uses only the first `bytes` of the data area from now on. Nothing beyond them may have been used yet. */
void xccl_ring_limit(xccl_ring_producer_t *ring, uint64_t bytes);

/* Content of the next position, XCCL_RING_CONTENT_BYTES to be written before it is published. There must be room. */
static inline void *xccl_ring_content(const xccl_ring_producer_t *ring) {
    return ring->lines[ring->head & (ring->shape.lines - 1)].content;
}

/* Publishes the next position, whose content and piece are written, and wakes the consumer. */
static inline void xccl_ring_publish(xccl_ring_producer_t *ring) {
    uint64_t line = ring->head & (ring->shape.lines - 1);
    ring->ends[line] = ring->taken;
    ring->head++;
    uint64_t sequence = xccl_fault_published(ring->world, &ring->lines[line], ring->head);
    /* release: content and piece are visible to whoever reads this sequence */
    XCCL_PUBLISH(ring->world, &ring->lines[line].sequence, sequence, memory_order_release);
    xccl_ring(ring->world, ring->consumer);
}

/* ---- consumer ---- */

/* Content of the next position, NULL if it is not published yet. Valid until consumed. */
static inline const void *xccl_ring_peek(const xccl_ring_consumer_t *ring) {
    const xccl_ring_line_t *line = &ring->lines[ring->tail & (ring->shape.lines - 1)];
    /* acquire (in the load) pairs with the release in publish */
    return xccl_gas_load(&line->sequence) == ring->tail + 1 ? line->content : NULL;
}

/* Tells the producer how far this side has come. */
void xccl_ring_release(xccl_ring_consumer_t *ring);

/* Is done with the next position. `hand_back` as the producer asked for it. */
static inline void xccl_ring_consume(xccl_ring_consumer_t *ring, bool hand_back) {
    ring->tail++;
    if (hand_back || (ring->tail - ring->released) * 2 >= ring->shape.lines)
        xccl_ring_release(ring);
}

#endif
