#include "ring.h"

void xccl_ring_open_producer(xccl_ring_producer_t *ring, xccl_world_t *world, xccl_ring_shape_t shape, int consumer,
                             uint64_t position) {
    *ring = (xccl_ring_producer_t){.world = world,
                                   .shape = shape,
                                   .consumer = consumer,
                                   .lines = xccl_gas_at(world, consumer, shape.lines_at),
                                   .tail = xccl_gas_at(world, world->rank, shape.tail_at),
                                   .head = position,
                                   .cached_tail = position};
}

void xccl_ring_open_consumer(xccl_ring_consumer_t *ring, xccl_world_t *world, xccl_ring_shape_t shape, int producer,
                             uint64_t position) {
    *ring = (xccl_ring_consumer_t){.world = world,
                                   .shape = shape,
                                   .producer = producer,
                                   .lines = xccl_gas_at(world, world->rank, shape.lines_at),
                                   .blocks = xccl_gas_at(world, world->rank, shape.blocks_at),
                                   .tail = position,
                                   .released = position};
}

/* ---- producer ---- */

static bool has_room(xccl_ring_producer_t *ring, uint64_t capacity) {
    if (ring->head - ring->cached_tail < capacity)
        return true;
    /* acquire (in the load) pairs with the consumer's release of its tail: its reads of the slots below are over */
    ring->cached_tail = xccl_gas_load(ring->tail);
    return ring->head - ring->cached_tail < capacity;
}

bool xccl_ring_has_line(xccl_ring_producer_t *ring) {
    return has_room(ring, ring->shape.lines);
}

bool xccl_ring_has_block(xccl_ring_producer_t *ring) {
    return has_room(ring, ring->shape.blocks);
}

uint64_t xccl_ring_block_offset(const xccl_ring_producer_t *ring, uint64_t ahead) {
    return ring->shape.blocks_at + ((ring->head + ahead) & (ring->shape.blocks - 1)) * ring->shape.block_bytes;
}

/* ---- consumer ---- */

void xccl_ring_release(xccl_ring_consumer_t *ring) {
    /* release: the reads of the slots handed back come first */
    xccl_gas_signal_at(ring->world, ring->producer, ring->shape.tail_at, ring->tail);
    ring->released = ring->tail;
}
