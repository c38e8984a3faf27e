#include "moe.h"

#include <string.h>

#include "status.h"
#include "wait.h"

/* The receive half of dispatch. */

static const xccl_field_t *field_of(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, int source) {
    return xccl_moe_own_line(moe, moe->layout.dispatch_field[xccl_moe_parity(handle->dispatch_epoch)], source);
}

/* What `source` has for this member. */
static xccl_moe_source_t source_of(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, int source) {
    const xccl_field_t *field = field_of(moe, handle, source);
    const unsigned char *window = xccl_gas_at(moe->comm->world, moe->comm->ranks[source], 0);
    const unsigned char *stage =
        window + moe->blocks.staging + moe->layout.dispatch_stage[xccl_moe_parity(handle->dispatch_epoch)];
    bool quantized = moe->config.quant == XCCL_QUANT_INT8;
    return (xccl_moe_source_t){
        .rank = source,
        .entries = (const xccl_moe_entry_t *)(window + field->offset),
        .num_entries = field->count,
        .num_tokens = (uint64_t)moe->config.num_max_tokens,
        .rows = stage + moe->layout.dispatch_rows,
        .scales = quantized ? (const float *)(stage + moe->layout.dispatch_scales) : NULL,
    };
}

/* Counts the rows of all sources: where each one's rows for an expert begin. */
static int count_rows(const xccl_moe_t *moe, xccl_moe_handle_t *handle, int32_t *out_num_recv_per_expert) {
    uint64_t num_local = moe->puller.num_local;
    int status = XCCL_OK;
    memset(handle->row_start, 0, (uint64_t)moe->comm->size * num_local * sizeof *handle->row_start);
    for (int rank = 0; rank < moe->comm->size && status == XCCL_OK; rank++) {
        xccl_moe_source_t source = source_of(moe, handle, rank);
        status = xccl_moe_count(&moe->puller, &source, handle->row_start + (uint64_t)rank * num_local);
    }
    if (status != XCCL_OK)
        return status;
    return xccl_moe_place(&moe->puller, moe->comm->size, handle->row_start, out_num_recv_per_expert, &handle->num_recv);
}

int xccl_moe_dispatch_wait(xccl_moe_t *moe, xccl_moe_handle_t *handle, int64_t timeout_ns, int64_t *out_num_recv,
                           int32_t *out_num_recv_per_expert) {
    int status = xccl_moe_check(moe, handle, XCCL_MOE_SENT, "dispatch");
    if (status != XCCL_OK)
        return status;
    xccl_world_t *world = moe->comm->world;
    xccl_op_begin(world, XCCL_OP_DISPATCH);
    xccl_op_phase(world, 1);
    status = xccl_moe_wait_all(moe, moe->layout.dispatch_field[xccl_moe_parity(handle->dispatch_epoch)],
                               handle->dispatch_epoch, "dispatch: tokens of this rank's experts",
                               xccl_deadline(world, timeout_ns));
    if (status != XCCL_OK)
        return status;
    status = count_rows(moe, handle, out_num_recv_per_expert);
    if (status != XCCL_OK)
        return status;
    handle->phase = XCCL_MOE_COUNTED;
    *out_num_recv = handle->num_recv;
    return XCCL_OK;
}

/* The own rows first: they are in this core's cache. */
static int pull_all(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, const xccl_moe_rows_t *to) {
    int size = moe->comm->size, status = XCCL_OK;
    for (int i = 0; i < size && status == XCCL_OK; i++) {
        int rank = (moe->comm->rank + i) % size;
        xccl_moe_source_t source = source_of(moe, handle, rank);
        status = xccl_moe_pull(&moe->puller, &source, handle->row_start + (uint64_t)rank * moe->puller.num_local, to);
    }
    xccl_kernel_stream_end();
    return status;
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
    xccl_moe_rows_t to = {.x = recv_x,
                          .scales = scales,
                          .src_rank = src_rank,
                          .src_token = src_token,
                          .num_rows = (uint64_t)handle->num_recv,
                          .row_bytes = row_bytes,
                          .streamed = (unsigned char *)recv_x + cached};
    status = pull_all(moe, handle, &to);
    if (status != XCCL_OK)
        return status;
    handle->pull_ns = xccl_now_ns() - started;
    int parity = xccl_moe_parity(handle->dispatch_epoch);
    xccl_moe_signal_all(moe, moe->layout.dispatch_done[parity], handle->dispatch_epoch);
    moe->dispatching[parity] = NULL;
    handle->phase = XCCL_MOE_RECEIVED;
    return xccl_race_leave(moe->comm, XCCL_RACE_DISPATCH, handle->dispatch_epoch, XCCL_RACE_ALL,
                           (xccl_race_buffers_t){.out = recv_x, .out_bytes = (uint64_t)handle->num_recv * row_bytes});
}
