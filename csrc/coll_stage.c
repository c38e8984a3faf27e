/* coll_stage.c - the staging ring: where messages from ordinary arrays wait for their receivers.
 *
 * A lot is a part of the ring that holds one chunk for each peer, or one for all of them if all get the same. Lots
 * follow each other without gaps; one that would cross the end of the lap starts over at the beginning of the ring.
 *
 * How long a lap is, is a matter of caches. To store a line that its reader still has in its cache takes several times
 * as long as one that has left it, so small messages go round in all of the ring, which is twice a second-level cache.
 * Large ones drive their own lines out, and ranks that share a core share its cache: two lots are enough for them, and
 * stay cached until they are read. */
#include <stdlib.h>

#include "coll.h"
#include "heap.h"

/* ---- the ring ---- */

bool xccl_coll_stage_open(xccl_coll_t *coll) {
    enum { ENTRIES = 1 << 15, FEWEST_LOTS = 8 };
    uint64_t block = coll->world->header->config.coll_block_bytes;
    uint64_t least = (uint64_t)coll->size * XCCL_LINE; /* a line for each peer */
    coll->block_bytes = ((block > least ? block : least) + XCCL_PAGE - 1) / XCCL_PAGE * XCCL_PAGE;
    coll->ring_bytes = XCCL_COLL_RING_BLOCKS * coll->block_bytes;
    uint64_t lots = ENTRIES / (uint64_t)coll->size;
    coll->num_lots = lots > XCCL_COLL_MOST_LOTS ? XCCL_COLL_MOST_LOTS : lots < FEWEST_LOTS ? FEWEST_LOTS : lots;
    coll->lots = calloc(coll->num_lots, sizeof *coll->lots);
    coll->lot_units = calloc(coll->num_lots * (uint64_t)coll->size * XCCL_COLL_CHANNELS, sizeof *coll->lot_units);
    return coll->lots != NULL && coll->lot_units != NULL;
}

void xccl_coll_stage_close(xccl_coll_t *coll) {
    free(coll->lots);
    free(coll->lot_units);
}

void xccl_coll_stage_cut(xccl_coll_t *coll, uint64_t message_bytes) {
    uint64_t parts = coll->shared || coll->size == 1 ? 1 : (uint64_t)coll->size - 1;
    uint64_t most = coll->block_bytes / parts / XCCL_LINE * XCCL_LINE;
    uint64_t needed = (message_bytes + XCCL_LINE - 1) / XCCL_LINE * XCCL_LINE;
    coll->chunk_bytes = needed < most ? needed : most;
    coll->lot_bytes = coll->chunk_bytes * parts;
    coll->first_lot = coll->next;
}

uint64_t xccl_coll_lap(const xccl_coll_t *coll, uint64_t lot_bytes) {
    const xccl_config_t *config = &coll->world->header->config;
    uint64_t ranks_per_core = (uint64_t)((config->size - 1) / config->cores + 1);
    uint64_t share = coll->ring_bytes / ranks_per_core;
    uint64_t bytes = share > 6 * lot_bytes ? share - 4 * lot_bytes : 2 * lot_bytes;
    return bytes / lot_bytes * lot_bytes;
}

/* A multiple of the lot, so that a lot never overlaps the one before it: a rank may fill the next one while its peers
 * have not taken this one. */
static uint64_t next_place(const xccl_coll_t *coll) {
    uint64_t place = (coll->ring_end + coll->lot_bytes - 1) / coll->lot_bytes * coll->lot_bytes;
    return place + coll->lot_bytes > xccl_coll_lap(coll, coll->lot_bytes) ? 0 : place;
}

/* A lot in use lies where the next one will, or has its number. */
static bool in_the_way(const xccl_coll_t *coll) {
    uint64_t place = next_place(coll);
    if (coll->next - coll->oldest == coll->num_lots)
        return true;
    for (uint64_t lot = coll->oldest; lot < coll->next; lot++) {
        const xccl_coll_lot_t *used = &coll->lots[lot % coll->num_lots];
        if (used->begin < place + coll->lot_bytes && place < used->end)
            return true;
    }
    return false;
}

static bool taken_by_all(const xccl_coll_t *coll, uint64_t lot) {
    for (int i = 0; i < coll->size - 1; i++)
        if (!xccl_coll_lot_taken(coll, lot, coll->order[i]))
            return false;
    return true;
}

bool xccl_coll_lot_free(xccl_coll_t *coll) {
    for (; in_the_way(coll); coll->oldest++)
        if (!taken_by_all(coll, coll->oldest))
            return false;
    return true;
}

/* Lots of operations that all members have finished; it spares most lots a closer look. */
static void forget_old_lots(xccl_coll_t *coll) {
    uint64_t heard = coll->epoch;
    for (int i = 0; i < coll->size - 1; i++)
        heard = coll->peers[coll->order[i]].heard < heard ? coll->peers[coll->order[i]].heard : heard;
    while (coll->oldest < coll->next && coll->lots[coll->oldest % coll->num_lots].epoch < heard)
        coll->oldest++;
}

/* Reserves the memory of the ring up to `end`. It grows by doubling. */
static int commit(xccl_coll_t *coll, uint64_t end) {
    if (end <= coll->committed_bytes)
        return XCCL_OK;
    uint64_t bytes = end < 2 * coll->committed_bytes ? 2 * coll->committed_bytes : end;
    bytes = bytes < coll->ring_bytes ? bytes : coll->ring_bytes;
    TRY(xccl_heap_commit(coll->world, coll->staging, bytes));
    coll->committed_bytes = bytes;
    return XCCL_OK;
}

int xccl_coll_lot_claim(xccl_coll_t *coll) {
    if (coll->next == coll->first_lot)
        forget_old_lots(coll);
    if (!xccl_coll_lot_free(coll))
        TRY(xccl_coll_await_lot(coll));
    uint64_t place = next_place(coll), end = place + coll->lot_bytes;
    TRY(commit(coll, end));
    if (coll->next == coll->first_lot)
        coll->first_place = place;
    coll->lots[coll->next % coll->num_lots] = (xccl_coll_lot_t){place, end, coll->epoch};
    uint64_t *units = &coll->lot_units[coll->next % coll->num_lots * (uint64_t)coll->size * XCCL_COLL_CHANNELS];
    memset(units, 0, (uint64_t)coll->size * XCCL_COLL_CHANNELS * sizeof *units);
    coll->ring_end = end;
    coll->next++;
    return XCCL_OK;
}

/* ---- where things lie ---- */

uint64_t xccl_coll_lot_place(const xccl_coll_t *coll, uint64_t first, uint64_t lot_bytes, uint64_t k) {
    uint64_t bytes = xccl_coll_lap(coll, lot_bytes), to_the_end = (bytes - first) / lot_bytes;
    return k < to_the_end ? first + k * lot_bytes : (k - to_the_end) % (bytes / lot_bytes) * lot_bytes;
}

uint64_t xccl_coll_lot_offset(const xccl_coll_t *coll, uint64_t k) {
    return coll->staging + xccl_coll_lot_place(coll, coll->first_place, coll->lot_bytes, k);
}

uint64_t xccl_coll_place_in_lot(const xccl_coll_t *coll, int pe) {
    return coll->shared ? 0 : (uint64_t)(pe < coll->rank ? pe : pe - 1) * coll->chunk_bytes;
}

/* ---- who has taken what ---- */

static uint64_t *units_of(const xccl_coll_t *coll, uint64_t lot, int pe) {
    return &coll->lot_units[(lot % coll->num_lots * (uint64_t)coll->size + (uint64_t)pe) * XCCL_COLL_CHANNELS];
}

void xccl_coll_lot_note(xccl_coll_t *coll, uint64_t k, int pe, int channel) {
    units_of(coll, coll->first_lot + k, pe)[channel] = coll->peers[pe].units[channel];
}

bool xccl_coll_lot_taken(const xccl_coll_t *coll, uint64_t lot, int pe) {
    /* A member that has begun a later operation has finished this one: no line of it needs to be looked at. */
    if (coll->peers[pe].heard > coll->lots[lot % coll->num_lots].epoch)
        return true;
    const uint64_t *units = units_of(coll, lot, pe);
    for (int channel = 0; channel < XCCL_COLL_CHANNELS; channel++)
        if (xccl_coll_units_taken(coll, pe, channel) < units[channel])
            return false;
    return true;
}
