#include "comm.h"

#include <stdlib.h>
#include <string.h>

#include "gas.h"
#include "heap.h"
#include "racecheck.h"
#include "status.h"

/* ---- context pages ---- */

static uint64_t context_offset(int context) {
    uint64_t tables = XCCL_AREAS * ((sizeof(xccl_heap_table_t) + XCCL_PAGE - 1) / XCCL_PAGE * XCCL_PAGE);
    return tables + (uint64_t)context * XCCL_PAGE;
}

xccl_context_page_t *xccl_comm_page(const xccl_comm_t *comm, int world_rank) {
    return xccl_gas_at(comm->world, world_rank, context_offset(comm->context));
}

static void mark_context(xccl_world_t *world, int context, bool used) {
    uint64_t bit = 1ull << (context % 64);
    if (used)
        world->contexts_used[context / 64] |= bit;
    else
        world->contexts_used[context / 64] &= ~bit;
}

/* ---- creation ---- */

static int create(xccl_world_t *world, int context, int size, const int *ranks, xccl_comm_t **out) {
    xccl_comm_t *comm = calloc(1, sizeof *comm);
    int *copy = malloc((size_t)size * sizeof *copy);
    if (!comm || !copy) {
        free(comm);
        free(copy);
        return xccl_fail(XCCL_ERR_MEMORY, "out of memory for a communicator of %d ranks", size);
    }
    memcpy(copy, ranks, (size_t)size * sizeof *copy);
    comm->world = world;
    comm->context = context;
    comm->size = size;
    comm->ranks = copy;
    for (int pe = 0; pe < size; pe++)
        if (ranks[pe] == world->rank)
            comm->rank = pe;
    mark_context(world, context, true);
    *out = comm;
    return XCCL_OK;
}

int xccl_comm_create_world(xccl_world_t *world, xccl_comm_t **out) {
    int status = xccl_check_usable(world);
    if (status != XCCL_OK)
        return status;
    if (world->contexts_used[0] & 1)
        return xccl_fail(XCCL_ERR_USAGE, "rank %d has its world communicator already: use split for another one",
                         world->rank);
    int ranks[XCCL_MAX_RANKS];
    for (int rank = 0; rank < world->size; rank++)
        ranks[rank] = rank;
    return create(world, 0, world->size, ranks, out);
}

void xccl_comm_destroy(xccl_comm_t *comm) {
    if (!comm)
        return;
    mark_context(comm->world, comm->context, false);
    free(comm->ranks);
    free(comm);
}

typedef struct split_record_t {
    int64_t color, key;
    uint64_t contexts_used[XCCL_MAX_CONTEXTS / 64];
    int64_t status;
} split_record_t;
_Static_assert(sizeof(split_record_t) <= XCCL_AGREE_BYTES, "a split record fits an agreement slot");

static split_record_t record_of(const unsigned char *all, int pe) {
    split_record_t record;
    memcpy(&record, all + (size_t)pe * XCCL_AGREE_BYTES, sizeof record);
    return record;
}

static int exchange_records(xccl_comm_t *comm, const split_record_t *mine, unsigned char *all, int64_t deadline) {
    unsigned char record[XCCL_AGREE_BYTES] = {0};
    memcpy(record, mine, sizeof *mine);
    return xccl_comm_agree(comm, record, all, deadline);
}

/* The lowest context that no member uses: groups of different colors are disjoint and may share it. */
static int free_context(const xccl_comm_t *parent, const unsigned char *all) {
    for (int context = 1; context < XCCL_MAX_CONTEXTS; context++) {
        bool used = false;
        for (int pe = 0; pe < parent->size && !used; pe++)
            used = record_of(all, pe).contexts_used[context / 64] >> (context % 64) & 1;
        if (!used)
            return context;
    }
    return -1;
}

/* World ranks with `color`, ordered by key, then by rank in the parent. */
static int members(const xccl_comm_t *parent, const unsigned char *all, int64_t color, int *ranks) {
    int count = 0;
    int64_t keys[XCCL_MAX_RANKS];
    for (int pe = 0; pe < parent->size; pe++) {
        split_record_t record = record_of(all, pe);
        if (record.color != color)
            continue;
        int at = count++;
        for (; at > 0 && keys[at - 1] > record.key; at--) {
            keys[at] = keys[at - 1];
            ranks[at] = ranks[at - 1];
        }
        keys[at] = record.key;
        ranks[at] = parent->ranks[pe];
    }
    return count;
}

static bool is_member(int rank, const int *ranks, int count) {
    for (int i = 0; i < count; i++)
        if (ranks[i] == rank)
            return true;
    return false;
}

/* Clears the own page of `context`. Peers signal into it only after the agreement that follows, so no early
 * signal is wiped (bug class 1). */
static int clear_context(xccl_world_t *world, int context) {
    int status = xccl_heap_commit(world, context_offset(context), XCCL_PAGE);
    if (status == XCCL_OK)
        memset(xccl_gas_at(world, world->rank, context_offset(context)), 0, XCCL_PAGE);
    return status;
}

int xccl_comm_create_split(xccl_comm_t *parent, int64_t color, int64_t key, int64_t deadline, xccl_comm_t **out) {
    unsigned char all[(size_t)parent->size * XCCL_AGREE_BYTES];
    xccl_world_t *world = parent->world;
    split_record_t mine = {.color = color < 0 ? -1 : color, .key = key};
    memcpy(mine.contexts_used, world->contexts_used, sizeof mine.contexts_used);
    int status = exchange_records(parent, &mine, all, deadline);
    if (status != XCCL_OK)
        return status;
    int context = free_context(parent, all);
    if (context < 0)
        return xccl_fail(XCCL_ERR_USAGE, "all %d contexts are in use: close communicators that are no longer needed",
                         XCCL_MAX_CONTEXTS);
    int ranks[XCCL_MAX_RANKS];
    int count = members(parent, all, mine.color, ranks);
    if (!is_member(world->rank, ranks, count))
        return xccl_fail(XCCL_ERR_SYSTEM, "rank %d: what it gave to split is damaged in shared memory", world->rank);
    int local = color < 0 ? XCCL_OK : clear_context(world, context);
    split_record_t outcome = {.status = local};
    status = exchange_records(parent, &outcome, all, deadline);
    if (status != XCCL_OK || local != XCCL_OK)
        return status != XCCL_OK ? status : local;
    for (int pe = 0; pe < parent->size; pe++)
        if (record_of(all, pe).status != XCCL_OK)
            return xccl_fail((int)record_of(all, pe).status, "split failed on rank %d, which has the details", pe);
    if (color < 0) {
        *out = NULL;
        return XCCL_OK;
    }
    return create(world, context, count, ranks, out);
}

int xccl_comm_create_view(xccl_world_t *world, int context, int size, const int *ranks, xccl_comm_t **out) {
    int status = clear_context(world, context);
    return status == XCCL_OK ? create(world, context, size, ranks, out) : status;
}

/* ---- sync and agree ---- */

int xccl_comm_sync(xccl_comm_t *comm, int64_t deadline) {
    xccl_world_t *world = comm->world;
    uint64_t epoch = ++comm->sync_epoch;
    xccl_context_page_t *own = xccl_comm_page(comm, world->rank);
    xccl_race_publish(comm, XCCL_RACE_SYNC, epoch);
    for (int round = 0, distance = 1; distance < comm->size; round++, distance *= 2) {
        int to = comm->ranks[(comm->rank + distance) % comm->size];
        int from = comm->ranks[(comm->rank - distance + comm->size) % comm->size];
        xccl_gas_signal_at(world, to, context_offset(comm->context) + (uint64_t)round * sizeof(xccl_sync_line_t),
                           epoch);
        int status = xccl_wait_word(world, &own->sync[round].epoch, epoch, from, "barrier signal", deadline);
        if (status != XCCL_OK)
            return status;
    }
    xccl_race_join(comm, XCCL_RACE_SYNC, epoch, XCCL_RACE_ALL);
    return XCCL_OK;
}

int xccl_comm_agree(xccl_comm_t *comm, const void *mine, void *all, int64_t deadline) {
    /* Two slots alternate. A slot is written again two agreements later, and between lies a barrier that each
     * member enters only after it has read this one. */
    unsigned slot = comm->agree_epoch++ & 1;
    memcpy(xccl_comm_page(comm, comm->world->rank)->agree[slot], mine, XCCL_AGREE_BYTES);
    int status = xccl_comm_sync(comm, deadline);
    if (status != XCCL_OK)
        return status;
    for (int pe = 0; pe < comm->size; pe++)
        memcpy((unsigned char *)all + (size_t)pe * XCCL_AGREE_BYTES, xccl_comm_page(comm, comm->ranks[pe])->agree[slot],
               XCCL_AGREE_BYTES);
    return XCCL_OK;
}

/* ---- checks ---- */

int xccl_comm_check(const xccl_comm_t *comm) {
    xccl_chaos_call(comm->world);
    int status = xccl_check_usable(comm->world);
    if (status == XCCL_OK && comm->broken)
        return xccl_fail(
            XCCL_ERR_USAGE,
            "rank %d: this communicator is unusable since a collective operation on it failed halfway (%s)", comm->rank,
            xccl_op_name(comm->world->ranks[comm->world->rank].operation));
    return status;
}

int xccl_comm_check_pe(const xccl_comm_t *comm, int pe, const char *operation) {
    if (pe >= 0 && pe < comm->size)
        return XCCL_OK;
    return xccl_fail(XCCL_ERR_USAGE, "rank %d, %s: rank %d is not in this communicator of %d ranks (0 to %d)",
                     comm->rank, operation, pe, comm->size, comm->size - 1);
}

int xccl_comm_fail_damaged(const xccl_comm_t *comm, int pe, const char *field, uint64_t got, uint64_t least,
                           uint64_t most) {
    int op = atomic_load_explicit(&comm->world->ranks[comm->world->rank].operation, memory_order_relaxed);
    return xccl_fail_damaged(xccl_op_name(op), comm->rank, pe, field, got, least, most);
}

int xccl_comm_settle(xccl_comm_t *comm, int status) {
    if (status < 0 && status != XCCL_ERR_USAGE && status != XCCL_ERR_MEMORY)
        comm->broken = true;
    return status;
}

int xccl_comm_rank(const xccl_comm_t *comm) {
    return comm->rank;
}

int xccl_comm_size(const xccl_comm_t *comm) {
    return comm->size;
}

int xccl_comm_world_rank(const xccl_comm_t *comm, int pe) {
    return pe >= 0 && pe < comm->size ? comm->ranks[pe] : -1;
}
