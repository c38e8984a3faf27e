/* The ring alone: two windows in private memory, no ranks, a doorbell that counts. Loaded by test_ring.py. */
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#include "ring.h"

enum { PRODUCER = 0, CONSUMER = 1 };

typedef struct pair_t {
    xccl_world_t worlds[2];
    unsigned char *memory;
    uint64_t stride;
    xccl_ring_producer_t producer;
    xccl_ring_consumer_t consumer;
    _Atomic uint64_t rung[2];
} pair_t;

/* Stands in for wait.c. The windows' worlds carry their pair in `ranks`. */
void xccl_ring(xccl_world_t *world, int rank) {
    pair_t *pair = (pair_t *)world->ranks;
    atomic_fetch_add(&pair->rung[rank], 1);
}

pair_t *pair_new(uint64_t lines, uint64_t blocks, uint64_t block_bytes, uint64_t position) {
    pair_t *pair = calloc(1, sizeof *pair);
    xccl_ring_shape_t shape = {.lines = lines,
                               .blocks = blocks,
                               .block_bytes = block_bytes,
                               .lines_at = 64,
                               .blocks_at = 64 + lines * 64,
                               .tail_at = 0};
    pair->stride = (shape.blocks_at + blocks * block_bytes + 63) / 64 * 64;
    pair->memory = aligned_alloc(64, 2 * pair->stride);
    memset(pair->memory, 0, 2 * pair->stride);
    for (int rank = 0; rank < 2; rank++)
        pair->worlds[rank] = (xccl_world_t){.rank = rank,
                                            .size = 2,
                                            .windows = pair->memory,
                                            .stride = pair->stride,
                                            .own = pair->memory + (uint64_t)rank * pair->stride,
                                            .ranks = (xccl_rank_entry_t *)pair};
    /* what the lap before left: each line's last sequence, and a tail that has caught up */
    for (uint64_t i = 1; i <= lines && i <= position; i++) {
        uint64_t sequence = position - i + 1;
        memcpy(pair->memory + pair->stride + shape.lines_at + ((position - i) & (lines - 1)) * 64, &sequence, 8);
    }
    memcpy(pair->memory, &position, 8);
    xccl_ring_open_producer(&pair->producer, &pair->worlds[PRODUCER], shape, CONSUMER, position);
    xccl_ring_open_consumer(&pair->consumer, &pair->worlds[CONSUMER], shape, PRODUCER, position);
    return pair;
}

void pair_free(pair_t *pair) {
    free(pair->memory);
    free(pair);
}

/* Publishes a position, with `bytes` of block if block is not NULL. 0: no room. */
int pair_send(pair_t *pair, const void *content, const void *block, uint64_t bytes) {
    if (block ? !xccl_ring_has_block(&pair->producer) : !xccl_ring_has_line(&pair->producer))
        return 0;
    if (block)
        xccl_gas_put_at(&pair->worlds[PRODUCER], CONSUMER, xccl_ring_block_offset(&pair->producer, 0), block, bytes);
    memcpy(xccl_ring_content(&pair->producer), content, XCCL_RING_CONTENT_BYTES);
    xccl_ring_publish(&pair->producer);
    return 1;
}

/* Takes a position. 0: empty. */
int pair_receive(pair_t *pair, void *content, void *block, uint64_t bytes) {
    const void *seen = xccl_ring_peek(&pair->consumer);
    if (!seen)
        return 0;
    memcpy(content, seen, XCCL_RING_CONTENT_BYTES);
    memcpy(block, xccl_ring_block(&pair->consumer), bytes);
    xccl_ring_consume(&pair->consumer);
    return 1;
}

uint64_t pair_head(const pair_t *pair) {
    return pair->producer.head;
}

uint64_t pair_tail(const pair_t *pair) {
    return pair->consumer.tail;
}

uint64_t pair_rung(const pair_t *pair, int rank) {
    return pair->rung[rank];
}

unsigned char *pair_window(const pair_t *pair, int rank) {
    return pair->memory + (uint64_t)rank * pair->stride;
}

uint64_t pair_stride(const pair_t *pair) {
    return pair->stride;
}

/* ---- the race ---- */

typedef struct race_t {
    pair_t *pair;
    uint64_t count;
    uint64_t wrong;
} race_t;

static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Every word of message i is a function of i, so a torn or stale one shows. */
static void fill(uint64_t *words, size_t count, uint64_t i) {
    for (size_t w = 0; w < count; w++)
        words[w] = mix(i * 64 + w);
}

static bool uses_block(uint64_t i) {
    return mix(i) % 3 == 0;
}

static void *produce(void *arg) {
    race_t *race = arg;
    uint64_t content[7], block[16];
    for (uint64_t i = 0; i < race->count; i++) {
        fill(content, 7, i);
        fill(block, 16, ~i);
        while (!pair_send(race->pair, content, uses_block(i) ? block : NULL, sizeof block))
            sched_yield();
    }
    return NULL;
}

static void *consume(void *arg) {
    race_t *race = arg;
    uint64_t content[7], block[16], expected[16];
    for (uint64_t i = 0; i < race->count; i++) {
        const void *seen;
        while (!(seen = xccl_ring_peek(&race->pair->consumer)))
            sched_yield();
        memcpy(content, seen, sizeof content);
        fill(expected, 7, i);
        race->wrong += memcmp(content, expected, sizeof content) != 0;
        if (uses_block(i)) {
            memcpy(block, xccl_ring_block(&race->pair->consumer), sizeof block);
            fill(expected, 16, ~i);
            race->wrong += memcmp(block, expected, sizeof block) != 0;
        }
        xccl_ring_consume(&race->pair->consumer);
    }
    return NULL;
}

/* Two threads pass `count` messages; the number of wrong ones. Blocks need 128 bytes. */
uint64_t pair_race(pair_t *pair, uint64_t count) {
    race_t race = {.pair = pair, .count = count};
    pthread_t producer;
    if (pthread_create(&producer, NULL, produce, &race) != 0)
        return UINT64_MAX;
    consume(&race);
    pthread_join(producer, NULL);
    return race.wrong;
}
