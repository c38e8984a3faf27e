/* coll_store.c - whether a message is stored through the caches or around them.
 *
 * Both ranks of a message pay for it: one stores it where the other loads it. If their cores share a cache, ordinary
 * stores are best. If not, each line has to be fetched from the other core's cache, and taken from it again before it
 * is overwritten, which can take five times as long as the way through memory with non-temporal stores. Which of the
 * two it is the topology does not tell: the cores of a virtual machine may lie anywhere, and move. So it is measured,
 * for each size of message: this rank's stores, its loads of what its peers stored likewise, and from time to time the
 * way that is not in use. The way that costs less wins. Only time depends on it. */
#include <stdio.h>

#include "coll.h"
#include "copy.h"

enum {
    LEAST_BYTES = 1024, /* shorter copies cost less than their measurement */
    WINDOW = 8,         /* samples, of which the fastest counts: others were interrupted */
    SAMPLE_EVERY = 4,   /* operations */
    TRY_EVERY = 64      /* operations: so often the other way is tried */
};

/* ---- what is learned ---- */

static void add_sample(xccl_coll_cost_t *cost, uint64_t ticks, uint64_t bytes) {
    float value = (float)ticks / (float)bytes;
    if (cost->samples++ % WINDOW == 0) {
        cost->before = cost->samples == 1 ? value : cost->best;
        cost->best = value;
    }
    cost->best = value < cost->best ? value : cost->best;
}

/* Ticks a byte; 0 if not known. */
static float estimate(const xccl_coll_cost_t *cost) {
    return cost->best < cost->before ? cost->best : cost->before;
}

static xccl_coll_way_t *way_of(xccl_coll_t *coll, uint64_t bytes, bool streamed) {
    return &coll->ways[coll->reduces][63 - __builtin_clzll(bytes)][streamed];
}

/* Streaming is known to cost less, in stores and loads together. */
static bool streaming_wins(xccl_coll_t *coll, uint64_t bytes) {
    const xccl_coll_way_t *cached = way_of(coll, bytes, false), *streamed = way_of(coll, bytes, true);
    if (cached->store.samples == 0 || cached->load.samples == 0 || streamed->store.samples == 0 ||
        streamed->load.samples == 0)
        return false;
    return estimate(&streamed->store) + estimate(&streamed->load) < estimate(&cached->store) + estimate(&cached->load);
}

void xccl_coll_choose_stores(xccl_coll_t *coll, uint64_t bytes) {
    coll->streams = coll->samples = false;
    if (coll->size == 1 || bytes < LEAST_BYTES)
        return;
    uint64_t turn = way_of(coll, bytes, false)->operations++;
    bool tries = turn < 2 * WINDOW ? turn % 2 == 1 : turn % TRY_EVERY == 0;
    coll->streams = streaming_wins(coll, bytes) != tries;
    coll->samples = tries || turn % SAMPLE_EVERY == 1;
}

/* ---- copies ---- */

void xccl_coll_copy(void *to, const void *from, uint64_t bytes, bool streams) {
    if (streams)
        xccl_copy_streaming(to, from, bytes);
    else
        memcpy(to, from, bytes);
}

void xccl_coll_store(xccl_coll_t *coll, int pe, uint64_t offset, const void *from, uint64_t bytes) {
    void *to = xccl_gas_at(coll->world, coll->comm->ranks[pe], offset);
    uint64_t start = coll->samples ? xccl_ticks() : 0;
    xccl_coll_copy(to, from, bytes, coll->streams);
    if (coll->samples && bytes >= LEAST_BYTES)
        add_sample(&way_of(coll, bytes, coll->streams)->store, xccl_ticks() - start, bytes);
}

void xccl_coll_note_load(xccl_coll_t *coll, uint64_t ticks, uint64_t bytes, bool streamed) {
    if (bytes >= LEAST_BYTES)
        add_sample(&way_of(coll, bytes, streamed)->load, ticks, bytes);
}

void xccl_coll_load(xccl_coll_t *coll, void *to, const void *from, uint64_t bytes, bool streamed) {
    bool samples = (coll->samples || streamed != coll->streams) && !coll->out_beyond_cache;
    uint64_t start = samples ? xccl_ticks() : 0;
    xccl_coll_copy(to, from, bytes, coll->out_beyond_cache);
    if (samples)
        xccl_coll_note_load(coll, xccl_ticks() - start, bytes, streamed);
}

/* ---- the size of the last-level cache ---- */

/* What the kernel says of the first core; sysconf may count the caches of all cores together. */
uint64_t xccl_coll_cache_bytes(void) {
    static const uint64_t TYPICAL = 32 << 20;
    unsigned long long kib = 0;
    FILE *file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "re");
    if (file != NULL) {
        if (fscanf(file, "%lluK", &kib) != 1)
            kib = 0;
        fclose(file);
    }
    return kib > 0 ? kib << 10 : TYPICAL;
}

void xccl_coll_choose_result_stores(xccl_coll_t *coll, uint64_t rank_bytes) {
    coll->out_beyond_cache = rank_bytes * (uint64_t)coll->size > coll->cache_bytes / 2;
}
