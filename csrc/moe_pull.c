#include "moe_pull.h"

#include <string.h>

#include "shm.h"
#include "status.h"

/* One load: what is checked is what is used, whatever the source does meanwhile. */
static xccl_moe_entry_t read_entry(const xccl_moe_entry_t *entry) {
    /* relaxed: the acquire of the field that published the entries orders it */
    uint64_t word = __atomic_load_n((const uint64_t *)(const void *)entry, __ATOMIC_RELAXED);
    xccl_moe_entry_t value;
    memcpy(&value, &word, sizeof value);
    return value;
}

static int bad_entry(const xccl_moe_puller_t *puller, const xccl_moe_source_t *source, const char *field, uint64_t got,
                     uint64_t end) {
    return xccl_fail(XCCL_ERR_USAGE,
                     "%s on rank %d: damaged shared memory: %s in an entry of rank %d is %llu, expected less than %llu",
                     puller->operation, puller->rank, field, source->rank, (unsigned long long)got,
                     (unsigned long long)end);
}

int xccl_moe_count(const xccl_moe_puller_t *puller, const xccl_moe_source_t *source, uint64_t *counts) {
    for (uint64_t i = 0; i < source->num_entries; i++) {
        uint32_t local = read_entry(&source->entries[i]).local_expert;
        if (local >= puller->num_local)
            return bad_entry(puller, source, "the expert", local, puller->num_local);
        counts[local]++;
    }
    return XCCL_OK;
}

int xccl_moe_place(const xccl_moe_puller_t *puller, int num_sources, uint64_t *row_start,
                   int32_t *out_num_recv_per_expert, int64_t *out_num_recv) {
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

/* Finds the places of one token, whose entries follow each other from `first` on; *out_used: how many these are. */
static int place_token(const xccl_moe_puller_t *puller, const xccl_moe_source_t *source, uint64_t first,
                       xccl_moe_entry_t entry, float scale, const xccl_moe_rows_t *to, uint64_t *out_used) {
    uint32_t token = entry.token;
    uint64_t used = 0;
    do {
        if (entry.local_expert >= puller->num_local)
            return bad_entry(puller, source, "the expert", entry.local_expert, puller->num_local);
        uint64_t row = puller->cursor[entry.local_expert]++;
        if (row >= to->num_rows)
            return bad_entry(puller, source, "the row", row, to->num_rows);
        to->src_rank[row] = source->rank;
        to->src_token[row] = (int32_t)token;
        puller->places[used++] = to->x + row * to->row_bytes;
        if (to->scales)
            to->scales[row] = scale;
        if (used == puller->num_topk || first + used == source->num_entries)
            break;
        entry = read_entry(&source->entries[first + used]);
    } while (entry.token == token);
    *out_used = used;
    return XCCL_OK;
}

int xccl_moe_pull(const xccl_moe_puller_t *puller, const xccl_moe_source_t *source, const uint64_t *row_start,
                  const xccl_moe_rows_t *to) {
    memcpy(puller->cursor, row_start, puller->num_local * sizeof *puller->cursor);
    for (uint64_t i = 0; i < source->num_entries;) {
        xccl_moe_entry_t entry = read_entry(&source->entries[i]);
        if (entry.token >= source->num_tokens)
            return bad_entry(puller, source, "the token", entry.token, source->num_tokens);
        const unsigned char *staged = source->rows + entry.token * puller->staged_bytes;
        float scale = source->scales ? source->scales[entry.token] : 1;
        uint64_t used = 0;
        int status = place_token(puller, source, i, entry, scale, to, &used);
        if (status != XCCL_OK)
            return status;
        if (source->scales && !to->scales)
            spread_dequantized(puller, used, (const int8_t *)staged, scale, to->streamed);
        else
            spread(puller, used, 0, staged, to->row_bytes, to->streamed);
        i += used;
    }
    return XCCL_OK;
}
