#include "moe.h"
#include "sizes.h"
#include "status.h"

uint64_t xccl_moe_most_experts(const xccl_moe_config_t *config, int num_ranks, const int32_t *owner) {
    uint64_t count[XCCL_MAX_RANKS] = {0}, most = 0;
    for (int64_t e = 0; e < config->num_experts; e++)
        if (owner[e] >= 0)
            count[owner[e]]++;
    for (int rank = 0; rank < num_ranks; rank++)
        most = count[rank] > most ? count[rank] : most;
    return most;
}

int xccl_moe_check_config(const char *who, const xccl_moe_config_t *config, int num_ranks, const int32_t *owner) {
    const struct {
        const char *name;
        int64_t value, min, max;
    } numbers[] = {
        {"num_ranks", num_ranks, 1, XCCL_MAX_RANKS},
        {"num_experts", config->num_experts, 1, INT32_MAX},
        {"hidden", config->hidden, 1, INT64_MAX},
        {"num_topk", config->num_topk, 1, INT32_MAX},
        {"num_max_tokens_per_rank", config->num_max_tokens, 0, INT32_MAX},
        {"dtype", (int64_t)config->dtype, XCCL_FLOAT32, XCCL_BFLOAT16},
        {"quant", (int64_t)config->quant, XCCL_QUANT_NONE, XCCL_QUANT_INT8},
        {"simd", (int64_t)config->simd, XCCL_SIMD_AUTO, XCCL_SIMD_AVX512},
        {"on_missing", (int64_t)config->on_missing, XCCL_MISSING_RAISE, XCCL_MISSING_ZERO},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (numbers[i].value < numbers[i].min || numbers[i].value > numbers[i].max)
            return xccl_fail(XCCL_ERR_USAGE, "%s: %s is %lld, expected %lld to %lld", who, numbers[i].name,
                             (long long)numbers[i].value, (long long)numbers[i].min, (long long)numbers[i].max);
    if (config->num_max_tokens * config->num_topk > INT32_MAX)
        return xccl_fail(XCCL_ERR_USAGE, "%s: num_max_tokens_per_rank * num_topk is %lld, expected at most %d", who,
                         (long long)(config->num_max_tokens * config->num_topk), INT32_MAX);
    for (int64_t e = 0; e < config->num_experts; e++)
        if (owner[e] < -1 || owner[e] >= num_ranks)
            return xccl_fail(XCCL_ERR_USAGE, "%s: expert_map[%lld] is %d, expected a rank from 0 to %d, or -1 for none",
                             who, (long long)e, owner[e], num_ranks - 1);
    return XCCL_OK;
}

static void lay_out_metadata(xccl_sizes_t *sizes, int num_ranks, xccl_moe_layout_t *out) {
    uint64_t *const arrays[] = {out->dispatch_field, out->dispatch_done, out->combine_field, out->combine_done};
    uint64_t at = 0;
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
        for (int parity = 0; parity < XCCL_MOE_PARITIES; parity++) {
            arrays[i][parity] = at;
            at = xccl_plus(sizes, at, (uint64_t)num_ranks * XCCL_LINE);
        }
    out->bytes.metadata = at;
}

/* In the worst routing every slot is used. The entries for each destination begin on a line of their own. */
static void lay_out_dispatch_stage(xccl_sizes_t *sizes, const xccl_moe_config_t *config, uint64_t num_ranks,
                                   xccl_moe_layout_t *out) {
    uint64_t max_tokens = (uint64_t)config->num_max_tokens;
    uint64_t entries =
        xccl_times(sizes, xccl_times(sizes, max_tokens, (uint64_t)config->num_topk), sizeof(xccl_moe_entry_t));
    uint64_t scales = config->quant == XCCL_QUANT_INT8 ? xccl_times(sizes, max_tokens, sizeof(float)) : 0;
    out->dispatch_scales = xccl_whole_lines(sizes, xccl_plus(sizes, entries, xccl_times(sizes, num_ranks, XCCL_LINE)));
    out->dispatch_rows = xccl_whole_lines(sizes, xccl_plus(sizes, out->dispatch_scales, scales));
    out->dispatch_stage_bytes =
        xccl_whole_pages(sizes, xccl_plus(sizes, out->dispatch_rows, xccl_times(sizes, max_tokens, out->staged_bytes)));
}

static void lay_out_staging(xccl_sizes_t *sizes, const xccl_moe_config_t *config, uint64_t num_ranks,
                            xccl_moe_layout_t *out) {
    lay_out_dispatch_stage(sizes, config, num_ranks, out);
    uint64_t starts = xccl_times(sizes, xccl_times(sizes, num_ranks, out->max_local_experts), sizeof(uint64_t));
    out->combine_copy = xccl_whole_lines(sizes, starts);
    out->combine_stage_bytes = xccl_whole_pages(sizes, xccl_plus(sizes, out->combine_copy, out->max_recv_bytes));
    uint64_t at = 0;
    for (int parity = 0; parity < XCCL_MOE_PARITIES; parity++) {
        out->dispatch_stage[parity] = at;
        at = xccl_plus(sizes, at, out->dispatch_stage_bytes);
    }
    for (int parity = 0; parity < XCCL_MOE_PARITIES; parity++) {
        out->combine_stage[parity] = at;
        at = xccl_plus(sizes, at, out->combine_stage_bytes);
    }
    out->bytes.staging = at;
}

int xccl_moe_layout(const xccl_moe_config_t *config, int num_ranks, const int32_t *owner, xccl_moe_layout_t *out) {
    int status = xccl_moe_check_config("ExpertParallel", config, num_ranks, owner);
    if (status != XCCL_OK)
        return status;
    xccl_sizes_t sizes = {false};
    uint64_t hidden = (uint64_t)config->hidden;
    out->max_local_experts = xccl_moe_most_experts(config, num_ranks, owner);
    out->row_bytes = xccl_times(&sizes, hidden, xccl_kernel_itemsize(config->dtype));
    out->staged_bytes = xccl_whole_lines(&sizes, config->quant == XCCL_QUANT_INT8 ? hidden : out->row_bytes);
    uint64_t max_entries = (uint64_t)(config->num_max_tokens * config->num_topk);
    out->max_recv_bytes = xccl_times(&sizes, xccl_times(&sizes, max_entries, (uint64_t)num_ranks), out->row_bytes);
    lay_out_metadata(&sizes, num_ranks, out);
    lay_out_staging(&sizes, config, (uint64_t)num_ranks, out);
    out->bytes.pool = xccl_whole_pages(&sizes, xccl_times(&sizes, out->max_recv_bytes, XCCL_MOE_POOL_BUFFERS));
    if (sizes.overflow)
        return xccl_fail(
            XCCL_ERR_USAGE,
            "ExpertParallel: the buffers for %d ranks, %lld tokens a rank, top-%lld and hidden %lld exceed "
            "the 62 bits of an address space: lower num_max_tokens_per_rank",
            num_ranks, (long long)config->num_max_tokens, (long long)config->num_topk, (long long)config->hidden);
    return XCCL_OK;
}

int xccl_moe_bytes(const xccl_moe_config_t *config, int num_ranks, const int32_t *owner, xccl_moe_bytes_t *out) {
    xccl_moe_layout_t layout;
    int status = xccl_moe_layout(config, num_ranks, owner, &layout);
    if (status == XCCL_OK)
        *out = layout.bytes;
    return status;
}
