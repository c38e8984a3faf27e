#include "ring.h"

#if defined(__x86_64__)
#include <x86intrin.h>
#endif

uint64_t xccl_ring_ticks(void) {
#if defined(__x86_64__)
    _mm_lfence();
    uint64_t ticks = __rdtsc();
    _mm_lfence();
    return ticks;
#else
    return 0;
#endif
}

static uint64_t round_to_line(uint64_t bytes) {
    return (bytes + XCCL_LINE - 1) / XCCL_LINE * XCCL_LINE;
}

void xccl_ring_open_producer(xccl_ring_producer_t *ring, xccl_world_t *world, xccl_ring_shape_t shape, int consumer,
                             uint64_t *ends, uint64_t position) {
    *ring = (xccl_ring_producer_t){.world = world,
                                   .shape = shape,
                                   .consumer = consumer,
                                   .lines = xccl_gas_at(world, consumer, shape.lines_at),
                                   .tail = xccl_gas_at(world, world->rank, shape.tail_at),
                                   .head = position,
                                   .cached_tail = position,
                                   .limit = shape.data_bytes,
                                   .ends = ends};
}

void xccl_ring_open_consumer(xccl_ring_consumer_t *ring, xccl_world_t *world, xccl_ring_shape_t shape, int producer,
                             uint64_t position) {
    *ring = (xccl_ring_consumer_t){.world = world,
                                   .shape = shape,
                                   .producer = producer,
                                   .lines = xccl_gas_at(world, world->rank, shape.lines_at),
                                   .data = xccl_gas_at(world, world->rank, shape.data_at),
                                   .tail = position,
                                   .released = position};
}

/* ---- producer ---- */

static void note_distance(xccl_ring_producer_t *ring, uint64_t ticks) {
    if (ring->far_ticks == 0)
        return;
    if (ticks >= ring->far_ticks)
        ring->far_lines += ring->far_lines < 8;
    else
        ring->far_lines -= ring->far_lines > 0;
}

void xccl_ring_look(xccl_ring_producer_t *ring) {
    uint64_t start = xccl_ring_ticks();
    /* acquire (in the load) pairs with the consumer's release of its tail: its reads of what lies below are over */
    uint64_t tail = xccl_gas_load(ring->tail);
    uint64_t ticks = xccl_ring_ticks() - start;
    if (tail == ring->cached_tail)
        return;
    if (ring->head - tail > ring->shape.lines) { /* the memory is damaged: the last tail still bounds the room */
        ring->bad_tail = tail;
        ring->has_bad_tail = true;
        return;
    }
    note_distance(ring, ticks); /* the word is new, so its line came from the consumer's core */
    ring->cached_tail = tail;
    ring->data_tail = ring->ends[(tail - 1) & (ring->shape.lines - 1)];
}

/* A piece of `bytes` starts again at the front. */
static bool wraps(const xccl_ring_producer_t *ring, uint64_t bytes) {
    return bytes > ring->limit - ring->offset;
}

/* `taken` behind a piece of `bytes`. */
static uint64_t end_of(const xccl_ring_producer_t *ring, uint64_t bytes) {
    return ring->taken + (wraps(ring, bytes) ? ring->limit - ring->offset : 0) + bytes;
}

static bool fits(const xccl_ring_producer_t *ring, uint64_t bytes) {
    return ring->head - ring->cached_tail < ring->shape.lines && end_of(ring, bytes) - ring->data_tail <= ring->limit;
}

bool xccl_ring_has_piece(xccl_ring_producer_t *ring, uint64_t bytes) {
    bytes = round_to_line(bytes);
    if (fits(ring, bytes))
        return true;
    xccl_ring_look(ring);
    return fits(ring, bytes);
}

uint64_t xccl_ring_take_piece(xccl_ring_producer_t *ring, uint64_t bytes, bool *out_hand_back) {
    bytes = round_to_line(bytes);
    uint64_t piece = wraps(ring, bytes) ? 0 : ring->offset;
    ring->taken = end_of(ring, bytes);
    ring->offset = piece + bytes;
    *out_hand_back = (ring->taken - ring->asked) * 4 >= ring->limit;
    if (*out_hand_back)
        ring->asked = ring->taken;
    return piece;
}

void xccl_ring_limit(xccl_ring_producer_t *ring, uint64_t bytes) {
    ring->limit = bytes / XCCL_LINE * XCCL_LINE;
}

/* ---- consumer ---- */

void xccl_ring_release(xccl_ring_consumer_t *ring) {
    /* release: the reads of what is handed back come first */
    xccl_gas_signal_at(ring->world, ring->producer, ring->shape.tail_at, ring->tail);
    ring->released = ring->tail;
}
