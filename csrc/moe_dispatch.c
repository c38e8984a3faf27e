#include "moe.h"

#include <string.h>

#include "status.h"
#include "wait.h"

/* Copies topk_idx to the handle, and counts the rows of each expert and the entries of each destination. Experts
 * without a live rank get nothing. */
static int count_slots(xccl_moe_t *moe, xccl_moe_handle_t *handle, const int64_t *topk_idx) {
    int64_t num_topk = moe->config.num_topk, num_experts = moe->config.num_experts;
    memset(moe->expert_count, 0, (size_t)num_experts * sizeof *moe->expert_count);
    for (int rank = 0; rank < moe->comm->size; rank++)
        moe->dest[rank].num_entries = 0;
    for (int64_t slot = 0; slot < handle->num_tokens * num_topk; slot++) {
        int64_t expert = topk_idx[slot];
        if (expert < -1 || expert >= num_experts)
            return xccl_fail(XCCL_ERR_USAGE,
                             "dispatch on rank %d: topk_idx[%lld, %lld] is %lld, expected an expert from 0 to "
                             "%lld, or -1 for none",
                             moe->comm->rank, (long long)(slot / num_topk), (long long)(slot % num_topk),
                             (long long)expert, (long long)num_experts - 1);
        handle->expert[slot] = (int32_t)expert;
        if (expert < 0)
            continue;
        int32_t rank = moe->route[expert];
        if (rank < 0) {
            handle->expert[slot] = xccl_moe_missed((int32_t)expert);
            handle->num_missing++;
            continue;
        }
        handle->position[slot] = moe->expert_count[expert]++;
        moe->dest[rank].num_entries++;
    }
    return XCCL_OK;
}

/* Lays the entries of all destinations behind each other. */
static void place_entries(xccl_moe_t *moe, uint64_t stage) {
    uint64_t at = stage;
    for (int rank = 0; rank < moe->comm->size; rank++) {
        xccl_moe_dest_t *dest = &moe->dest[rank];
        dest->offset = at;
        dest->next = xccl_gas_local(moe->comm->world, at);
        at += xccl_moe_lines(dest->num_entries * sizeof(xccl_moe_entry_t));
    }
}

/* Tells the destinations of a token about it. False if it has none. */
static bool write_entries(xccl_moe_t *moe, const xccl_moe_handle_t *handle, int64_t token) {
    const int32_t *experts = handle->expert + token * moe->config.num_topk;
    bool any = false;
    for (int64_t slot = 0; slot < moe->config.num_topk; slot++) {
        int32_t expert = experts[slot];
        if (expert < 0)
            continue;
        any = true;
        *moe->dest[moe->owner[expert]].next++ = (xccl_moe_entry_t){(uint32_t)token, (uint32_t)moe->local_index[expert]};
    }
    return any;
}

/* Quantises a row; returns its scale. */
static float stage_quantized(const xccl_moe_t *moe, unsigned char *to, const unsigned char *x) {
    size_t hidden = (size_t)moe->config.hidden;
    if (!moe->streams)
        return moe->kernel->quantize(moe->config.dtype, (int8_t *)to, x, hidden);
    float scale = moe->kernel->quantize(moe->config.dtype, moe->quantized, x, hidden);
    moe->kernel->stream(to, moe->quantized, hidden);
    return scale;
}

static void stage_rows(xccl_moe_t *moe, const xccl_moe_handle_t *handle, uint64_t stage, const unsigned char *x) {
    const xccl_moe_layout_t *layout = &moe->layout;
    unsigned char *rows = xccl_gas_local(moe->comm->world, stage + layout->dispatch_rows);
    float *scales = xccl_gas_local(moe->comm->world, stage + layout->dispatch_scales);
    for (int64_t token = 0; token < handle->num_tokens; token++) {
        if (!write_entries(moe, handle, token))
            continue;
        const unsigned char *from = x + (uint64_t)token * layout->row_bytes;
        unsigned char *to = rows + (uint64_t)token * layout->staged_bytes;
        if (moe->config.quant == XCCL_QUANT_INT8)
            scales[token] = stage_quantized(moe, to, from);
        else if (moe->streams)
            moe->kernel->stream(to, from, layout->row_bytes);
        else
            memcpy(to, from, layout->row_bytes);
    }
    xccl_kernel_stream_end(); /* the release of the field does not order what was streamed */
}

static void publish_entries(xccl_moe_t *moe, uint64_t epoch) {
    const xccl_comm_t *comm = moe->comm;
    uint64_t line = xccl_moe_line_of(moe, moe->layout.dispatch_field[xccl_moe_parity(epoch)], comm->rank);
    /* Starting with the next rank spreads the first pulls. The field's release makes entries, scales and rows visible
     * with it; its line is free: the destination has read epoch - 2, see the wait in send. */
    for (int i = 1; i <= comm->size; i++) {
        int rank = (comm->rank + i) % comm->size;
        const xccl_moe_dest_t *dest = &moe->dest[rank];
        xccl_gas_field_at(comm->world, comm->ranks[rank], line, epoch, dest->offset, dest->num_entries, 0);
    }
}

static int check_send(const xccl_moe_t *moe, int64_t num_tokens, int parity) {
    int status = xccl_moe_check(moe, NULL, XCCL_MOE_SENT, "dispatch");
    if (status != XCCL_OK)
        return status;
    if (num_tokens < 0 || num_tokens > moe->config.num_max_tokens)
        return xccl_fail(XCCL_ERR_USAGE,
                         "dispatch on rank %d: x has %lld tokens, expected at most num_max_tokens_per_rank = %lld",
                         moe->comm->rank, (long long)num_tokens, (long long)moe->config.num_max_tokens);
    if (moe->dispatching[parity])
        return xccl_fail(XCCL_ERR_USAGE,
                         "dispatch on rank %d: two dispatches are in flight already: call the hook of the first",
                         moe->comm->rank);
    return XCCL_OK;
}

/* Everything up to the moment at which peers see the dispatch: until then nothing has happened if it fails.
 */
static int stage_dispatch(xccl_moe_t *moe, xccl_moe_handle_t *handle, const void *x, const int64_t *topk_idx,
                          int64_t deadline) {
    uint64_t epoch = handle->dispatch_epoch;
    int parity = xccl_moe_parity(epoch);
    uint64_t stage = moe->blocks.staging + moe->layout.dispatch_stage[parity];
    int status = count_slots(moe, handle, topk_idx);
    if (status != XCCL_OK)
        return status;
    if (epoch > XCCL_MOE_PARITIES) {
        status = xccl_moe_wait_all(moe, moe->layout.dispatch_done[parity], epoch - XCCL_MOE_PARITIES,
                                   "dispatch: receipt of the last but one", deadline);
        if (status != XCCL_OK)
            return status;
    }
    uint64_t bytes = moe->layout.dispatch_rows + (uint64_t)handle->num_tokens * moe->layout.staged_bytes;
    status = xccl_moe_reserve(moe, stage, bytes, &moe->dispatch_reserved[parity]);
    if (status != XCCL_OK)
        return status;
    place_entries(moe, stage);
    stage_rows(moe, handle, stage, x);
    return XCCL_OK;
}

int xccl_moe_dispatch_send(xccl_moe_t *moe, const void *x, int64_t num_tokens, const int64_t *topk_idx,
                           const float *topk_weights, int64_t timeout_ns, xccl_moe_handle_t **out) {
    uint64_t epoch = moe->dispatch_epoch + 1;
    int parity = xccl_moe_parity(epoch);
    int status = check_send(moe, num_tokens, parity);
    if (status != XCCL_OK)
        return status;
    xccl_world_t *world = moe->comm->world;
    status = xccl_op_begin(world, XCCL_OP_DISPATCH);
    if (status != XCCL_OK)
        return status;
    xccl_moe_handle_t *handle = xccl_moe_handle_new(moe, num_tokens);
    if (!handle)
        return XCCL_ERR_MEMORY;
    handle->dispatch_epoch = epoch;
    status = stage_dispatch(moe, handle, x, topk_idx, xccl_deadline(world, timeout_ns));
    if (status != XCCL_OK) {
        xccl_moe_handle_free(handle);
        return status;
    }
    status = xccl_race_enter(moe->comm, XCCL_RACE_DISPATCH, epoch,
                             (xccl_race_buffers_t){.x = x, .x_bytes = (uint64_t)num_tokens * moe->layout.row_bytes});
    if (status != XCCL_OK) {
        xccl_moe_handle_free(handle);
        return status;
    }
    xccl_moe_keep_weights(moe, handle, topk_weights);
    publish_entries(moe, epoch);
    moe->dispatch_epoch = epoch;
    moe->dispatching[parity] = handle;
    *out = handle;
    return XCCL_OK;
}
