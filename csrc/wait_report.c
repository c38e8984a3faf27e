#include "wait_report.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "shm.h"
#include "status.h"

enum { MAX_SLOTS = 16, MAX_RANKS_SHOWN = 64 };

typedef struct text_t {
    char buffer[24576];
    size_t length;
} text_t;

/* What the last timeout of this thread lacked. */
static _Thread_local xccl_missing_t missing_slots[MAX_SLOTS];
static _Thread_local int num_missing;

static void __attribute__((format(printf, 2, 3))) append(text_t *text, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text->buffer + text->length, sizeof text->buffer - text->length, format, args);
    va_end(args);
    if (n > 0) {
        size_t room = sizeof text->buffer - text->length - 1;
        text->length += (size_t)n < room ? (size_t)n : room;
    }
}

const char *xccl_wait_operation(const xccl_world_t *world) {
    return xccl_op_name(atomic_load_explicit(&world->ranks[world->rank].operation, memory_order_relaxed));
}

/* ---- the awaited slots ---- */

static void keep_slot(const xccl_world_t *world, const xccl_awaited_t *slot) {
    xccl_missing_t *kept = &missing_slots[num_missing++];
    *kept = (xccl_missing_t){.rank = slot->peer, .expected = slot->expected, .seen = slot->seen};
    snprintf(kept->what, sizeof kept->what, "%s", slot->what);
    if (slot->peer >= 0)
        xccl_shm_rank_info(world, slot->peer, &kept->info);
}

static void append_slots(text_t *text, const xccl_world_t *world, const xccl_wait_t *wait) {
    xccl_awaited_t slot;
    int count = 0;
    num_missing = 0;
    for (; count < world->size * 4 && wait->awaited(wait->arg, count, &slot); count++) {
        if (count >= MAX_SLOTS)
            continue;
        keep_slot(world, &slot);
        append(text, "\n  missing: %s", slot.what);
        if (slot.peer >= 0)
            append(text, " of rank %d", slot.peer);
        append(text, ", expected %llu, seen %llu", (unsigned long long)slot.expected, (unsigned long long)slot.seen);
    }
    if (count > MAX_SLOTS)
        append(text, "\n  ... and %d more", count - MAX_SLOTS);
}

/* ---- the ranks ---- */

/* One rank that is in another operation than all others is mostly the reason: says so in a sentence. */
static void append_odd_one(text_t *text, const xccl_world_t *world) {
    xccl_rank_info_t one, other;
    for (int rank = 0; rank < world->size && world->size > 2; rank++) {
        int next = rank == 0 ? 1 : 0;
        bool odd = xccl_shm_rank_info(world, rank, &one) == XCCL_OK &&
                   xccl_shm_rank_info(world, next, &other) == XCCL_OK &&
                   (one.sequence != other.sequence || strcmp(one.operation, other.operation) != 0);
        for (int i = 0; i < world->size && odd; i++) {
            xccl_rank_info_t third;
            odd = i == rank || (xccl_shm_rank_info(world, i, &third) == XCCL_OK && third.sequence == other.sequence &&
                                strcmp(third.operation, other.operation) == 0);
        }
        if (odd) {
            append(text, "\nRank %d is at operation %llu (%s), the others at %llu (%s).", rank,
                   (unsigned long long)one.sequence, one.operation, (unsigned long long)other.sequence,
                   other.operation);
            return;
        }
    }
}

static void append_ranks(text_t *text, const xccl_world_t *world) {
    char line[256];
    append(text, "\nAll ranks:");
    for (int rank = 0; rank < world->size && rank < MAX_RANKS_SHOWN; rank++) {
        xccl_shm_describe_rank(world, rank, line, sizeof line);
        append(text, "\n  %s", line);
    }
    if (world->size > MAX_RANKS_SHOWN)
        append(text, "\n  ... and %d more: xccl ps", world->size - MAX_RANKS_SHOWN);
}

int xccl_wait_fail_timeout(xccl_world_t *world, const xccl_wait_t *wait) {
    text_t text = {.length = 0};
    append(&text, "rank %d: %s timed out.", world->rank, xccl_wait_operation(world));
    append_slots(&text, world, wait);
    append_odd_one(&text, world);
    append_ranks(&text, world);
    return xccl_fail(XCCL_ERR_TIMEOUT, "%s", text.buffer);
}

int xccl_error_missing(int index, xccl_missing_t *out) {
    if (index < 0 || index >= num_missing)
        return XCCL_AGAIN;
    *out = missing_slots[index];
    return XCCL_OK;
}
