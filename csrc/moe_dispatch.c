#include "moe.h"

#include <string.h>

#include "status.h"
#include "wait.h"

/* ---- send half ---- */

/* Copies topk_idx to the handle, and counts: rows of each expert, entries and rows of each destination. */
static int count_slots(xccl_moe_t *moe, xccl_moe_handle_t *handle, const int64_t *topk_idx) {
    int64_t num_topk = moe->config.num_topk, num_experts = moe->config.num_experts;
    memset(moe->expert_count, 0, (size_t)num_experts * sizeof *moe->expert_count);
    for (int rank = 0; rank < moe->comm->size; rank++)
        moe->dest[rank] = (xccl_moe_dest_t){.last_token = -1};
    for (int64_t token = 0; token < handle->num_tokens; token++)
        for (int64_t slot = token * num_topk; slot < (token + 1) * num_topk; slot++) {
            int64_t expert = topk_idx[slot];
            if (expert < -1 || expert >= num_experts)
                return xccl_fail(XCCL_ERR_USAGE,
                                 "dispatch on rank %d: topk_idx[%lld, %lld] is %lld, expected an expert from 0 to "
                                 "%lld, or -1 for none",
                                 moe->comm->rank, (long long)token, (long long)(slot % num_topk), (long long)expert,
                                 (long long)num_experts - 1);
            handle->expert[slot] = (int32_t)expert;
            if (expert < 0)
                continue;
            handle->position[slot] = moe->expert_count[expert]++;
            xccl_moe_dest_t *dest = &moe->dest[moe->owner[expert]];
            dest->num_entries++;
            dest->num_rows += dest->last_token != token;
            dest->last_token = token;
        }
    return XCCL_OK;
}

/* Lays the parts behind each other and gives each expert its range of entries. Returns the bytes used. */
static uint64_t place_parts(xccl_moe_t *moe, uint64_t stage) {
    uint64_t at = 0;
    for (int rank = 0; rank < moe->comm->size; rank++) {
        xccl_moe_dest_t *dest = &moe->dest[rank];
        uint32_t begin = 0;
        for (uint64_t i = moe->first_of[rank]; i < moe->first_of[rank + 1]; i++) {
            moe->expert_begin[moe->by_owner[i]] = begin;
            begin += moe->expert_count[moe->by_owner[i]];
        }
        dest->part = xccl_moe_part(&moe->layout, moe->config.quant, xccl_moe_num_experts_of(moe, rank),
                                   dest->num_entries, dest->num_rows);
        dest->offset = stage + at;
        dest->last_token = -1;
        at += xccl_moe_lines(dest->part.bytes);
    }
    return at;
}

static void write_counts(xccl_moe_t *moe, int rank) {
    uint32_t *counts = xccl_gas_local(moe->comm->world, moe->dest[rank].offset);
    for (uint64_t i = moe->first_of[rank]; i < moe->first_of[rank + 1]; i++)
        *counts++ = moe->expert_count[moe->by_owner[i]];
}

/* A row that has been staged: further destinations get a copy of it, not a second quantisation. */
typedef struct staged_row_t {
    const unsigned char *row;
    float scale;
} staged_row_t;

static void stage_row(xccl_moe_t *moe, xccl_moe_dest_t *dest, const void *x, staged_row_t *staged) {
    unsigned char *part = xccl_gas_local(moe->comm->world, dest->offset);
    unsigned char *row = part + dest->part.rows + dest->next_row * moe->layout.staged_bytes;
    if (moe->config.quant == XCCL_QUANT_NONE) {
        memcpy(row, x, moe->layout.row_bytes);
    } else {
        size_t hidden = (size_t)moe->config.hidden;
        if (staged->row)
            memcpy(row, staged->row, hidden);
        else
            *staged = (staged_row_t){row, moe->kernel->quantize(moe->config.dtype, (int8_t *)row, x, hidden)};
        ((float *)(part + dest->part.scales))[dest->next_row] = staged->scale;
    }
    dest->next_row++;
}

static void stage_token(xccl_moe_t *moe, const xccl_moe_handle_t *handle, int64_t token, const void *x) {
    int64_t num_topk = moe->config.num_topk;
    staged_row_t staged = {NULL, 0};
    for (int64_t slot = token * num_topk; slot < (token + 1) * num_topk; slot++) {
        int32_t expert = handle->expert[slot];
        if (expert < 0)
            continue;
        xccl_moe_dest_t *dest = &moe->dest[moe->owner[expert]];
        if (dest->last_token != token)
            stage_row(moe, dest, x, &staged);
        dest->last_token = token;
        unsigned char *part = xccl_gas_local(moe->comm->world, dest->offset);
        xccl_moe_entry_t *entries = (xccl_moe_entry_t *)(part + dest->part.entries);
        entries[moe->expert_begin[expert] + handle->position[slot]] =
            (xccl_moe_entry_t){(uint32_t)token, (uint32_t)(dest->next_row - 1)};
    }
}

static void publish_parts(xccl_moe_t *moe, uint64_t epoch) {
    const xccl_comm_t *comm = moe->comm;
    uint64_t line = xccl_moe_line_of(moe, moe->layout.dispatch_field[xccl_moe_parity(epoch)], comm->rank);
    /* Starting with the next rank spreads the first pulls. The field's release makes the part visible with
     * it; its line is free: the destination has read epoch - 2, see the wait in send. */
    for (int i = 1; i <= comm->size; i++) {
        int rank = (comm->rank + i) % comm->size;
        const xccl_moe_dest_t *dest = &moe->dest[rank];
        xccl_gas_field_at(comm->world, comm->ranks[rank], line, epoch, dest->offset, dest->num_entries, dest->num_rows);
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
    uint64_t stage = moe->staging + moe->layout.dispatch_stage[parity];
    int status = count_slots(moe, handle, topk_idx);
    if (status != XCCL_OK)
        return status;
    if (epoch > XCCL_MOE_PARITIES) {
        status = xccl_moe_wait_all(moe, moe->layout.dispatch_done[parity], epoch - XCCL_MOE_PARITIES,
                                   "dispatch: receipt of the last but one", deadline);
        if (status != XCCL_OK)
            return status;
    }
    status = xccl_moe_reserve(moe, stage, place_parts(moe, stage), &moe->dispatch_reserved[parity]);
    if (status != XCCL_OK)
        return status;
    for (int rank = 0; rank < moe->comm->size; rank++)
        write_counts(moe, rank);
    for (int64_t token = 0; token < handle->num_tokens; token++)
        stage_token(moe, handle, token, (const char *)x + (uint64_t)token * moe->layout.row_bytes);
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
    xccl_op_begin(world, XCCL_OP_DISPATCH);
    xccl_moe_handle_t *handle = xccl_moe_handle_new(moe, num_tokens);
    if (!handle)
        return XCCL_ERR_MEMORY;
    handle->dispatch_epoch = epoch;
    status = stage_dispatch(moe, handle, x, topk_idx, xccl_deadline(world, timeout_ns));
    if (status != XCCL_OK) {
        xccl_moe_handle_free(handle);
        return status;
    }
    xccl_moe_keep_weights(moe, handle, topk_weights);
    publish_parts(moe, epoch);
    moe->dispatch_epoch = epoch;
    moe->dispatching[parity] = handle;
    *out = handle;
    return XCCL_OK;
}

/* ---- receive half ---- */

static const xccl_field_t *field_of(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, int source) {
    return xccl_moe_own_line(moe, moe->layout.dispatch_field[xccl_moe_parity(handle->dispatch_epoch)], source);
}

/* The part that `source` staged for this member. */
static const unsigned char *part_of(const xccl_moe_t *moe, const xccl_field_t *field, int source) {
    return xccl_gas_at(moe->comm->world, moe->comm->ranks[source], field->offset);
}

/* From the counts of all sources: rows of each local expert, and where each source's rows for it begin. */
static int count_rows(xccl_moe_t *moe, xccl_moe_handle_t *handle, int32_t *out_num_recv_per_expert) {
    uint64_t num_local = xccl_moe_num_experts_of(moe, moe->comm->rank), row = 0;
    for (uint64_t local = 0; local < num_local; local++) {
        uint64_t begin = row;
        for (int source = 0; source < moe->comm->size; source++) {
            const uint32_t *counts = (const uint32_t *)part_of(moe, field_of(moe, handle, source), source);
            handle->row_start[(uint64_t)source * num_local + local] = row;
            row += counts[local];
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
    xccl_op_begin(world, XCCL_OP_DISPATCH);
    xccl_op_phase(world, 1);
    status = xccl_moe_wait_all(moe, moe->layout.dispatch_field[xccl_moe_parity(handle->dispatch_epoch)],
                               handle->dispatch_epoch, "dispatch: tokens of this rank's experts",
                               xccl_deadline(world, timeout_ns));
    if (status == XCCL_OK)
        status = count_rows(moe, handle, out_num_recv_per_expert);
    if (status != XCCL_OK)
        return status;
    handle->phase = XCCL_MOE_COUNTED;
    *out_num_recv = handle->num_recv;
    return XCCL_OK;
}

/* Where pull writes. */
typedef struct received_t {
    unsigned char *x;
    float *scales;
    int32_t *src_rank;
    int32_t *src_token;
} received_t;

/* The rows of one source for one local expert, which follow each other in its entries and in the result. */
static void pull_group(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, int source, uint64_t count,
                       uint64_t first_row, const received_t *to) {
    const xccl_moe_layout_t *layout = &moe->layout;
    const xccl_moe_config_t *config = &moe->config;
    const xccl_field_t *field = field_of(moe, handle, source);
    const unsigned char *base = part_of(moe, field, source);
    xccl_moe_part_t part =
        xccl_moe_part(layout, config->quant, xccl_moe_num_experts_of(moe, moe->comm->rank), field->count, field->time);
    const xccl_moe_entry_t *entries = (const xccl_moe_entry_t *)(base + part.entries) + moe->cursor[source];
    const float *scales = (const float *)(base + part.scales);
    size_t hidden = (size_t)config->hidden;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t row = first_row + i;
        const unsigned char *staged = base + part.rows + entries[i].row * layout->staged_bytes;
        to->src_rank[row] = source;
        to->src_token[row] = (int32_t)entries[i].token;
        if (to->scales) {
            memcpy(to->x + row * hidden, staged, hidden);
            to->scales[row] = scales[entries[i].row];
        } else if (config->quant == XCCL_QUANT_INT8) {
            moe->kernel->dequantize(config->dtype, to->x + row * layout->row_bytes, (const int8_t *)staged,
                                    scales[entries[i].row], hidden);
        } else {
            memcpy(to->x + row * layout->row_bytes, staged, layout->row_bytes);
        }
    }
    moe->cursor[source] += count;
}

int xccl_moe_dispatch_pull(xccl_moe_t *moe, xccl_moe_handle_t *handle, void *recv_x, float *scales, int32_t *src_rank,
                           int32_t *src_token) {
    int status = xccl_moe_check(moe, handle, XCCL_MOE_COUNTED, "dispatch");
    if (status != XCCL_OK)
        return status;
    if (scales && moe->config.quant == XCCL_QUANT_NONE)
        return xccl_fail(XCCL_ERR_USAGE, "dispatch on rank %d: there are no scales without quant", moe->comm->rank);
    received_t to = {recv_x, scales, src_rank, src_token};
    int size = moe->comm->size;
    uint64_t num_local = xccl_moe_num_experts_of(moe, moe->comm->rank);
    memset(moe->cursor, 0, (size_t)size * sizeof *moe->cursor);
    for (uint64_t local = 0; local < num_local; local++)
        for (int source = 0; source < size; source++) {
            const uint32_t *counts = (const uint32_t *)part_of(moe, field_of(moe, handle, source), source);
            pull_group(moe, handle, source, counts[local], handle->row_start[(uint64_t)source * num_local + local],
                       &to);
        }
    int parity = xccl_moe_parity(handle->dispatch_epoch);
    xccl_moe_signal_all(moe, moe->layout.dispatch_done[parity], handle->dispatch_epoch);
    moe->dispatching[parity] = NULL;
    handle->phase = XCCL_MOE_RECEIVED;
    return XCCL_OK;
}
