/* The ring alone: two windows in private memory, no ranks, a doorbell that counts. Loaded by test_ring.py. */
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#include "copy.h"
#include "ring.h"
#include "ring_harness.h"

enum { PRODUCER = 0, CONSUMER = 1 };

struct pair_t {
    xccl_world_t worlds[2];
    unsigned char *memory;
    uint64_t stride;
    xccl_ring_producer_t producer;
    xccl_ring_consumer_t consumer;
    uint64_t *ends;
    _Atomic uint64_t rung[2];
};

/* Stands in for wait.c. The windows' worlds carry their pair in `ranks`. */
void xccl_ring(xccl_world_t *world, int rank) {
    pair_t *pair = (pair_t *)world->ranks;
    atomic_fetch_add(&pair->rung[rank], 1);
}

/* Stands in for faults.c: there is no plan. */
uint64_t xccl_fault_damage(xccl_world_t *world, void *word, bool alone) {
    (void)world, (void)word, (void)alone;
    return 0;
}

pair_t *pair_new(uint64_t lines, uint64_t data_bytes, uint64_t position) {
    pair_t *pair = calloc(1, sizeof *pair);
    xccl_ring_shape_t shape = {
        .lines = lines, .data_bytes = data_bytes, .lines_at = 64, .data_at = 64 + lines * 64, .tail_at = 0};
    pair->stride = (shape.data_at + data_bytes + 63) / 64 * 64;
    pair->ends = calloc(lines, sizeof *pair->ends);
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
    xccl_ring_open_producer(&pair->producer, &pair->worlds[PRODUCER], shape, CONSUMER, pair->ends, position);
    xccl_ring_open_consumer(&pair->consumer, &pair->worlds[CONSUMER], shape, PRODUCER, position);
    return pair;
}

void pair_free(pair_t *pair) {
    free(pair->ends);
    free(pair->memory);
    free(pair);
}

typedef struct content_t {
    uint64_t offset, bytes, hand_back;
    unsigned char rest[XCCL_RING_CONTENT_BYTES - 24];
} content_t;

/* Publishes a position, with a piece of `bytes` if there are any. 0: no room. */
int pair_send(pair_t *pair, const void *rest, const void *data, uint64_t bytes) {
    xccl_ring_producer_t *ring = &pair->producer;
    content_t content = {.bytes = bytes};
    if (!(bytes > 0 ? xccl_ring_has_piece(ring, bytes) : xccl_ring_has_line(ring)))
        return 0;
    if (bytes > 0) {
        bool hand_back;
        content.offset = xccl_ring_take_piece(ring, bytes, &hand_back);
        content.hand_back = hand_back;
        void *piece = xccl_gas_at(&pair->worlds[PRODUCER], CONSUMER, ring->shape.data_at + content.offset);
        if (xccl_ring_is_far(ring))
            xccl_copy_streaming(piece, data, bytes);
        else
            xccl_copy(piece, data, bytes);
    }
    memcpy(content.rest, rest, sizeof content.rest);
    memcpy(xccl_ring_content(ring), &content, sizeof content);
    xccl_ring_publish(ring);
    return 1;
}

/* Takes a position: the bytes of its piece. -1: empty. */
int64_t pair_receive(pair_t *pair, void *rest, void *data) {
    const content_t *seen = xccl_ring_peek(&pair->consumer);
    if (!seen)
        return -1;
    int64_t bytes = (int64_t)seen->bytes;
    memcpy(rest, seen->rest, sizeof seen->rest);
    memcpy(data, pair->consumer.data + seen->offset, seen->bytes);
    xccl_ring_consume(&pair->consumer, seen->hand_back);
    return bytes;
}

void pair_limit(pair_t *pair, uint64_t bytes) {
    xccl_ring_limit(&pair->producer, bytes);
}

/* A tail word that takes so many ticks to read comes from far away. */
void pair_far_ticks(pair_t *pair, uint64_t ticks) {
    pair->producer.far_ticks = ticks;
}

int pair_is_far(const pair_t *pair) {
    return xccl_ring_is_far(&pair->producer);
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

/* Words of the piece of message i: none, or up to a quarter of 1024 bytes. */
static uint64_t words_of(uint64_t i) {
    return mix(i) % 3 == 0 ? mix(~i) % 33 : 0;
}

enum { REST_WORDS = sizeof((content_t *)0)->rest / 8 };

static void *produce(void *arg) {
    race_t *race = arg;
    uint64_t rest[REST_WORDS], data[32];
    for (uint64_t i = 0; i < race->count; i++) {
        fill(rest, REST_WORDS, i);
        fill(data, words_of(i), ~i);
        while (!pair_send(race->pair, rest, data, words_of(i) * 8))
            sched_yield();
    }
    return NULL;
}

static void *consume(void *arg) {
    race_t *race = arg;
    uint64_t rest[REST_WORDS], data[32], expected[32];
    for (uint64_t i = 0; i < race->count; i++) {
        int64_t bytes;
        while ((bytes = pair_receive(race->pair, rest, data)) < 0)
            sched_yield();
        fill(expected, REST_WORDS, i);
        race->wrong += bytes != (int64_t)words_of(i) * 8 || memcmp(rest, expected, sizeof rest) != 0;
        fill(expected, words_of(i), ~i);
        race->wrong += memcmp(data, expected, words_of(i) * 8) != 0;
    }
    return NULL;
}

uint64_t pair_race(pair_t *pair, uint64_t count) {
    race_t race = {.pair = pair, .count = count};
    pthread_t producer;
    if (pthread_create(&producer, NULL, produce, &race) != 0)
        return UINT64_MAX;
    consume(&race);
    pthread_join(producer, NULL);
    return race.wrong;
}
