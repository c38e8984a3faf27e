#include "moe.h"

#include <stdlib.h>
#include <string.h>

#include "status.h"
#include "wait.h"

/* The receive half of dispatch. */

static const xccl_field_t *field_of(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, int source) {
    return xccl_moe_own_line(moe, moe->layout.dispatch_field[xccl_moe_parity(handle->dispatch_epoch)], source);
}

static xccl_moe_arrived_t *arrived_with(xccl_moe_t *moe, const xccl_moe_handle_t *handle) {
    return &moe->arrived[xccl_moe_parity(handle->dispatch_epoch)];
}

/* ---- what has arrived: fields and entries are read once, and checked ---- */

static int make_room(const xccl_moe_t *moe, xccl_moe_arrived_t *arrived, uint64_t count) {
    if (count <= arrived->room)
        return XCCL_OK;
    uint64_t room = count < 2 * arrived->room ? 2 * arrived->room : count;
    xccl_moe_entry_t *entries = realloc(arrived->entries, room * sizeof *entries);
    if (!entries)
        return xccl_fail(XCCL_ERR_MEMORY, "dispatch on rank %d: no memory to receive %llu rows", moe->comm->rank,
                         (unsigned long long)count);
    arrived->entries = entries;
    arrived->room = room;
    return XCCL_OK;
}

/* Copies what `source` has for this member behind what those before it have. */
static int fetch_entries(xccl_moe_t *moe, const xccl_moe_handle_t *handle, int source) {
    xccl_moe_arrived_t *arrived = arrived_with(moe, handle);
    const xccl_field_t *field = field_of(moe, handle, source);
    uint64_t offset = xccl_gas_read(&field->offset), count = xccl_gas_read(&field->count);
    uint64_t most = (uint64_t)(moe->config.num_max_tokens * moe->config.num_topk);
    if (count > most)
        return xccl_comm_fail_damaged(moe->comm, source, "count of entries", count, 0, most);
    uint64_t stage = moe->staging + moe->layout.dispatch_stage[xccl_moe_parity(handle->dispatch_epoch)];
    uint64_t room = moe->layout.dispatch_scales - count * sizeof(xccl_moe_entry_t);
    if (offset - stage > room || offset % sizeof(xccl_moe_entry_t) != 0)
        return xccl_comm_fail_damaged(moe->comm, source, "offset of entries", offset, stage, stage + room);
    uint64_t first = arrived->first[source];
    int status = make_room(moe, arrived, first + count);
    if (status != XCCL_OK)
        return status;
    if (count > 0)
        xccl_gas_get_at(moe->comm->world, arrived->entries + first, moe->comm->ranks[source], offset,
                        count * sizeof(xccl_moe_entry_t));
    arrived->first[source + 1] = first + count;
    return XCCL_OK;
}

/* The entries of `source` are such as it can have written, which bounds all that is indexed by them. */
static int check_entries(xccl_moe_t *moe, const xccl_moe_handle_t *handle, int source) {
    uint64_t num_local = xccl_moe_num_local(moe), max_tokens = (uint64_t)moe->config.num_max_tokens;
    uint64_t num_topk = (uint64_t)moe->config.num_topk, of_token = 0;
    const xccl_moe_arrived_t *arrived = arrived_with(moe, handle);
    const xccl_moe_entry_t *entries = arrived->entries + arrived->first[source];
    for (uint64_t i = 0; i < arrived->first[source + 1] - arrived->first[source]; i++) {
        if (entries[i].local_expert >= num_local)
            return xccl_comm_fail_damaged(moe->comm, source, "expert of an entry", entries[i].local_expert, 0,
                                          num_local - 1);
        if (entries[i].token >= max_tokens)
            return xccl_comm_fail_damaged(moe->comm, source, "token of an entry", entries[i].token, 0, max_tokens - 1);
        of_token = i > 0 && entries[i].token == entries[i - 1].token ? of_token + 1 : 1;
        if (of_token > num_topk)
            return xccl_comm_fail_damaged(moe->comm, source, "number of entries of a token", of_token, 1, num_topk);
    }
    return XCCL_OK;
}

/* row_start[source][expert]: rows of that source for that expert. */
static int count_entries(xccl_moe_t *moe, xccl_moe_handle_t *handle) {
    uint64_t num_local = xccl_moe_num_local(moe);
    memset(handle->row_start, 0, (uint64_t)moe->comm->size * num_local * sizeof *handle->row_start);
    xccl_moe_arrived_t *arrived = arrived_with(moe, handle);
    for (int source = 0; source < moe->comm->size; source++) {
        int status = fetch_entries(moe, handle, source);
        if (status == XCCL_OK)
            status = check_entries(moe, handle, source);
        if (status != XCCL_OK)
            return status;
        uint64_t *rows = handle->row_start + (uint64_t)source * num_local;
        for (uint64_t i = arrived->first[source]; i < arrived->first[source + 1]; i++)
            rows[arrived->entries[i].local_expert]++;
    }
    return XCCL_OK;
}

/* Turns these counts into where each source's rows for an expert begin. */
static int place_rows(const xccl_moe_t *moe, xccl_moe_handle_t *handle, int32_t *out_num_recv_per_expert) {
    uint64_t num_local = xccl_moe_num_local(moe), row = 0;
    for (uint64_t local = 0; local < num_local; local++) {
        uint64_t begin = row;
        for (int source = 0; source < moe->comm->size; source++) {
            uint64_t *start = &handle->row_start[(uint64_t)source * num_local + local];
            uint64_t count = *start;
            *start = row;
            row += count;
        }
        if (row - begin > INT32_MAX)
            return xccl_fail(XCCL_ERR_USAGE,
                             "dispatch on rank %d: %llu rows arrive for one expert, expected at most %d: send fewer "
                             "tokens at once",
                             moe->comm->rank, (unsigned long long)(row - begin), INT32_MAX);
        out_num_recv_per_expert[local] = (int32_t)(row - begin);
    }
    handle->num_recv = (int64_t)row;
    return XCCL_OK;
}

int xccl_moe_dispatch_wait(xccl_moe_t *moe, xccl_moe_handle_t *handle, int64_t timeout_ns, int64_t *out_num_recv,
                           int32_t *out_num_recv_per_expert) {
    int status = xccl_moe_check(moe, handle, XCCL_MOE_SENT, "dispatch");
    if (status != XCCL_OK)
        return status;
    xccl_world_t *world = moe->comm->world;
    status = xccl_op_begin(world, XCCL_OP_DISPATCH);
    if (status == XCCL_OK)
        status = xccl_op_phase(world, 1);
    if (status != XCCL_OK)
        return status;
    status = xccl_moe_wait_all(moe, moe->layout.dispatch_field[xccl_moe_parity(handle->dispatch_epoch)],
                               handle->dispatch_epoch, "dispatch: tokens of this rank's experts",
                               xccl_deadline(world, timeout_ns));
    if (status != XCCL_OK)
        return status;
    status = count_entries(moe, handle);
    moe->broken |= status == XCCL_ERR_SYSTEM;
    if (status == XCCL_OK)
        status = place_rows(moe, handle, out_num_recv_per_expert);
    if (status != XCCL_OK)
        return status;
    handle->phase = XCCL_MOE_COUNTED;
    *out_num_recv = handle->num_recv;
    return XCCL_OK;
}

/* Where pull writes. */
typedef struct received_t {
    unsigned char *x;
    float *scales; /* NULL: rows are of the group's dtype */
    int32_t *src_rank;
    int32_t *src_token;
    uint64_t row_bytes;
    const unsigned char *streamed; /* rows from here on go past the caches */
} received_t;

/* The same bytes to several places. */
static void spread(const xccl_moe_t *moe, uint64_t num_places, uint64_t offset, const unsigned char *from,
                   uint64_t bytes, const unsigned char *streamed) {
    for (uint64_t i = 0; i < num_places; i++)
        if (moe->places[i] >= streamed)
            moe->kernel->stream(moe->places[i] + offset, from, bytes);
        else
            memcpy(moe->places[i] + offset, from, bytes);
}

enum { BLOCK = 1024 }; /* elements that stay in the first-level cache while they are spread */

/* Dequantises a row once, however many places it goes to. */
static void spread_dequantized(const xccl_moe_t *moe, uint64_t num_places, const int8_t *row, float scale,
                               const unsigned char *streamed) {
    _Alignas(XCCL_LINE) unsigned char block[BLOCK * sizeof(float)];
    size_t hidden = (size_t)moe->config.hidden, itemsize = xccl_kernel_itemsize(moe->config.dtype);
    if (num_places == 1 && moe->places[0] < streamed) {
        moe->kernel->dequantize(moe->config.dtype, moe->places[0], row, scale, hidden);
        return;
    }
    for (size_t begin = 0; begin < hidden; begin += BLOCK) {
        size_t count = hidden - begin < BLOCK ? hidden - begin : BLOCK;
        moe->kernel->dequantize(moe->config.dtype, block, row + begin, scale, count);
        spread(moe, num_places, begin * itemsize, block, count * itemsize, streamed);
    }
}

/* One token of a source and its entries, which follow each other. Returns how many these are. */
static uint64_t pull_token(const xccl_moe_t *moe, int source, const xccl_moe_entry_t *entries, uint64_t count,
                           const unsigned char *stage, const received_t *to) {
    uint32_t token = entries->token;
    const unsigned char *staged = stage + moe->layout.dispatch_rows + token * moe->layout.staged_bytes;
    float scale =
        ((const float *)(stage + moe->layout.dispatch_scales))[moe->config.quant == XCCL_QUANT_INT8 ? token : 0];
    uint64_t n = 0;
    for (; n < count && entries[n].token == token; n++) {
        uint64_t row = moe->cursor[entries[n].local_expert]++;
        to->src_rank[row] = source;
        to->src_token[row] = (int32_t)token;
        moe->places[n] = to->x + row * to->row_bytes;
        if (to->scales)
            to->scales[row] = scale;
    }
    if (moe->config.quant == XCCL_QUANT_INT8 && !to->scales)
        spread_dequantized(moe, n, (const int8_t *)staged, scale, to->streamed);
    else
        spread(moe, n, 0, staged, to->row_bytes, to->streamed);
    return n;
}

static void pull_source(xccl_moe_t *moe, const xccl_moe_handle_t *handle, int source, const received_t *to) {
    uint64_t num_local = xccl_moe_num_local(moe);
    memcpy(moe->cursor, handle->row_start + (uint64_t)source * num_local, num_local * sizeof *moe->cursor);
    uint64_t stage_offset = moe->staging + moe->layout.dispatch_stage[xccl_moe_parity(handle->dispatch_epoch)];
    const unsigned char *stage = xccl_gas_at(moe->comm->world, moe->comm->ranks[source], stage_offset);
    const xccl_moe_arrived_t *arrived = arrived_with(moe, handle);
    const xccl_moe_entry_t *entries = arrived->entries + arrived->first[source];
    uint64_t count = arrived->first[source + 1] - arrived->first[source];
    for (uint64_t i = 0; i < count;)
        i += pull_token(moe, source, entries + i, count - i, stage, to);
}

int xccl_moe_dispatch_pull(xccl_moe_t *moe, xccl_moe_handle_t *handle, void *recv_x, float *scales, int32_t *src_rank,
                           int32_t *src_token) {
    int status = xccl_moe_check(moe, handle, XCCL_MOE_COUNTED, "dispatch");
    if (status != XCCL_OK)
        return status;
    if (scales && moe->config.quant == XCCL_QUANT_NONE)
        return xccl_fail(XCCL_ERR_USAGE, "dispatch on rank %d: there are no scales without quant", moe->comm->rank);
    uint64_t row_bytes = scales ? (uint64_t)moe->config.hidden : moe->layout.row_bytes;
    int64_t started = xccl_now_ns();
    handle->streams = moe->streams =
        xccl_moe_streams(moe, handle->dispatch_epoch, (uint64_t)handle->num_recv * moe->layout.row_bytes);
    uint64_t cached = handle->streams ? 0 : moe->cached_bytes;
    received_t to = {recv_x, scales, src_rank, src_token, row_bytes, (unsigned char *)recv_x + cached};
    int size = moe->comm->size;
    /* the own rows first: they are in this core's cache */
    for (int i = 0; i < size; i++)
        pull_source(moe, handle, (moe->comm->rank + i) % size, &to);
    xccl_kernel_stream_end();
    handle->pull_ns = xccl_now_ns() - started;
    int parity = xccl_moe_parity(handle->dispatch_epoch);
    xccl_moe_signal_all(moe, moe->layout.dispatch_done[parity], handle->dispatch_epoch);
    moe->dispatching[parity] = NULL;
    handle->phase = XCCL_MOE_RECEIVED;
    return xccl_race_leave(moe->comm, XCCL_RACE_DISPATCH, handle->dispatch_epoch, XCCL_RACE_ALL,
                           (xccl_race_buffers_t){.out = recv_x, .out_bytes = (uint64_t)handle->num_recv * row_bytes});
}
