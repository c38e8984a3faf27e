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
    xccl_op_begin(ae->world, XCCL_OP_A2E_RECV);
    batch->epoch = ae->epoch = epoch;
    batch->phase = XCCL_AE_RECEIVING;
    batch->forwarded = batch->summed = ae->hub < 0;
    batch->in_place = false;
    *out_batch = epoch;
    return xccl_ae_help(ae);
}

/* ---- counting ---- */

/* Where attention rank `index` has this rank's rows. */
static int find_source(const xccl_ae_t *ae, const xccl_ae_batch_t *batch, int index, xccl_moe_source_t *out) {
    const xccl_ae_layout_t *layout = &ae->layout;
    const xccl_field_t *field = xccl_ae_own_line(ae, layout->arrived[xccl_ae_parity(batch->epoch)], index);
    uint64_t offset = xccl_ae_word(&field->offset), count = xccl_ae_word(&field->count);
    uint64_t num_tokens = xccl_ae_word(&field->time);
    int member = ae->attention_ranks[index];
    uint64_t most = (uint64_t)ae->config.layer.num_max_tokens;
    if (num_tokens > most)
        return xccl_ae_damaged(ae, OPERATION, member, "the number of tokens", num_tokens, most);
    most = num_tokens * (uint64_t)ae->config.layer.num_topk;
    if (count > most)
        return xccl_ae_damaged(ae, OPERATION, member, "the number of entries", count, most);
    most = layout->stage_routing - count * sizeof(xccl_moe_entry_t);
    if (offset > most || offset % sizeof(xccl_moe_entry_t) != 0)
        return xccl_ae_damaged(ae, OPERATION, member, "the offset of the entries", offset, most);
    int hub = xccl_ae_arrived_by(ae, index);
    const unsigned char *stage =
        xccl_gas_at(ae->world, ae->ranks[hub], xccl_ae_stage(ae, batch->epoch, xccl_ae_slot_of(ae, index)));
    bool quantized = ae->config.layer.quant == XCCL_QUANT_INT8;
    *out = (xccl_moe_source_t){
        .rank = member,
        .entries = (const xccl_moe_entry_t *)(stage + offset),
        .num_entries = count,
        .num_tokens = num_tokens,
        .rows = stage + layout->stage_rows,
        .scales = quantized ? (const float *)(stage + layout->stage_scales) : NULL,
    };
    return XCCL_OK;
}

static int count_rows(xccl_ae_t *ae, xccl_ae_batch_t *batch) {
    uint64_t num_local = ae->puller.num_local;
    int num_sources = ae->config.num_attention_ranks, status = XCCL_OK;
    memset(batch->row_start, 0, (uint64_t)num_sources * num_local * sizeof *batch->row_start);
    for (int i = 0; i < num_sources && status == XCCL_OK; i++) {
        status = find_source(ae, batch, i, &batch->sources[i]);
        if (status == XCCL_OK)
            status = xccl_moe_count(&ae->puller, &batch->sources[i], batch->row_start + (uint64_t)i * num_local);
    }
    if (status != XCCL_OK)
        return status;
    return xccl_moe_place(&ae->puller, num_sources, batch->row_start, batch->num_recv_per_expert, &batch->num_recv);
}

static int wait_and_count(xccl_ae_t *ae, xccl_ae_batch_t *batch, int64_t deadline) {
    int status = xccl_ae_wait_forwarded(ae, batch, deadline);
    if (status != XCCL_OK)
        return status;
    xccl_op_phase(ae->world, 1);
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
        xccl_op_begin(ae->world, XCCL_OP_A2E_RECV);
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
static int pull_all(const xccl_ae_t *ae, const xccl_ae_batch_t *batch, const xccl_moe_rows_t *to) {
    int num_sources = ae->config.num_attention_ranks, status = XCCL_OK;
    for (int i = 0; i < num_sources && status == XCCL_OK; i++) {
        int index = (ae->expert + i) % num_sources;
        status = xccl_moe_pull(&ae->puller, &batch->sources[index],
                               batch->row_start + (uint64_t)index * ae->puller.num_local, to);
    }
    xccl_kernel_stream_end();
    return status;
}

static int note_received(const xccl_ae_t *ae, uint64_t epoch, const xccl_moe_rows_t *to) {
    for (int i = 0; i < ae->config.num_attention_ranks; i++)
        xccl_race_join(ae->comm, XCCL_RACE_A2E, epoch, ae->attention_ranks[i]);
    return xccl_race_touch(ae->world, to->x, to->num_rows * to->row_bytes, XCCL_RACE_WRITE, XCCL_OP_A2E_RECV);
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
                          .num_rows = (uint64_t)batch->num_recv,
                          .row_bytes = row_bytes,
                          .streamed = (unsigned char *)recv_x + ae->cached_bytes};
    status = pull_all(ae, batch, &to);
    if (status == XCCL_OK && !xccl_race_is_off(ae->world))
        status = note_received(ae, epoch, &to);
    if (status == XCCL_OK)
        batch->phase = XCCL_AE_RECEIVED;
    return status;
}
