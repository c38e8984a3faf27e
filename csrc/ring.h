/* ring.h - a single-producer single-consumer ring of fixed slots, from one rank to another (p2p layer).
 *
 * A slot is a 64-byte line in the consumer's metadata area and a block in its managed data area. Line and block
 * of position p are p mod lines and p mod blocks. What fits a line needs no block, so there are more lines than
 * blocks, and a position that uses its block needs more room:
 *
 *     producer                                       consumer's window
 *     head, cached tail (private)      line   | sequence | content ...          |  `lines` of them
 *     tail  (own metadata line) <--    block  | payload                         |  `blocks` of them
 *
 *   line     0          8                                                64
 *            | sequence | content (56 bytes)                             |
 *
 * Publishing. The producer fills the block of position p, writes the content of the line, and last stores
 * sequence = p + 1 with release order. The consumer, whose next position is p, loads the sequence with acquire
 * order and takes the slot when it reads p + 1: it then sees content and block. Flag and content share a line, so
 * a small message costs the move of one line.
 *
 * Releasing. Having copied a slot out, the consumer counts tail up and now and then stores it in the producer's
 * tail word with release order, so that its reads come before the producer's next writes to the slot.
 * It does so at the latest when half the blocks are unreleased: then, once all is consumed, the producer finds at
 * least half of the blocks free, so that batching never strands it (the store also wakes it).
 *
 * Overflow. head and tail are monotonic 64-bit counts that never wrap in practice: at 10^9 slots a second 2^64
 * takes 584 years. Even a wrap would be harmless: only head - tail is used, taken modulo 2^64, and
 * 0 <= head - tail <= lines always holds. A line that is not yet written in this lap holds sequence
 * p + 1 - lines of the last lap, or 0 when it is fresh; neither equals p + 1, because lines > 0 and p + 1 > 0.
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
_Static_assert(sizeof(xccl_ring_line_t) == XCCL_LINE, "a slot's line is one cache line");

/* Equal on both sides. */
typedef struct xccl_ring_shape_t {
    uint64_t lines;  /* a power of two, at least `blocks` */
    uint64_t blocks; /* a power of two */
    uint64_t block_bytes;
    uint64_t lines_at;  /* offset of line 0 in the consumer's window */
    uint64_t blocks_at; /* offset of block 0 in the consumer's window */
    uint64_t tail_at;   /* offset of the tail word in the producer's window */
} xccl_ring_shape_t;

typedef struct xccl_ring_producer_t {
    xccl_world_t *world;
    xccl_ring_shape_t shape;
    int consumer;            /* world rank */
    xccl_ring_line_t *lines; /* in the consumer's window */
    const _Atomic uint64_t *tail;
    uint64_t head;        /* positions published */
    uint64_t cached_tail; /* tail as last read */
} xccl_ring_producer_t;

typedef struct xccl_ring_consumer_t {
    xccl_world_t *world;
    xccl_ring_shape_t shape;
    int producer; /* world rank */
    const xccl_ring_line_t *lines;
    const unsigned char *blocks;
    uint64_t tail;     /* positions consumed */
    uint64_t released; /* tail as the producer knows it */
} xccl_ring_consumer_t;

/* `position` is where both sides start: 0 on fresh memory. */
void xccl_ring_open_producer(xccl_ring_producer_t *ring, xccl_world_t *world, xccl_ring_shape_t shape, int consumer,
                             uint64_t position);
void xccl_ring_open_consumer(xccl_ring_consumer_t *ring, xccl_world_t *world, xccl_ring_shape_t shape, int producer,
                             uint64_t position);

/* Room for a position that uses its line only. False is back-pressure: nothing has changed. */
bool xccl_ring_has_line(xccl_ring_producer_t *ring);
/* Room for a position that uses its block too. */
bool xccl_ring_has_block(xccl_ring_producer_t *ring);

/* Offset, in the consumer's window, of the block that the position `ahead` of the next one will use. */
uint64_t xccl_ring_block_offset(const xccl_ring_producer_t *ring, uint64_t ahead);

/* Content of the next position, XCCL_RING_CONTENT_BYTES to be written before it is published. There must be room. */
static inline void *xccl_ring_content(const xccl_ring_producer_t *ring) {
    return ring->lines[ring->head & (ring->shape.lines - 1)].content;
}

/* Publishes the next position, whose content and block are written, and wakes the consumer. */
static inline void xccl_ring_publish(xccl_ring_producer_t *ring) {
    xccl_ring_line_t *line = &ring->lines[ring->head & (ring->shape.lines - 1)];
    ring->head++;
    /* release: content and block are visible to whoever reads this sequence */
    atomic_store_explicit(&line->sequence, ring->head, memory_order_release);
    xccl_ring(ring->world, ring->consumer);
}

/* Content of the next position, NULL if it is not published yet. Valid until consumed. */
static inline const void *xccl_ring_peek(const xccl_ring_consumer_t *ring) {
    const xccl_ring_line_t *line = &ring->lines[ring->tail & (ring->shape.lines - 1)];
    /* acquire (in the load) pairs with the release in publish */
    return xccl_gas_load(&line->sequence) == ring->tail + 1 ? line->content : NULL;
}

/* Its block. */
static inline const void *xccl_ring_block(const xccl_ring_consumer_t *ring) {
    return ring->blocks + (ring->tail & (ring->shape.blocks - 1)) * ring->shape.block_bytes;
}

/* Tells the producer how far this side has come. */
void xccl_ring_release(xccl_ring_consumer_t *ring);

/* Hands the next position back. */
static inline void xccl_ring_consume(xccl_ring_consumer_t *ring) {
    ring->tail++;
    if ((ring->tail - ring->released) * 2 >= ring->shape.blocks)
        xccl_ring_release(ring);
}

#endif
