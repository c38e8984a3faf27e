/* What is noted of accesses to the app data area, and the report of a race. */
#include <stdio.h>

#include "gas.h"
#include "heap.h"
#include "race.h"
#include "status.h"

/* ---- places ---- */

xccl_race_cell_t *xccl_race_cell(const xccl_race_t *race, int rank, uint64_t offset) {
    uint64_t line = (offset - race->world->header->area_offset[XCCL_AREA_APP]) / XCCL_LINE;
    return xccl_race_at(race, rank, race->layout.cells + line * race->layout.cell_bytes);
}

bool xccl_race_locate(const xccl_race_t *race, const void *address, int *out_rank, uint64_t *out_offset) {
    const xccl_world_t *world = race->world;
    uintptr_t at = (uintptr_t)address, windows = (uintptr_t)world->windows;
    if (at < windows || at - windows >= (uint64_t)world->size * world->stride)
        return false;
    *out_rank = (int)((at - windows) / world->stride);
    *out_offset = (at - windows) % world->stride;
    const xccl_header_t *header = world->header;
    return *out_offset >= header->area_offset[XCCL_AREA_APP] &&
           *out_offset - header->area_offset[XCCL_AREA_APP] < header->area_bytes[XCCL_AREA_APP] &&
           xccl_heap_find(world, *out_rank, *out_offset, 1) != NULL;
}

/* ---- order ---- */

static bool is_ordered(const xccl_race_t *race, const xccl_race_record_t *before, int window) {
    if (before->rank == race->world->rank)
        return true;
    uint64_t index =
        before->flags & XCCL_RACE_PUT ? xccl_race_puts(race, before->rank, window) : xccl_race_own(race, before->rank);
    return race->known[index] >= before->time;
}

static bool conflict(int flags, int others) {
    return (flags | others) & XCCL_RACE_WRITE && !(flags & others & XCCL_RACE_ATOMIC);
}

/* ---- one line ---- */

static void remove_record(xccl_race_cell_t *cell, uint16_t index) {
    cell->records[index] = cell->records[--cell->count];
}

/* What `now` covers and is ordered before it need not be kept: whatever races with it races with `now` too. A read does
 * not cover a write. */
static void drop_covered(const xccl_race_t *race, xccl_race_cell_t *cell, const xccl_race_record_t *now, int window) {
    for (uint16_t i = 0; i < cell->count;) {
        xccl_race_record_t *before = &cell->records[i];
        bool covered = now->flags & XCCL_RACE_WRITE || !(before->flags & XCCL_RACE_WRITE);
        if (covered && is_ordered(race, before, window))
            before->mask &= ~now->mask;
        if (before->mask == 0)
            remove_record(cell, i);
        else
            i++;
    }
}

static void note(const xccl_race_t *race, xccl_race_cell_t *cell, const xccl_race_record_t *now) {
    for (uint16_t i = 0; i < cell->count; i++) {
        xccl_race_record_t *before = &cell->records[i];
        if (before->rank == now->rank && before->time == now->time && before->site == now->site &&
            before->flags == now->flags && before->op == now->op) {
            before->mask |= now->mask;
            return;
        }
    }
    if (cell->count < race->layout.num_records) {
        cell->records[cell->count++] = *now;
        return;
    }
    xccl_race_record_t *given_up = &cell->records[cell->next++ % race->layout.num_records];
    if (given_up->flags & XCCL_RACE_PUT)
        cell->lost = 1;
    *given_up = *now;
}

/* Notes the access, unless it races: then *out is what it races with, and where. */
static bool races(const xccl_race_t *race, xccl_race_cell_t *cell, const xccl_race_record_t *now, int window,
                  xccl_race_record_t *out) {
    bool found = false;
    xccl_race_lock(race->world, &cell->lock);
    for (uint16_t i = 0; i < cell->count && !found; i++) {
        const xccl_race_record_t *before = &cell->records[i];
        found = before->mask & now->mask && conflict(before->flags, now->flags) && !is_ordered(race, before, window);
        if (found) {
            *out = *before;
            out->mask &= now->mask;
        }
    }
    if (!found) {
        drop_covered(race, cell, now, window);
        note(race, cell, now);
    }
    xccl_race_unlock(&cell->lock);
    return found;
}

/* ---- the report ---- */

const char *xccl_race_op_name(int op) {
    static const char *const NAMES[] = {"put", "get", "put_signal", "signal_op", "atomic", "local_read", "local_write"};
    return op >= XCCL_RACE_OP_PUT ? NAMES[op - XCCL_RACE_OP_PUT] : xccl_op_name(op);
}

static const char *site_text(const xccl_race_t *race, int rank, uint32_t site) {
    if (site == 0 || site > XCCL_RACE_SITES)
        return "an unknown place";
    return xccl_race_at(race, rank, race->layout.sites + (uint64_t)(site - 1) * XCCL_RACE_SITE_BYTES);
}

static const char *array_text(const xccl_race_t *race, int window, const xccl_block_t *block) {
    uint32_t label = atomic_load_explicit(&xccl_race_cell(race, window, block->offset)->label, memory_order_acquire);
    return label == 0 ? "a block" : site_text(race, window, label);
}

static const char *what_orders(const xccl_race_t *race, const xccl_race_record_t *before, int flags) {
    if (before->flags & XCCL_RACE_PUT && race->known[xccl_race_own(race, before->rank)] >= before->time)
        return "The second is told of the first by a signal to another rank than the one that was put to, which does "
               "not "
               "complete the put: call quiet() between the put and that signal.";
    if (!(before->flags & XCCL_RACE_WRITE))
        return "Nothing tells the second that the first is done reading: the reader signals (signal_op, send, barrier) "
               "behind its last read, and the writer waits for that before it writes again.";
    if (!(flags & XCCL_RACE_WRITE))
        return "Nothing tells the second that the first has written: the writer signals behind it (put_signal, or "
               "signal_op to the same rank; quiet() before a signal to another), and the reader waits (wait_until, "
               "recv, "
               "barrier) before it reads.";
    return "Nothing says which write comes first: let one rank signal behind its write, and the other wait for that.";
}

typedef struct range_t {
    uint64_t first, end; /* offsets in the window */
} range_t;

static int report(const xccl_race_t *race, int window, const xccl_race_record_t *now, const xccl_race_record_t *before,
                  range_t touched, range_t common) {
    int me = race->world->rank;
    const xccl_block_t *block = xccl_heap_find(race->world, window, touched.first, 1);
    uint64_t start = block ? block->offset : 0;
    return xccl_fail_about(
        XCCL_ERR_RACE, before->rank,
        "rank %d, %s: race on bytes %llu to %llu of rank %d's copy of %s.\n"
        "  first:  rank %d %s them: %s at %s\n"
        "  second: rank %d %s bytes %llu to %llu: %s at %s\n"
        "  %s",
        me, xccl_race_op_name(now->op), (unsigned long long)(common.first - start),
        (unsigned long long)(common.end - start), window, block ? array_text(race, window, block) : "freed memory",
        before->rank, before->flags & XCCL_RACE_WRITE ? "writes" : "reads", xccl_race_op_name(before->op),
        site_text(race, before->rank, before->site), me, now->flags & XCCL_RACE_WRITE ? "writes" : "reads",
        (unsigned long long)(touched.first - start), (unsigned long long)(touched.end - start),
        xccl_race_op_name(now->op), site_text(race, me, now->site), what_orders(race, before, now->flags));
}

/* ---- accesses ---- */

/* The bytes of the line at `line` that [first, end) has. */
static uint64_t mask_of(uint64_t line, range_t range) {
    uint64_t from = range.first > line ? range.first - line : 0;
    uint64_t to = range.end < line + XCCL_LINE ? range.end - line : XCCL_LINE;
    return (to - from == XCCL_LINE ? UINT64_MAX : (1ull << (to - from)) - 1) << from;
}

static bool is_same(const xccl_race_record_t *a, const xccl_race_record_t *b) {
    return a->rank == b->rank && a->site == b->site && a->op == b->op;
}

int xccl_race_access(xccl_race_t *race, int rank, uint64_t offset, uint64_t bytes, int flags, int op) {
    range_t range = {offset, offset + bytes}, common = {0};
    xccl_race_record_t now = {.time = race->now,
                              .site = race->site,
                              .rank = (uint16_t)race->world->rank,
                              .flags = (uint8_t)flags,
                              .op = (uint8_t)op};
    xccl_race_record_t first = {0}, other;
    for (uint64_t line = offset / XCCL_LINE * XCCL_LINE; line < range.end; line += XCCL_LINE) {
        now.mask = mask_of(line, range);
        bool found = races(race, xccl_race_cell(race, rank, line), &now, rank, &other);
        if (first.mask != 0 && (!found || !is_same(&first, &other)))
            break; /* the first stretch is told */
        if (!found)
            continue;
        if (first.mask == 0) {
            first = other;
            common.first = line + (uint64_t)__builtin_ctzll(other.mask);
        }
        common.end = line + XCCL_LINE - (uint64_t)__builtin_clzll(other.mask);
    }
    return first.mask == 0 ? XCCL_OK : report(race, rank, &now, &first, range, common);
}

void xccl_race_learn_from_puts(xccl_race_t *race, int rank, uint64_t offset) {
    xccl_race_cell_t *cell = xccl_race_cell(race, rank, offset);
    uint64_t word = 0xfull << offset % XCCL_LINE;
    uint64_t put_by[XCCL_MAX_RANKS / 64] = {0};
    xccl_race_lock(race->world, &cell->lock);
    for (uint16_t i = 0; i < cell->count; i++)
        if (cell->records[i].flags & XCCL_RACE_PUT && cell->records[i].mask & word)
            put_by[cell->records[i].rank / 64] |= 1ull << cell->records[i].rank % 64;
    bool all = cell->lost != 0;
    xccl_race_unlock(&cell->lock);
    for (int q = 0; q < race->world->size; q++) {
        if (q == race->world->rank || !(all || put_by[q / 64] >> q % 64 & 1))
            continue;
        xccl_race_clock_t *fence = xccl_race_at(race, q, race->layout.fence);
        uint64_t fenced = xccl_race_learn(race, fence), *puts = &race->known[xccl_race_puts(race, q, rank)];
        if (fenced > *puts)
            *puts = fenced;
    }
}
