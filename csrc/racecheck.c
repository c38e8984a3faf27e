/* The happens-before checker: opening it, and its hooks in the other layers. */
#define _GNU_SOURCE
#include "racecheck.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gas.h"
#include "heap.h"
#include "race.h"
#include "status.h"

/* ---- opening ---- */

static uint64_t round_up(uint64_t value, uint64_t unit) {
    return (value + unit - 1) / unit * unit;
}

static uint64_t place(uint64_t *end, uint64_t bytes) {
    uint64_t at = *end;
    *end = round_up(at + bytes, XCCL_LINE);
    return at;
}

static xccl_race_layout_t lay_out(const xccl_config_t *config) {
    uint64_t size = (uint64_t)config->size, most = XCCL_RACE_MOST_RECORDS, end = 0;
    xccl_race_layout_t layout = {.columns = size <= XCCL_RACE_MAX_EXACT ? size : 1};
    layout.width = size * (1 + layout.columns);
    layout.clock_bytes = round_up(sizeof(xccl_race_clock_t) + layout.width * sizeof(uint64_t), XCCL_LINE);
    layout.word_bytes =
        round_up(sizeof(xccl_race_word_t) + (1 + XCCL_RACE_HISTORY) * layout.width * sizeof(uint64_t), XCCL_LINE);
    layout.num_records = size + XCCL_RACE_LEAST_RECORDS < most ? size + XCCL_RACE_LEAST_RECORDS : most;
    layout.cell_bytes = sizeof(xccl_race_cell_t) + layout.num_records * sizeof(xccl_race_record_t);
    layout.slots = place(&end, (uint64_t)XCCL_RACE_CONTEXTS * XCCL_RACE_SLOTS * layout.clock_bytes);
    layout.streams = place(&end, size * layout.clock_bytes);
    layout.acks = place(&end, size * layout.clock_bytes);
    layout.fence = place(&end, layout.clock_bytes);
    layout.keys = place(&end, XCCL_RACE_WORDS * sizeof(uint64_t));
    layout.overflow = place(&end, layout.word_bytes);
    layout.words = place(&end, XCCL_RACE_WORDS * layout.word_bytes);
    layout.sites = place(&end, (uint64_t)XCCL_RACE_SITES * XCCL_RACE_SITE_BYTES);
    layout.cells = end = round_up(end, XCCL_PAGE);
    layout.bytes = end + config->heap_bytes / XCCL_LINE * layout.cell_bytes;
    return layout;
}

uint64_t xccl_race_window_bytes(const xccl_config_t *config) {
    return config->racecheck ? lay_out(config).bytes : 0;
}

int xccl_race_open(xccl_world_t *world) {
    const xccl_config_t *config = &world->header->config;
    if (!config->racecheck)
        return XCCL_OK;
    xccl_race_layout_t layout = lay_out(config);
    xccl_race_t *race = calloc(1, sizeof *race + layout.width * sizeof *race->known);
    if (!race)
        return xccl_fail(XCCL_ERR_MEMORY, "out of memory for the race checker");
    race->world = world;
    race->layout = layout;
    race->area = world->header->race_offset;
    race->now = 1;
    int status = xccl_heap_commit(world, race->area, layout.words); /* all that is before the words */
    if (status != XCCL_OK) {
        free(race);
        return status;
    }
    ((xccl_race_word_t *)xccl_race_at(race, world->rank, layout.overflow))->is_shared = true;
    world->race = race;
    return XCCL_OK;
}

void xccl_race_close(xccl_world_t *world) {
    free(world->race);
    world->race = NULL;
}

/* ---- blocks of the app data area ---- */

static uint64_t cells_of(const xccl_race_t *race, uint64_t offset, uint64_t bytes, uint64_t *out_bytes) {
    uint64_t from = (offset - race->world->header->area_offset[XCCL_AREA_APP]) / XCCL_LINE;
    *out_bytes = round_up(bytes, XCCL_PAGE) / XCCL_LINE * race->layout.cell_bytes;
    return race->area + race->layout.cells + from * race->layout.cell_bytes;
}

int xccl_race_reserve_slow(xccl_world_t *world, uint64_t offset, uint64_t bytes) {
    if (offset < world->header->area_offset[XCCL_AREA_APP])
        return XCCL_OK;
    uint64_t length, at = cells_of(world->race, offset, bytes, &length);
    return xccl_heap_commit(world, at, length);
}

void xccl_race_forget_slow(xccl_world_t *world, uint64_t offset, uint64_t bytes) {
    if (offset < world->header->area_offset[XCCL_AREA_APP])
        return;
    uint64_t length, at = cells_of(world->race, offset, bytes, &length);
    /* a hole reads as zero, also in the parts of pages at its ends, which belong to the neighbours too */
    if (fallocate(world->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(world->own + at - world->base),
                  (off_t)length) != 0)
        memset(world->own + at, 0, length);
}

/* ---- what the program says ---- */

int xccl_race_is_on(const xccl_world_t *world) {
    return world->race != NULL;
}

uint32_t xccl_race_site(const xccl_world_t *world) {
    return world->race ? world->race->site : 0;
}

int xccl_race_add_site(xccl_world_t *world, const char *text, uint32_t *out) {
    xccl_race_t *race = world->race;
    *out = 0;
    if (!race || race->num_sites == XCCL_RACE_SITES)
        return XCCL_OK;
    uint64_t at = race->layout.sites + (uint64_t)race->num_sites * XCCL_RACE_SITE_BYTES;
    int status = xccl_heap_commit(world, race->area + at, XCCL_RACE_SITE_BYTES);
    if (status != XCCL_OK)
        return status;
    snprintf(xccl_race_at(race, world->rank, at), XCCL_RACE_SITE_BYTES, "%s", text);
    *out = ++race->num_sites;
    return XCCL_OK;
}

void xccl_race_set_site(xccl_world_t *world, uint32_t site) {
    if (world->race)
        world->race->site = site;
}

void xccl_race_label(xccl_world_t *world, const void *address, uint32_t site) {
    int rank;
    uint64_t offset;
    /* release: who sees the label sees the site's text */
    if (world->race && xccl_race_locate(world->race, address, &rank, &offset) && rank == world->rank)
        atomic_store_explicit(&xccl_race_cell(world->race, rank, offset)->label, site, memory_order_release);
}

int xccl_race_declare(xccl_comm_t *comm, const void *address, uint64_t bytes, int is_write) {
    int rank;
    uint64_t offset;
    int status = xccl_comm_check(comm);
    if (status != XCCL_OK || !comm->world->race)
        return status;
    const char *name = is_write ? "local_write" : "local_read";
    if (!xccl_race_locate(comm->world->race, address, &rank, &offset) ||
        !xccl_heap_find(comm->world, rank, offset, bytes))
        return xccl_fail(XCCL_ERR_USAGE,
                         "rank %d, %s: the %llu bytes at this address are not inside one live symmetric array",
                         comm->rank, name, (unsigned long long)bytes);
    int flags = is_write ? XCCL_RACE_WRITE : XCCL_RACE_READ;
    /* a store through ptr is ordered as a put */
    if (is_write && rank != comm->world->rank)
        flags |= XCCL_RACE_PUT;
    return bytes == 0 ? XCCL_OK
                      : xccl_race_access(comm->world->race, rank, offset, bytes, flags,
                                         is_write ? XCCL_RACE_OP_LOCAL_WRITE : XCCL_RACE_OP_LOCAL_READ);
}

/* ---- accesses and words ---- */

int xccl_race_touch_slow(xccl_world_t *world, const void *address, uint64_t bytes, int flags, int op) {
    int rank;
    uint64_t offset;
    if (bytes == 0 || !xccl_race_locate(world->race, address, &rank, &offset))
        return XCCL_OK;
    return xccl_race_access(world->race, rank, offset, bytes, flags, op);
}

xccl_race_word_t *xccl_race_hold_slow(xccl_world_t *world, const void *word) {
    int rank;
    uint64_t offset;
    if (!xccl_race_locate(world->race, word, &rank, &offset))
        return NULL;
    xccl_race_word_t *held = xccl_race_find_word(world->race, rank, offset, true);
    xccl_race_lock(world, &held->lock);
    return held;
}

void xccl_race_signalled_slow(xccl_world_t *world, xccl_race_word_t *held, const void *word, int rank, bool is_add) {
    /* relaxed: what this rank has just stored, since it holds the word */
    uint64_t value = atomic_load_explicit((const _Atomic uint64_t *)word, memory_order_relaxed);
    xccl_race_t *race = world->race;
    xccl_race_advance(race, rank);
    xccl_race_release_word(race, held, value, is_add);
    xccl_race_unlock(&held->lock);
}

void xccl_race_updated_slow(xccl_world_t *world, xccl_race_word_t *held, const void *word, uint64_t value, bool wrote) {
    xccl_race_t *race = world->race;
    int rank;
    uint64_t offset;
    xccl_race_acquire_word(race, held, value, true);
    if (wrote) {
        xccl_race_advance(race, XCCL_RACE_ALL);
        xccl_race_release_word(race, held, value, true);
    }
    xccl_race_unlock(&held->lock);
    if (xccl_race_locate(race, word, &rank, &offset))
        xccl_race_learn_from_puts(race, rank, offset);
}

void xccl_race_waited_slow(xccl_world_t *world, const void *word, uint64_t seen) {
    xccl_race_t *race = world->race;
    int rank;
    uint64_t offset;
    if (!xccl_race_locate(race, word, &rank, &offset))
        return;
    xccl_race_word_t *found = xccl_race_find_word(race, rank, offset, false);
    if (found) {
        xccl_race_lock(world, &found->lock);
        xccl_race_acquire_word(race, found, seen, false);
        xccl_race_unlock(&found->lock);
    }
    xccl_race_learn_from_puts(race, rank, offset);
}

/* ---- members of a communicator ---- */

/* The clock that `rank` publishes. Communicators and groups may share it: a rank's clock only grows, so that one who
 * finds a later one than it looked for takes more for ordered than is. */
static xccl_race_clock_t *slot_of(const xccl_comm_t *comm, int rank, xccl_race_slot_t slot, uint64_t epoch) {
    const xccl_race_t *race = comm->world->race;
    uint64_t index = (uint64_t)(comm->context % XCCL_RACE_CONTEXTS) * XCCL_RACE_SLOTS + 2 * (uint64_t)slot + epoch % 2;
    return xccl_race_at(race, rank, race->layout.slots + index * race->layout.clock_bytes);
}

void xccl_race_publish_slow(const xccl_comm_t *comm, xccl_race_slot_t slot, uint64_t epoch) {
    xccl_race_tell(comm->world->race, slot_of(comm, comm->world->rank, slot, epoch), XCCL_RACE_ALL);
}

void xccl_race_join_slow(const xccl_comm_t *comm, xccl_race_slot_t slot, uint64_t epoch, int pe) {
    for (int member = 0; member < comm->size; member++)
        if (pe == XCCL_RACE_ALL || member == pe)
            xccl_race_learn(comm->world->race, slot_of(comm, comm->ranks[member], slot, epoch));
}

int xccl_race_buffers_slow(xccl_world_t *world, xccl_race_buffers_t buffers) {
    int op = atomic_load_explicit(&world->ranks[world->rank].operation, memory_order_relaxed);
    int status = xccl_race_touch_slow(world, buffers.x, buffers.x_bytes, XCCL_RACE_READ, op);
    if (status == XCCL_OK)
        status = xccl_race_touch_slow(world, buffers.out, buffers.out_bytes, XCCL_RACE_WRITE, op);
    return status;
}

/* ---- messages ---- */

/* One clock for all messages from one rank to another, and one for all that it receives from it. */
static xccl_race_clock_t *stream(const xccl_race_t *race, int from, int to) {
    return xccl_race_at(race, from, race->layout.streams + (uint64_t)to * race->layout.clock_bytes);
}
static xccl_race_clock_t *ack(const xccl_race_t *race, int from, int to) {
    return xccl_race_at(race, from, race->layout.acks + (uint64_t)to * race->layout.clock_bytes);
}

void xccl_race_sending_slow(xccl_world_t *world, int rank) {
    xccl_race_tell(world->race, stream(world->race, world->rank, rank), XCCL_RACE_ALL);
}

void xccl_race_receiving_slow(const xccl_comm_t *comm, int source) {
    const xccl_world_t *world = comm->world;
    for (int pe = 0; pe < comm->size; pe++)
        if (source < 0 || pe == source)
            xccl_race_tell(world->race, ack(world->race, world->rank, comm->ranks[pe]), XCCL_RACE_ALL);
}

int xccl_race_completed_slow(xccl_world_t *world, const xccl_race_transfer_t *transfer) {
    xccl_race_t *race = world->race;
    if (!transfer->is_send)
        xccl_race_learn(race, stream(race, transfer->rank, world->rank));
    else if (transfer->was_asked_for || transfer->bytes >= world->header->config.p2p_slot_bytes)
        xccl_race_learn(race, ack(race, transfer->rank, world->rank));
    uint32_t site = race->site;
    race->site = transfer->site;
    int status = xccl_race_touch_slow(world, transfer->buffer, transfer->bytes,
                                      transfer->is_send ? XCCL_RACE_READ : XCCL_RACE_WRITE,
                                      transfer->is_send ? XCCL_OP_SEND : XCCL_OP_RECV);
    race->site = site;
    return status;
}
