#include "moe.h"

#include "status.h"
#include "wait.h"

/* The receive half of dispatch. */

static const xccl_field_t *field_of(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, int source) {
    return xccl_moe_own_line(moe, moe->layout.dispatch_field[xccl_moe_parity(handle->dispatch_epoch)], source);
}

/* Offset of every source's stage in its window. */
static uint64_t stage_of(const xccl_moe_t *moe, const xccl_moe_handle_t *handle) {
    return moe->blocks.staging + moe->layout.dispatch_stage[xccl_moe_parity(handle->dispatch_epoch)];
}

static xccl_moe_arrived_t *arrived_with(xccl_moe_t *moe, const xccl_moe_handle_t *handle) {
    return &moe->arrived[xccl_moe_parity(handle->dispatch_epoch)];
}

/* ---- what has arrived: fields and entries are read once, and checked ---- */

/* Fetches what `source` has for this member. */
static int fetch(xccl_moe_t *moe, const xccl_moe_handle_t *handle, int source) {
    const xccl_field_t *field = field_of(moe, handle, source);
    uint64_t offset = xccl_gas_read(&field->offset), count = xccl_gas_read(&field->count);
    uint64_t most = (uint64_t)(moe->config.num_max_tokens * moe->config.num_topk);
    if (count > most)
        return xccl_comm_fail_damaged(moe->comm, source, "count of entries", count, 0, most);
    uint64_t stage = stage_of(moe, handle), room = moe->layout.dispatch_scales - count * sizeof(xccl_moe_entry_t);
    if (offset - stage > room || offset % sizeof(xccl_moe_entry_t) != 0)
        return xccl_comm_fail_damaged(moe->comm, source, "offset of entries", offset, stage, stage + room);
    xccl_moe_listed_t listed = {.rank = source,
                                .entries = xccl_gas_at(moe->comm->world, moe->comm->ranks[source], offset),
                                .count = count,
                                .num_tokens = (uint64_t)moe->config.num_max_tokens};
    return xccl_moe_fetch(&moe->puller, arrived_with(moe, handle), source, &listed);
}

static int count_rows(xccl_moe_t *moe, xccl_moe_handle_t *handle, int32_t *out_num_recv_per_expert) {
    int status = XCCL_OK;
    for (int source = 0; source < moe->comm->size && status == XCCL_OK; source++)
        status = fetch(moe, handle, source);
    moe->broken |= status == XCCL_ERR_SYSTEM;
    if (status != XCCL_OK)
        return status;
    return xccl_moe_place(&moe->puller, arrived_with(moe, handle), moe->comm->size, handle->row_start,
                          out_num_recv_per_expert, &handle->num_recv);
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
    status = count_rows(moe, handle, out_num_recv_per_expert);
    if (status != XCCL_OK)
        return status;
    handle->phase = XCCL_MOE_COUNTED;
    *out_num_recv = handle->num_recv;
    return XCCL_OK;
}

/* The own rows first: they are in this core's cache. */
static void pull_all(xccl_moe_t *moe, const xccl_moe_handle_t *handle, const xccl_moe_rows_t *to) {
    for (int i = 0; i < moe->comm->size; i++) {
        int source = (moe->comm->rank + i) % moe->comm->size;
        const unsigned char *stage = xccl_gas_at(moe->comm->world, moe->comm->ranks[source], stage_of(moe, handle));
        bool quantized = moe->config.quant == XCCL_QUANT_INT8;
        xccl_moe_staged_t staged = {.rank = source,
                                    .rows = stage + moe->layout.dispatch_rows,
                                    .scales = quantized ? (const float *)(stage + moe->layout.dispatch_scales) : NULL};
        xccl_moe_pull(&moe->puller, arrived_with(moe, handle), source, &staged, handle->row_start, to);
    }
    xccl_kernel_stream_end();
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
                          .row_bytes = row_bytes,
                          .streamed = (unsigned char *)recv_x + cached};
    pull_all(moe, handle, &to);
    handle->pull_ns = xccl_now_ns() - started;
    int parity = xccl_moe_parity(handle->dispatch_epoch);
    xccl_moe_signal_all(moe, moe->layout.dispatch_done[parity], handle->dispatch_epoch);
    moe->dispatching[parity] = NULL;
    handle->phase = XCCL_MOE_RECEIVED;
    return xccl_race_leave(moe->comm, XCCL_RACE_DISPATCH, handle->dispatch_epoch, XCCL_RACE_ALL,
                           (xccl_race_buffers_t){.out = recv_x, .out_bytes = (uint64_t)handle->num_recv * row_bytes});
}
