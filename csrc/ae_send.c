#include <string.h>

#include "ae.h"
#include "racecheck.h"
#include "status.h"

/* A2E at an attention rank: tokens into the window of its hub. */

/* Checks topk_idx, and counts the entries for each expert rank. */
static int count_parts(xccl_ae_t *ae, int64_t num_tokens, const int64_t *topk_idx) {
    int64_t num_topk = ae->config.layer.num_topk, num_experts = ae->config.layer.num_experts;
    memset(ae->parts, 0, (size_t)ae->config.num_expert_ranks * sizeof *ae->parts);
    for (int64_t slot = 0; slot < num_tokens * num_topk; slot++) {
        int64_t expert = topk_idx[slot];
        if (expert < -1 || expert >= num_experts)
            return xccl_fail(XCCL_ERR_USAGE,
                             "a2e on rank %d: topk_idx[%lld, %lld] is %lld, expected an expert from 0 to %lld, or -1 "
                             "for none",
                             ae->rank, (long long)(slot / num_topk), (long long)(slot % num_topk), (long long)expert,
                             (long long)num_experts - 1);
        if (expert >= 0)
            ae->parts[ae->owner[expert]].count++;
    }
    return XCCL_OK;
}

/* Lays the entries for all expert ranks behind each other, and writes the table of the parts. */
static void place_parts(xccl_ae_t *ae, unsigned char *stage) {
    uint64_t at = ae->layout.stage_entries;
    for (int expert = 0; expert < ae->config.num_expert_ranks; expert++) {
        uint64_t bytes = ae->parts[expert].count * sizeof(xccl_moe_entry_t);
        ae->parts[expert].offset = at;
        ae->next_entry[expert] = (xccl_moe_entry_t *)(stage + at);
        at += (bytes + XCCL_LINE - 1) / XCCL_LINE * XCCL_LINE;
    }
    memcpy(stage, ae->parts, (size_t)ae->config.num_expert_ranks * sizeof *ae->parts);
}

/* What goes where, for the expert ranks and for the hub. */
static void write_routing(xccl_ae_t *ae, unsigned char *stage, int64_t num_tokens, const int64_t *topk_idx,
                          const float *topk_weights) {
    xccl_ae_choice_t *choice = (xccl_ae_choice_t *)(stage + ae->layout.stage_routing);
    int64_t num_topk = ae->config.layer.num_topk;
    memset(ae->expert_count, 0, (size_t)ae->config.layer.num_experts * sizeof *ae->expert_count);
    for (int64_t token = 0; token < num_tokens; token++)
        for (int64_t slot = token * num_topk; slot < (token + 1) * num_topk; slot++, choice++) {
            int32_t expert = (int32_t)topk_idx[slot];
            /* a plain sum is one with weights of 1: the same bits */
            *choice = (xccl_ae_choice_t){.expert = expert, .weight = topk_weights ? topk_weights[slot] : 1.0f};
            if (expert < 0)
                continue;
            choice->position = ae->expert_count[expert]++;
            *ae->next_entry[ae->owner[expert]]++ =
                (xccl_moe_entry_t){(uint32_t)token, (uint32_t)ae->local_index[expert]};
        }
}

static bool is_routed(const xccl_ae_t *ae, const int64_t *topk_idx, int64_t token) {
    int64_t num_topk = ae->config.layer.num_topk;
    for (int64_t slot = token * num_topk; slot < (token + 1) * num_topk; slot++)
        if (topk_idx[slot] >= 0)
            return true;
    return false;
}

/* One copy a token, whoever will pull it. */
static void write_rows(const xccl_ae_t *ae, unsigned char *stage, const unsigned char *x, int64_t num_tokens,
                       const int64_t *topk_idx) {
    const xccl_ae_layout_t *layout = &ae->layout;
    float *scales = (float *)(stage + layout->stage_scales);
    for (int64_t token = 0; token < num_tokens; token++) {
        if (!is_routed(ae, topk_idx, token))
            continue;
        const unsigned char *from = x + (uint64_t)token * layout->row_bytes;
        unsigned char *to = stage + layout->stage_rows + (uint64_t)token * layout->staged_bytes;
        if (ae->config.layer.quant == XCCL_QUANT_INT8)
            scales[token] =
                ae->kernel->quantize(ae->config.layer.dtype, (int8_t *)to, from, (size_t)ae->config.layer.hidden);
        else
            memcpy(to, from, layout->row_bytes);
    }
}

static int check_a2e(const xccl_ae_t *ae, const xccl_ae_batch_t *batch, int64_t num_tokens) {
    int status = xccl_ae_check_attention(ae, "a2e");
    if (status != XCCL_OK)
        return status;
    if (num_tokens < 0 || num_tokens > ae->config.layer.num_max_tokens)
        return xccl_fail(XCCL_ERR_USAGE,
                         "a2e on rank %d: x has %lld tokens, expected at most num_max_tokens_per_rank = %lld", ae->rank,
                         (long long)num_tokens, (long long)ae->config.layer.num_max_tokens);
    if (batch->phase != XCCL_AE_IDLE)
        return xccl_fail(XCCL_ERR_USAGE,
                         "a2e on rank %d: two micro-batches are in flight already: call e2a for the first", ae->rank);
    return XCCL_OK;
}

/* Pages for the tokens at the hub, and for the sums that come back here. */
static int reserve(xccl_ae_t *ae, int hub, uint64_t stage, int parity, int64_t num_tokens) {
    uint64_t bytes = ae->layout.stage_rows + (uint64_t)num_tokens * ae->layout.staged_bytes;
    int status = xccl_ae_reserve(ae, hub, stage, bytes, &ae->reserved[parity]);
    if (status != XCCL_OK || xccl_ae_is_direct(ae))
        return status;
    return xccl_ae_reserve(ae, ae->rank, ae->blocks.staging + ae->layout.result_stage[parity],
                           (uint64_t)num_tokens * ae->layout.row_bytes, &ae->result_reserved[parity]);
}

int xccl_ae_a2e(xccl_ae_t *ae, const void *x, int64_t num_tokens, const int64_t *topk_idx, const float *topk_weights,
                uint64_t *out_batch) {
    xccl_world_t *world = ae->world;
    uint64_t epoch = ae->epoch + 1;
    int parity = xccl_ae_parity(epoch);
    xccl_ae_batch_t *batch = &ae->batch[parity];
    int status = check_a2e(ae, batch, num_tokens);
    if (status != XCCL_OK)
        return status;
    status = xccl_op_begin(world, XCCL_OP_A2E);
    if (status != XCCL_OK)
        return status;
    int hub = xccl_ae_arrived_by(ae, ae->attention), slot = xccl_ae_slot_of(ae, ae->attention);
    uint64_t stage = xccl_ae_stage(ae, epoch, slot);
    status = count_parts(ae, num_tokens, topk_idx);
    if (status == XCCL_OK)
        status = reserve(ae, hub, stage, parity, num_tokens);
    if (status == XCCL_OK)
        status = xccl_race_enter(ae->comm, XCCL_RACE_A2E, epoch,
                                 (xccl_race_buffers_t){.x = x, .x_bytes = (uint64_t)num_tokens * ae->layout.row_bytes});
    if (status != XCCL_OK)
        return status;
    unsigned char *at = xccl_gas_at(world, ae->ranks[hub], stage);
    place_parts(ae, at);
    write_routing(ae, at, num_tokens, topk_idx, topk_weights);
    write_rows(ae, at, x, num_tokens, topk_idx);
    if (xccl_ae_is_direct(ae))
        xccl_ae_tell_experts(ae, epoch, ae->attention, (uint64_t)num_tokens);
    else
        xccl_ae_publish(ae, hub, xccl_ae_line(ae, ae->layout.staged[parity], slot), epoch, 0, (uint64_t)num_tokens, 0);
    ae->epoch = epoch;
    batch->epoch = epoch;
    batch->phase = XCCL_AE_SENT;
    batch->num_tokens = num_tokens;
    *out_batch = epoch;
    return XCCL_OK;
}
