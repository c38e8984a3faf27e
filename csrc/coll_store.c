/* coll_store.c - which way a message takes: stored through the caches or around them, or read by the kernel.
 *
 * Both ranks of a staged message pay for it: one stores it where the other loads it. If their cores share a cache,
 * ordinary stores are best. If not, each line has to be fetched from the other core's cache, and taken from it again
 * before it is overwritten, which can take five times as long as the way through memory with non-temporal stores. The
 * third way (cma.h) copies once, but pays for a system call and for each page, and its sender has to wait for the
 * receivers. Which is best the topology does not tell: the cores of a virtual machine may lie anywhere, and move. So it
 * is measured, for each size of message: this rank's stores, its loads of what its peers stored likewise, and from time
 * to time a way that is not in use. The way that costs least wins. Only time depends on it. */
#include <stdio.h>

#include "cma.h"
#include "coll.h"
#include "copy.h"

enum {
    LEAST_BYTES = 1024, /* shorter copies cost less than their measurement */
    TRIALS = 3,         /* operations on each way with which a size begins */
    SAMPLE_EVERY = 4,   /* operations */
    TRY_EVERY = 64      /* operations: so often another way is tried */
};

/* ---- what is learned ---- */

static xccl_coll_costs_t *costs_of(xccl_coll_t *coll, uint64_t bytes, xccl_coll_way_t way) {
    return &coll->costs[coll->reduces][xccl_cost_class(bytes)][way];
}

static xccl_coll_way_t way_of(const xccl_coll_t *coll) {
    return coll->x_by_cma ? XCCL_COLL_BY_CMA : coll->streams ? XCCL_COLL_BY_STREAM : XCCL_COLL_BY_CACHE;
}

/* Ticks that a byte to one peer costs this rank; 0 if not known. A message that is shared is stored once for all. */
static float estimate(xccl_coll_t *coll, uint64_t bytes, uint64_t chunk_bytes, xccl_coll_way_t way) {
    const xccl_coll_costs_t *costs = costs_of(coll, way == XCCL_COLL_BY_CMA ? bytes : chunk_bytes, way);
    if (costs->load.samples == 0 || way == XCCL_COLL_BY_CMA)
        return xccl_cost_estimate(&costs->load);
    float stores = coll->shared ? 1.0f / (float)(coll->size - 1) : 1;
    return costs->store.samples == 0 ? 0
                                     : xccl_cost_estimate(&costs->load) + stores * xccl_cost_estimate(&costs->store);
}

static xccl_coll_way_t best_way(xccl_coll_t *coll, uint64_t bytes, uint64_t chunk_bytes, int ways) {
    xccl_coll_way_t best = XCCL_COLL_BY_CACHE;
    for (int way = 0; way < ways; way++) {
        float cost = estimate(coll, bytes, chunk_bytes, way), least = estimate(coll, bytes, chunk_bytes, best);
        if (cost > 0 && (least == 0 || cost < least))
            best = way;
    }
    return best;
}

void xccl_coll_choose_way(xccl_coll_t *coll, uint64_t bytes, bool cma) {
    uint64_t chunk_bytes = bytes < coll->chunk_bytes ? bytes : coll->chunk_bytes;
    coll->streams = coll->samples = coll->x_by_cma = false;
    if (coll->size == 1 || bytes < LEAST_BYTES)
        return;
    int ways = cma ? XCCL_COLL_WAYS : XCCL_COLL_BY_CMA;
    uint64_t turn = costs_of(coll, bytes, XCCL_COLL_BY_CACHE)->operations++;
    bool tries = turn < TRIALS * (uint64_t)ways || turn % TRY_EVERY == 0;
    xccl_coll_way_t way = turn < TRIALS * (uint64_t)ways ? turn % ways
                          : tries                        ? turn / TRY_EVERY % ways
                                                         : best_way(coll, bytes, chunk_bytes, ways);
    coll->streams = way == XCCL_COLL_BY_STREAM;
    coll->x_by_cma = way == XCCL_COLL_BY_CMA;
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
        xccl_cost_add(&costs_of(coll, bytes, way_of(coll))->store, xccl_ticks() - start, bytes);
}

void xccl_coll_note_load(xccl_coll_t *coll, uint64_t ticks, uint64_t bytes, xccl_coll_way_t way) {
    if (bytes >= LEAST_BYTES)
        xccl_cost_add(&costs_of(coll, bytes, way)->load, ticks, bytes);
}

void xccl_coll_load(xccl_coll_t *coll, void *to, const void *from, uint64_t bytes, bool streamed) {
    bool samples = (coll->samples || streamed != coll->streams) && !coll->out_beyond_cache;
    uint64_t start = samples ? xccl_ticks() : 0;
    xccl_coll_copy(to, from, bytes, coll->out_beyond_cache);
    if (samples)
        xccl_coll_note_load(coll, xccl_ticks() - start, bytes, streamed ? XCCL_COLL_BY_STREAM : XCCL_COLL_BY_CACHE);
}

int xccl_coll_load_by_cma(xccl_coll_t *coll, int pe, void *to, uint64_t address, uint64_t bytes) {
    uint64_t start = xccl_ticks();
    int status = xccl_cma_read(coll->world, coll->comm->ranks[pe], to, address, bytes);
    if (status == XCCL_OK)
        xccl_coll_note_load(coll, xccl_ticks() - start, bytes, XCCL_COLL_BY_CMA);
    return status;
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
