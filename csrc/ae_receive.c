#include <string.h>

#include "ae.h"
#include "racecheck.h"
#include "status.h"
#include "wait.h"

/* A2E at an expert rank: pulling, as in dispatch. */

static const char OPERATION[] = "a2e_recv";

int xccl_ae_recv_begin(xccl_ae_t *ae, uint64_t *out_batch) {
    int status = xccl_ae_check_expert(ae, OPERATION);
    if (status != XCCL_OK)
        return status;
    uint64_t epoch = ae->epoch + 1;
    xccl_ae_batch_t *batch = &ae->batch[xccl_ae_parity(epoch)];
    if (batch->phase != XCCL_AE_IDLE)
        return xccl_fail(XCCL_ERR_USAGE,
                         "a2e_recv on rank %d: two micro-batches of this domain are in flight already: complete the "
                         "e2a_send of the first",
                         ae->rank);
    status = xccl_op_begin(ae->world, XCCL_OP_A2E_RECV);
    if (status != XCCL_OK)
        return status;
    batch->epoch = ae->epoch = epoch;
    batch->phase = XCCL_AE_RECEIVING;
    batch->forwarded = batch->summed = ae->hub < 0;
    batch->in_place = false;
    *out_batch = epoch;
    return xccl_ae_help(ae);
}

/* The stage of attention rank `index`, in the window of its hub. */
static const unsigned char *stage_of(const xccl_ae_t *ae, const xccl_ae_batch_t *batch, int index) {
    int hub = xccl_ae_arrived_by(ae, index);
    return xccl_gas_at(ae->world, ae->ranks[hub], xccl_ae_stage(ae, batch->epoch, xccl_ae_slot_of(ae, index)));
}

/* ---- counting ---- */

/* Fetches what attention rank `index` has for this rank. */
static int fetch(xccl_ae_t *ae, xccl_ae_batch_t *batch, int index) {
    const xccl_ae_layout_t *layout = &ae->layout;
    const xccl_field_t *field = xccl_ae_own_line(ae, layout->arrived[xccl_ae_parity(batch->epoch)], index);
    uint64_t offset = xccl_gas_read(&field->offset), count = xccl_gas_read(&field->count);
    uint64_t num_tokens = xccl_gas_read(&field->time);
    int member = ae->attention_ranks[index];
    uint64_t most = (uint64_t)ae->config.layer.num_max_tokens;
    if (num_tokens > most)
        return xccl_ae_damaged(ae, OPERATION, member, "number of tokens", num_tokens, 0, most);
    most = num_tokens * (uint64_t)ae->config.layer.num_topk;
    if (count > most)
        return xccl_ae_damaged(ae, OPERATION, member, "number of entries", count, 0, most);
    most = layout->stage_routing - count * sizeof(xccl_moe_entry_t);
    if (offset < layout->stage_entries || offset > most || offset % sizeof(xccl_moe_entry_t) != 0)
        return xccl_ae_damaged(ae, OPERATION, member, "offset of entries", offset, layout->stage_entries, most);
    xccl_moe_listed_t listed = {
        .rank = member, .entries = stage_of(ae, batch, index) + offset, .count = count, .num_tokens = num_tokens};
    int status = xccl_moe_fetch(&ae->puller, &batch->arrived, index, &listed);
    ae->broken |= status == XCCL_ERR_SYSTEM;
    return status;
}

static int count_rows(xccl_ae_t *ae, xccl_ae_batch_t *batch) {
    int num_sources = ae->config.num_attention_ranks, status = XCCL_OK;
    for (int index = 0; index < num_sources && status == XCCL_OK; index++)
        status = fetch(ae, batch, index);
    if (status != XCCL_OK)
        return status;
    return xccl_moe_place(&ae->puller, &batch->arrived, num_sources, batch->row_start, batch->num_recv_per_expert,
                          &batch->num_recv);
}

static int wait_and_count(xccl_ae_t *ae, xccl_ae_batch_t *batch, int64_t deadline) {
    int status = xccl_ae_wait_forwarded(ae, batch, deadline);
    if (status == XCCL_OK)
        status = xccl_op_phase(ae->world, 1);
    if (status != XCCL_OK)
        return status;
    xccl_ae_lines_t arrived = {.ae = ae,
                               .array = ae->layout.arrived[xccl_ae_parity(batch->epoch)],
                               .count = ae->config.num_attention_ranks,
                               .epoch = batch->epoch,
                               .writer = xccl_ae_arrived_by,
                               .what = "a2e: tokens of this rank's experts"};
    status = xccl_ae_wait(&arrived, deadline);
    if (status == XCCL_OK)
        status = count_rows(ae, batch);
    if (status == XCCL_OK)
        batch->phase = XCCL_AE_COUNTED;
    return status;
}

int xccl_ae_recv_wait(xccl_ae_t *ae, uint64_t epoch, int64_t timeout_ns, int64_t *out_num_recv,
                      int32_t *out_num_recv_per_expert) {
    xccl_ae_batch_t *batch = NULL;
    int status = xccl_ae_check_expert(ae, OPERATION);
    /* counted already if its rows could not be pulled to where the caller wanted them */
    bool counted = status == XCCL_OK && ae->batch[xccl_ae_parity(epoch)].phase == XCCL_AE_COUNTED;
    if (status == XCCL_OK)
        status = xccl_ae_find(ae, epoch, counted ? XCCL_AE_COUNTED : XCCL_AE_RECEIVING, OPERATION, &batch);
    if (status == XCCL_OK && !counted) {
        status = xccl_op_begin(ae->world, XCCL_OP_A2E_RECV);
        if (status == XCCL_OK)
            status = wait_and_count(ae, batch, xccl_deadline(ae->world, timeout_ns));
    }
    if (status != XCCL_OK)
        return status;
    *out_num_recv = batch->num_recv;
    memcpy(out_num_recv_per_expert, batch->num_recv_per_expert, ae->puller.num_local * sizeof(int32_t));
    return XCCL_OK;
}

/* ---- pulling ---- */

/* Expert ranks begin with different sources. */
static void pull_all(const xccl_ae_t *ae, const xccl_ae_batch_t *batch, const xccl_moe_rows_t *to) {
    int num_sources = ae->config.num_attention_ranks;
    bool quantized = ae->config.layer.quant == XCCL_QUANT_INT8;
    for (int i = 0; i < num_sources; i++) {
        int index = (ae->expert + i) % num_sources;
        const unsigned char *stage = stage_of(ae, batch, index);
        xccl_moe_staged_t staged = {.rank = ae->attention_ranks[index],
                                    .rows = stage + ae->layout.stage_rows,
                                    .scales = quantized ? (const float *)(stage + ae->layout.stage_scales) : NULL};
        xccl_moe_pull(&ae->puller, &batch->arrived, index, &staged, batch->row_start, to);
    }
    xccl_kernel_stream_end();
}

static int note_received(const xccl_ae_t *ae, uint64_t epoch, const void *recv_x, uint64_t bytes) {
    for (int i = 0; i < ae->config.num_attention_ranks; i++)
        xccl_race_join(ae->comm, XCCL_RACE_A2E, epoch, ae->attention_ranks[i]);
    return xccl_race_touch(ae->world, recv_x, bytes, XCCL_RACE_WRITE, XCCL_OP_A2E_RECV);
}

int xccl_ae_recv_pull(xccl_ae_t *ae, uint64_t epoch, void *recv_x, float *scales, int32_t *src_rank,
                      int32_t *src_token) {
    xccl_ae_batch_t *batch;
    int status = xccl_ae_check_expert(ae, OPERATION);
    if (status == XCCL_OK)
        status = xccl_ae_find(ae, epoch, XCCL_AE_COUNTED, OPERATION, &batch);
    if (status != XCCL_OK)
        return status;
    if (scales && ae->config.layer.quant == XCCL_QUANT_NONE)
        return xccl_fail(XCCL_ERR_USAGE, "a2e_recv on rank %d: there are no scales without quant", ae->rank);
    uint64_t row_bytes = scales ? (uint64_t)ae->config.layer.hidden : ae->layout.row_bytes;
    xccl_moe_rows_t to = {.x = recv_x,
                          .scales = scales,
                          .src_rank = src_rank,
                          .src_token = src_token,
                          .row_bytes = row_bytes,
                          .streamed = (unsigned char *)recv_x + ae->cached_bytes};
    pull_all(ae, batch, &to);
    batch->phase = XCCL_AE_RECEIVED;
    if (xccl_race_is_off(ae->world))
        return XCCL_OK;
    return note_received(ae, epoch, recv_x, (uint64_t)batch->num_recv * row_bytes);
}
