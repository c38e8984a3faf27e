#include "moe_pull.h"

#include <stdlib.h>
#include <string.h>

#include "shm.h"
#include "status.h"

/* ---- entries ---- */

bool xccl_moe_arrived_new(xccl_moe_arrived_t *arrived, int num_sources) {
    arrived->first = calloc((size_t)num_sources + 1, sizeof *arrived->first);
    return arrived->first != NULL;
}

void xccl_moe_arrived_free(xccl_moe_arrived_t *arrived) {
    free(arrived->first);
    free(arrived->entries);
}

static int make_room(const xccl_moe_puller_t *puller, xccl_moe_arrived_t *arrived, uint64_t count) {
    if (count <= arrived->room)
        return XCCL_OK;
    uint64_t room = count < 2 * arrived->room ? 2 * arrived->room : count;
    xccl_moe_entry_t *entries = realloc(arrived->entries, room * sizeof *entries);
    if (!entries)
        return xccl_fail(XCCL_ERR_MEMORY, "%s on rank %d: no memory to receive %llu rows", puller->operation,
                         puller->rank, (unsigned long long)count);
    arrived->entries = entries;
    arrived->room = room;
    return XCCL_OK;
}

/* This bounds all that is indexed by entries. */
static int check_entries(const xccl_moe_puller_t *puller, const xccl_moe_listed_t *listed,
                         const xccl_moe_entry_t *entries) {
    const char *operation = puller->operation;
    uint64_t of_token = 0;
    for (uint64_t i = 0; i < listed->count; i++) {
        if (entries[i].local_expert >= puller->num_local)
            return xccl_fail_damaged(operation, puller->rank, listed->rank, "expert of an entry",
                                     entries[i].local_expert, 0, puller->num_local - 1);
        if (entries[i].token >= listed->num_tokens)
            return xccl_fail_damaged(operation, puller->rank, listed->rank, "token of an entry", entries[i].token, 0,
                                     listed->num_tokens - 1);
        of_token = i > 0 && entries[i].token == entries[i - 1].token ? of_token + 1 : 1;
        if (of_token > puller->num_topk)
            return xccl_fail_damaged(operation, puller->rank, listed->rank, "number of entries of a token", of_token, 1,
                                     puller->num_topk);
    }
    return XCCL_OK;
}

int xccl_moe_fetch(const xccl_moe_puller_t *puller, xccl_moe_arrived_t *arrived, int index,
                   const xccl_moe_listed_t *listed) {
    uint64_t first = arrived->first[index];
    int status = make_room(puller, arrived, first + listed->count);
    if (status != XCCL_OK)
        return status;
    arrived->first[index + 1] = first + listed->count;
    if (listed->count > 0)
        memcpy(arrived->entries + first, listed->entries, listed->count * sizeof *arrived->entries);
    return check_entries(puller, listed, arrived->entries + first);
}

/* row_start[source][expert]: rows of that source for that expert. */
static void count_entries(const xccl_moe_puller_t *puller, const xccl_moe_arrived_t *arrived, int num_sources,
                          uint64_t *row_start) {
    memset(row_start, 0, (uint64_t)num_sources * puller->num_local * sizeof *row_start);
    for (int source = 0; source < num_sources; source++)
        for (uint64_t i = arrived->first[source]; i < arrived->first[source + 1]; i++)
            row_start[(uint64_t)source * puller->num_local + arrived->entries[i].local_expert]++;
}

int xccl_moe_place(const xccl_moe_puller_t *puller, const xccl_moe_arrived_t *arrived, int num_sources,
                   uint64_t *row_start, int32_t *out_num_recv_per_expert, int64_t *out_num_recv) {
    count_entries(puller, arrived, num_sources, row_start);
    uint64_t row = 0;
    for (uint64_t local = 0; local < puller->num_local; local++) {
        uint64_t begin = row;
        for (int source = 0; source < num_sources; source++) {
            uint64_t *start = &row_start[(uint64_t)source * puller->num_local + local];
            uint64_t count = *start;
            *start = row;
            row += count;
        }
        if (row - begin > INT32_MAX)
            return xccl_fail(XCCL_ERR_USAGE,
                             "%s on rank %d: %llu rows arrive for one expert, expected at most %d: send fewer tokens "
                             "at once",
                             puller->operation, puller->rank, (unsigned long long)(row - begin), INT32_MAX);
        out_num_recv_per_expert[local] = (int32_t)(row - begin);
    }
    *out_num_recv = (int64_t)row;
    return XCCL_OK;
}

/* ---- rows ---- */

/* The same bytes to several places. */
static void spread(const xccl_moe_puller_t *puller, uint64_t num_places, uint64_t offset, const unsigned char *from,
                   uint64_t bytes, const unsigned char *streamed) {
    for (uint64_t i = 0; i < num_places; i++)
        if (puller->places[i] >= streamed)
            puller->kernel->stream(puller->places[i] + offset, from, bytes);
        else
            memcpy(puller->places[i] + offset, from, bytes);
}

enum { BLOCK = 1024 }; /* elements that stay in the first-level cache while they are spread */

/* Dequantises a row once, however many places it goes to. */
static void spread_dequantized(const xccl_moe_puller_t *puller, uint64_t num_places, const int8_t *row, float scale,
                               const unsigned char *streamed) {
    _Alignas(XCCL_LINE) unsigned char block[BLOCK * sizeof(float)];
    size_t hidden = (size_t)puller->hidden, itemsize = xccl_kernel_itemsize(puller->dtype);
    if (num_places == 1 && puller->places[0] < streamed) {
        puller->kernel->dequantize(puller->dtype, puller->places[0], row, scale, hidden);
        return;
    }
    for (size_t begin = 0; begin < hidden; begin += BLOCK) {
        size_t count = hidden - begin < BLOCK ? hidden - begin : BLOCK;
        puller->kernel->dequantize(puller->dtype, block, row + begin, scale, count);
        spread(puller, num_places, begin * itemsize, block, count * itemsize, streamed);
    }
}

/* One token and its entries, which follow each other. Returns how many these are. */
static uint64_t pull_token(const xccl_moe_puller_t *puller, const xccl_moe_entry_t *entries, uint64_t count,
                           const xccl_moe_staged_t *staged, const xccl_moe_rows_t *to) {
    uint32_t token = entries->token;
    const unsigned char *from = staged->rows + token * puller->staged_bytes;
    float scale = staged->scales ? staged->scales[token] : 1;
    uint64_t n = 0;
    for (; n < count && entries[n].token == token; n++) {
        uint64_t row = puller->cursor[entries[n].local_expert]++;
        to->src_rank[row] = staged->rank;
        to->src_token[row] = (int32_t)token;
        puller->places[n] = to->x + row * to->row_bytes;
        if (to->scales)
            to->scales[row] = scale;
    }
    if (staged->scales && !to->scales)
        spread_dequantized(puller, n, (const int8_t *)from, scale, to->streamed);
    else
        spread(puller, n, 0, from, to->row_bytes, to->streamed);
    return n;
}

void xccl_moe_pull(const xccl_moe_puller_t *puller, const xccl_moe_arrived_t *arrived, int index,
                   const xccl_moe_staged_t *staged, const uint64_t *row_start, const xccl_moe_rows_t *to) {
    uint64_t num_local = puller->num_local, count = arrived->first[index + 1] - arrived->first[index];
    memcpy(puller->cursor, row_start + (uint64_t)index * num_local, num_local * sizeof *puller->cursor);
    const xccl_moe_entry_t *entries = arrived->entries + arrived->first[index];
    for (uint64_t i = 0; i < count;)
        i += pull_token(puller, entries + i, count - i, staged, to);
}
