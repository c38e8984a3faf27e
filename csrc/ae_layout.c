#include "ae.h"
#include "moe.h"
#include "sizes.h"
#include "status.h"

xccl_path_t xccl_ae_path(const xccl_ae_config_t *config) {
    if (config->path != XCCL_PATH_AUTO)
        return config->path;
    return config->num_attention_ranks < config->num_expert_ranks ? XCCL_PATH_TRAMPOLINE : XCCL_PATH_DIRECT;
}

static int check_config(const xccl_ae_config_t *config, const int32_t *owner) {
    const struct {
        const char *name;
        int64_t value, min, max;
    } numbers[] = {
        {"number of attention_ranks", config->num_attention_ranks, 1, XCCL_MAX_RANKS},
        {"number of expert_ranks", config->num_expert_ranks, 1, XCCL_MAX_RANKS},
        {"path", (int64_t)config->path, XCCL_PATH_AUTO, XCCL_PATH_TRAMPOLINE},
        {"first_trampoline", config->first_trampoline, 0, config->num_expert_ranks - 1},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (numbers[i].value < numbers[i].min || numbers[i].value > numbers[i].max)
            return xccl_fail(XCCL_ERR_USAGE, "AttentionExpert: %s is %lld, expected %lld to %lld", numbers[i].name,
                             (long long)numbers[i].value, (long long)numbers[i].min, (long long)numbers[i].max);
    return xccl_moe_check_config("AttentionExpert", &config->layer, config->num_expert_ranks, owner);
}

static void lay_out_metadata(xccl_sizes_t *sizes, const xccl_ae_config_t *config, bool direct, xccl_ae_layout_t *out) {
    const struct {
        uint64_t *array;
        uint64_t lines;
    } arrays[] = {
        {out->staged, direct ? 0 : out->num_slots},
        {out->arrived, (uint64_t)config->num_attention_ranks},
        {out->outputs, (uint64_t)config->num_expert_ranks},
        {out->read, out->num_hubs},
        {out->summed, direct ? 0 : 1},
    };
    uint64_t at = 0;
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
        for (int parity = 0; parity < XCCL_AE_PARITIES; parity++) {
            arrays[i].array[parity] = at;
            at = xccl_plus(sizes, at, arrays[i].lines * XCCL_LINE);
        }
    out->bytes.metadata = at;
}

/* In the worst routing every slot of every token is used. The entries for each expert rank begin on a line. */
static void lay_out_stage(xccl_sizes_t *sizes, const xccl_ae_config_t *config, xccl_ae_layout_t *out) {
    uint64_t num_experts = (uint64_t)config->num_expert_ranks, tokens = (uint64_t)config->layer.num_max_tokens;
    uint64_t choices = xccl_times(sizes, tokens, (uint64_t)config->layer.num_topk);
    uint64_t entries = xccl_times(sizes, choices, sizeof(xccl_moe_entry_t));
    uint64_t scales = config->layer.quant == XCCL_QUANT_INT8 ? xccl_times(sizes, tokens, sizeof(float)) : 0;
    out->stage_entries = xccl_whole_lines(sizes, num_experts * sizeof(xccl_ae_part_t));
    entries = xccl_plus(sizes, entries, num_experts * XCCL_LINE);
    out->stage_routing = xccl_whole_lines(sizes, xccl_plus(sizes, out->stage_entries, entries));
    choices = xccl_times(sizes, choices, sizeof(xccl_ae_choice_t));
    out->stage_scales = xccl_whole_lines(sizes, xccl_plus(sizes, out->stage_routing, choices));
    out->stage_rows = xccl_whole_lines(sizes, xccl_plus(sizes, out->stage_scales, scales));
    uint64_t rows = xccl_times(sizes, tokens, out->staged_bytes);
    out->stage_bytes = xccl_whole_pages(sizes, xccl_plus(sizes, out->stage_rows, rows));
}

static void lay_out_outputs(xccl_sizes_t *sizes, const xccl_ae_config_t *config, xccl_ae_layout_t *out) {
    uint64_t starts = xccl_times(sizes, (uint64_t)config->num_attention_ranks, out->max_local_experts);
    out->outputs_copy = xccl_whole_lines(sizes, xccl_times(sizes, starts, sizeof(uint64_t)));
    out->outputs_stage_bytes = xccl_whole_pages(sizes, xccl_plus(sizes, out->outputs_copy, out->max_recv_bytes));
}

static void lay_out_staging(xccl_sizes_t *sizes, const xccl_ae_config_t *config, bool direct, xccl_ae_layout_t *out) {
    lay_out_stage(sizes, config, out);
    lay_out_outputs(sizes, config, out);
    uint64_t result = xccl_times(sizes, (uint64_t)config->layer.num_max_tokens, out->row_bytes);
    out->result_stage_bytes = direct ? 0 : xccl_whole_pages(sizes, result);
    const struct {
        uint64_t *stage;
        uint64_t bytes;
    } stages[] = {
        {out->stages, xccl_times(sizes, out->num_slots, out->stage_bytes)},
        {out->outputs_stage, out->outputs_stage_bytes},
        {out->result_stage, out->result_stage_bytes},
    };
    uint64_t at = 0;
    for (size_t i = 0; i < sizeof stages / sizeof *stages; i++)
        for (int parity = 0; parity < XCCL_AE_PARITIES; parity++) {
            stages[i].stage[parity] = at;
            at = xccl_plus(sizes, at, stages[i].bytes);
        }
    out->bytes.staging = at;
}

int xccl_ae_layout(const xccl_ae_config_t *config, const int32_t *owner, xccl_ae_layout_t *out) {
    int status = check_config(config, owner);
    if (status != XCCL_OK)
        return status;
    const xccl_moe_config_t *layer = &config->layer;
    xccl_sizes_t sizes = {false};
    uint64_t attention = (uint64_t)config->num_attention_ranks, experts = (uint64_t)config->num_expert_ranks;
    uint64_t hidden = (uint64_t)layer->hidden;
    bool direct = xccl_ae_path(config) == XCCL_PATH_DIRECT;
    out->num_hubs = direct || attention < experts ? attention : experts;
    out->num_slots = (attention + out->num_hubs - 1) / out->num_hubs;
    out->max_local_experts = xccl_moe_most_experts(layer, config->num_expert_ranks, owner);
    out->row_bytes = xccl_times(&sizes, hidden, xccl_kernel_itemsize(layer->dtype));
    out->staged_bytes = xccl_whole_lines(&sizes, layer->quant == XCCL_QUANT_INT8 ? hidden : out->row_bytes);
    uint64_t max_rows = xccl_times(&sizes, (uint64_t)(layer->num_max_tokens * layer->num_topk), attention);
    out->max_recv_bytes = xccl_times(&sizes, max_rows, out->row_bytes);
    lay_out_metadata(&sizes, config, direct, out);
    lay_out_staging(&sizes, config, direct, out);
    out->bytes.pool = xccl_whole_pages(&sizes, xccl_times(&sizes, out->max_recv_bytes, XCCL_AE_POOL_BUFFERS));
    if (sizes.overflow)
        return xccl_fail(XCCL_ERR_USAGE,
                         "AttentionExpert: the buffers for %d attention ranks, %lld tokens a rank, top-%lld and hidden "
                         "%lld exceed the 62 bits of an address space: lower num_max_tokens_per_rank",
                         config->num_attention_ranks, (long long)layer->num_max_tokens, (long long)layer->num_topk,
                         (long long)layer->hidden);
    return XCCL_OK;
}

int xccl_ae_bytes(const xccl_ae_config_t *config, const int32_t *owner, xccl_moe_bytes_t *out) {
    xccl_ae_layout_t layout;
    int status = xccl_ae_layout(config, owner, &layout);
    if (status == XCCL_OK)
        *out = layout.bytes;
    return status;
}
