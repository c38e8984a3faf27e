#include "moe.h"

#include <string.h>

#include "status.h"
#include "wait.h"

/* The receive half of dispatch. */

static const xccl_field_t *field_of(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, int source) {
    return xccl_moe_own_line(moe, moe->layout.dispatch_field[xccl_moe_parity(handle->dispatch_epoch)], source);
}

/* What `source` has for this member. */
static const xccl_moe_entry_t *entries_of(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, int source) {
    return xccl_gas_at(moe->comm->world, moe->comm->ranks[source], field_of(moe, handle, source)->offset);
}

/* row_start[source][expert]: rows of that source for that expert. */
static void count_entries(const xccl_moe_t *moe, xccl_moe_handle_t *handle) {
    uint64_t num_local = xccl_moe_num_local(moe);
    memset(handle->row_start, 0, (uint64_t)moe->comm->size * num_local * sizeof *handle->row_start);
    for (int source = 0; source < moe->comm->size; source++) {
        const xccl_moe_entry_t *entries = entries_of(moe, handle, source);
        uint64_t count = field_of(moe, handle, source)->count;
        uint64_t *rows = handle->row_start + (uint64_t)source * num_local;
        for (uint64_t i = 0; i < count; i++)
            rows[entries[i].local_expert]++;
    }
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
    count_entries(moe, handle);
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

static void pull_source(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, int source, const received_t *to) {
    uint64_t num_local = xccl_moe_num_local(moe);
    memcpy(moe->cursor, handle->row_start + (uint64_t)source * num_local, num_local * sizeof *moe->cursor);
    uint64_t stage_offset = moe->staging + moe->layout.dispatch_stage[xccl_moe_parity(handle->dispatch_epoch)];
    const unsigned char *stage = xccl_gas_at(moe->comm->world, moe->comm->ranks[source], stage_offset);
    const xccl_moe_entry_t *entries = entries_of(moe, handle, source);
    uint64_t count = field_of(moe, handle, source)->count;
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
