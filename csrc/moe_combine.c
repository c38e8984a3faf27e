#include "moe.h"

#include <string.h>

#include "moe_outputs.h"
#include "status.h"
#include "wait.h"

/* ---- send half ---- */

/* Tells every source where its rows begin in y, for each expert of this member. */
static void write_row_starts(xccl_moe_t *moe, const xccl_moe_handle_t *handle, uint64_t stage) {
    uint64_t num_local = xccl_moe_num_local(moe);
    uint64_t *table = xccl_gas_local(moe->comm->world, stage);
    for (int source = 0; source < moe->comm->size; source++)
        memcpy(table + (uint64_t)source * moe->layout.max_local_experts,
               handle->row_start + (uint64_t)source * num_local, num_local * sizeof *table);
}

/* Peers can add up the elements of y where they lie. */
static bool is_aligned(const xccl_moe_t *moe, const void *y, uint64_t row_stride) {
    return ((uintptr_t)y | row_stride) % xccl_kernel_itemsize(moe->config.dtype) == 0;
}

/* y as peers find it: an offset in the own window. */
typedef struct published_t {
    uint64_t offset;
    uint64_t row_stride;
} published_t;

/* Everything up to the moment at which peers see the combine: until then nothing has happened if it fails. */
static int stage_combine(xccl_moe_t *moe, xccl_moe_handle_t *handle, const void *y, uint64_t row_stride,
                         int64_t deadline, published_t *out) {
    xccl_world_t *world = moe->comm->world;
    uint64_t epoch = moe->combine_epoch + 1;
    int parity = xccl_moe_parity(epoch);
    uint64_t stage = moe->blocks.staging + moe->layout.combine_stage[parity];
    if (epoch > XCCL_MOE_PARITIES) {
        int status = xccl_moe_wait_all(moe, moe->layout.combine_done[parity], epoch - XCCL_MOE_PARITIES,
                                       "combine: receipt of the last but one", deadline);
        if (status != XCCL_OK)
            return status;
    }
    uint64_t in_place_offset = 0;
    uint64_t num_rows = (uint64_t)handle->num_recv, row_bytes = moe->layout.row_bytes;
    uint64_t extent = xccl_moe_extent(num_rows, row_stride, row_bytes);
    handle->in_place =
        extent > 0 && is_aligned(moe, y, row_stride) && xccl_gas_is_symmetric(world, y, extent, &in_place_offset);
    uint64_t copy_bytes = handle->in_place ? 0 : num_rows * row_bytes;
    int status = xccl_moe_reserve(moe, stage, moe->layout.combine_copy + copy_bytes, &moe->combine_reserved[parity]);
    if (status != XCCL_OK)
        return status;
    write_row_starts(moe, handle, stage);
    *out = (published_t){in_place_offset, handle->num_recv > 1 ? row_stride : moe->layout.row_bytes};
    if (!handle->in_place) {
        *out = (published_t){stage + moe->layout.combine_copy, moe->layout.row_bytes};
        xccl_moe_copy_rows(xccl_gas_local(world, out->offset), y, num_rows, row_stride, row_bytes);
    }
    return XCCL_OK;
}

static int check_combine(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, uint64_t row_stride) {
    int status = xccl_moe_check(moe, handle, XCCL_MOE_RECEIVED, "combine");
    if (status != XCCL_OK)
        return status;
    if (row_stride < moe->layout.row_bytes && handle->num_recv > 1)
        return xccl_fail(XCCL_ERR_USAGE, "combine on rank %d: rows of y are %llu bytes apart, expected at least %llu",
                         moe->comm->rank, (unsigned long long)row_stride, (unsigned long long)moe->layout.row_bytes);
    if (moe->combining[xccl_moe_parity(moe->combine_epoch + 1)])
        return xccl_fail(XCCL_ERR_USAGE,
                         "combine on rank %d: two combines are in flight already: call the hook of the first",
                         moe->comm->rank);
    return XCCL_OK;
}

int xccl_moe_combine_send(xccl_moe_t *moe, xccl_moe_handle_t *handle, const void *y, uint64_t row_stride,
                          const float *topk_weights, int64_t timeout_ns) {
    int status = check_combine(moe, handle, row_stride);
    if (status != XCCL_OK)
        return status;
    const xccl_comm_t *comm = moe->comm;
    status = xccl_op_begin(comm->world, XCCL_OP_COMBINE);
    if (status != XCCL_OK)
        return status;
    published_t published;
    status = stage_combine(moe, handle, y, row_stride, xccl_deadline(comm->world, timeout_ns), &published);
    if (status == XCCL_OK)
        status = xccl_moe_note_rows(comm->world, y, (uint64_t)handle->num_recv, row_stride, moe->layout.row_bytes,
                                    XCCL_OP_COMBINE);
    if (status != XCCL_OK)
        return status;
    xccl_race_publish(comm, XCCL_RACE_COMBINE, moe->combine_epoch + 1);
    if (topk_weights)
        xccl_moe_keep_weights(moe, handle, topk_weights);
    uint64_t epoch = ++moe->combine_epoch;
    handle->combine_epoch = epoch;
    handle->phase = XCCL_MOE_COMBINING;
    moe->combining[xccl_moe_parity(epoch)] = handle;
    /* the field's release makes y and the row starts visible with it; its line is free, see stage_combine */
    uint64_t line = xccl_moe_line_of(moe, moe->layout.combine_field[xccl_moe_parity(epoch)], comm->rank);
    for (int i = 1; i <= comm->size; i++)
        xccl_gas_field_at(comm->world, comm->ranks[(comm->rank + i) % comm->size], line, epoch, published.offset,
                          handle->dispatch_epoch, published.row_stride);
    return XCCL_OK;
}

/* ---- receive half ---- */

static const xccl_field_t *field_of(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, int rank) {
    return xccl_moe_own_line(moe, moe->layout.combine_field[xccl_moe_parity(handle->combine_epoch)], rank);
}

/* Whether what `rank` says of its y can be followed: where it begins, and how far apart its rows are. */
static int check_place(const xccl_moe_t *moe, int rank, uint64_t offset, uint64_t row_stride) {
    const xccl_world_t *world = moe->comm->world;
    uint64_t row_bytes = moe->layout.row_bytes, itemsize = xccl_kernel_itemsize(moe->config.dtype);
    uint64_t most = world->stride - row_bytes;
    if (offset > most || offset % itemsize != 0)
        return xccl_comm_fail_damaged(moe->comm, rank, "offset of outputs", offset, 0, most);
    if (row_stride < row_bytes || row_stride > world->stride || row_stride % itemsize != 0)
        return xccl_comm_fail_damaged(moe->comm, rank, "distance of output rows", row_stride, row_bytes, world->stride);
    return XCCL_OK;
}

/* Reads the field of `rank`, once. All members must combine the same dispatch: otherwise rows would be added to the
 * wrong tokens. */
static int find_outputs(xccl_moe_t *moe, const xccl_moe_handle_t *handle, int rank) {
    const xccl_field_t *field = field_of(moe, handle, rank);
    uint64_t theirs = xccl_gas_read(&field->count), offset = xccl_gas_read(&field->offset);
    uint64_t row_stride = xccl_gas_read(&field->time);
    if (theirs != handle->dispatch_epoch) {
        moe->broken = true;
        return xccl_fail(XCCL_ERR_USAGE,
                         "combine on rank %d: rank %d combines the handle of dispatch %llu, this rank that of dispatch "
                         "%llu: all ranks must combine their handles in the same order",
                         moe->comm->rank, rank, (unsigned long long)theirs, (unsigned long long)handle->dispatch_epoch);
    }
    int status = check_place(moe, rank, offset, row_stride);
    if (status != XCCL_OK)
        return status;
    const xccl_world_t *world = moe->comm->world;
    uint64_t stage = moe->blocks.staging + moe->layout.combine_stage[xccl_moe_parity(handle->combine_epoch)];
    const unsigned char *window = xccl_gas_at(world, moe->comm->ranks[rank], 0);
    const uint64_t *row_start = (const uint64_t *)(window + stage);
    moe->outputs[rank] = (xccl_moe_outputs_t){
        .y = window + offset,
        .row_stride = row_stride,
        .num_rows = (world->stride - offset - moe->layout.row_bytes) / row_stride + 1,
        .row_start = row_start + (uint64_t)moe->comm->rank * moe->layout.max_local_experts,
    };
    return XCCL_OK;
}

/* The output of one slot's expert, in the memory of its rank; NULL and an error if it says that it lies elsewhere. */
static const void *term_of(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, int64_t slot) {
    int32_t expert = handle->expert[slot], rank = moe->owner[expert];
    const xccl_moe_outputs_t *outputs = &moe->outputs[rank];
    uint64_t row = xccl_gas_read(&outputs->row_start[moe->local_index[expert]]) + handle->position[slot];
    if (__builtin_expect(row >= outputs->num_rows, 0)) {
        xccl_comm_fail_damaged(moe->comm, rank, "row of an output", row, 0, outputs->num_rows - 1);
        return NULL;
    }
    return outputs->y + row * outputs->row_stride;
}

static int sum_token(xccl_moe_t *moe, const xccl_moe_handle_t *handle, int64_t token, void *out) {
    int64_t num_topk = moe->config.num_topk;
    size_t num_terms = 0;
    for (int64_t slot = token * num_topk; slot < (token + 1) * num_topk; slot++)
        if (handle->expert[slot] >= 0) {
            moe->terms[num_terms] = term_of(moe, handle, slot);
            if (!moe->terms[num_terms])
                return XCCL_ERR_SYSTEM;
            moe->term_weights[num_terms++] = handle->weighted ? handle->weights[slot] : 1.0f;
        }
    bool weighted = handle->weighted;
    if (handle->num_missing && handle->on_missing == XCCL_MISSING_RENORMALIZE)
        weighted |= xccl_moe_renormalize(handle, token, moe->term_weights, num_terms);
    moe->kernel->weighted_sum(moe->config.dtype, out, moe->terms, weighted ? moe->term_weights : NULL, num_terms,
                              (size_t)moe->config.hidden);
    return XCCL_OK;
}

static int sum_all(xccl_moe_t *moe, xccl_moe_handle_t *handle, void *out, int64_t deadline) {
    int parity = xccl_moe_parity(handle->combine_epoch);
    int status = xccl_op_phase(moe->comm->world, 1);
    if (status == XCCL_OK)
        status = xccl_moe_wait_all(moe, moe->layout.combine_field[parity], handle->combine_epoch,
                                   "combine: outputs of the experts", deadline);
    for (int rank = 0; rank < moe->comm->size && status == XCCL_OK; rank++)
        status = find_outputs(moe, handle, rank);
    int64_t started = xccl_now_ns();
    for (int64_t token = 0; token < handle->num_tokens && status == XCCL_OK; token++)
        status = sum_token(moe, handle, token, (char *)out + (uint64_t)token * moe->layout.row_bytes);
    if (status != XCCL_OK) {
        moe->broken |= status == XCCL_ERR_SYSTEM;
        return status;
    }
    xccl_moe_learn(moe, handle, handle->pull_ns + xccl_now_ns() - started);
    xccl_moe_signal_all(moe, moe->layout.combine_done[parity], handle->combine_epoch);
    handle->phase = XCCL_MOE_SUMMED;
    return XCCL_OK;
}

int xccl_moe_combine_wait(xccl_moe_t *moe, xccl_moe_handle_t *handle, void *out, int64_t timeout_ns) {
    bool summed = handle->phase == XCCL_MOE_SUMMED; /* an earlier call ran out of time behind the sum */
    int status = xccl_moe_check(moe, handle, summed ? XCCL_MOE_SUMMED : XCCL_MOE_COMBINING, "combine");
    if (status != XCCL_OK)
        return status;
    xccl_world_t *world = moe->comm->world;
    int64_t deadline = xccl_deadline(world, timeout_ns);
    status = xccl_op_begin(world, XCCL_OP_COMBINE);
    if (status == XCCL_OK && !summed)
        status = sum_all(moe, handle, out, deadline);
    int parity = xccl_moe_parity(handle->combine_epoch);
    if (status == XCCL_OK && handle->in_place) {
        status = xccl_op_phase(world, 2);
        if (status == XCCL_OK)
            status = xccl_moe_wait_all(moe, moe->layout.combine_done[parity], handle->combine_epoch,
                                       "combine: this rank's outputs read", deadline);
    }
    if (status != XCCL_OK)
        return status;
    moe->combining[parity] = NULL;
    handle->phase = XCCL_MOE_COMBINED;
    status = xccl_race_leave(
        moe->comm, XCCL_RACE_COMBINE, handle->combine_epoch, XCCL_RACE_ALL,
        (xccl_race_buffers_t){.out = out, .out_bytes = (uint64_t)handle->num_tokens * moe->layout.row_bytes});
    /* only now: the peers have all that they wait for */
    return status == XCCL_OK && handle->num_missing ? xccl_moe_judge(moe, handle) : status;
}
