#include "moe_open.h"

#include <stdlib.h>
#include <string.h>

#include "cache.h"
#include "status.h"
#include "wait.h"

/* ---- agreement ---- */

uint32_t xccl_moe_hash(uint32_t hash, const void *data, size_t bytes) {
    hash ^= 0x811c9dc5u;
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ ((const unsigned char *)data)[i]) * 0x01000193u;
    return hash;
}

xccl_moe_terms_t xccl_moe_terms(const xccl_moe_config_t *config, const int32_t *owner) {
    return (xccl_moe_terms_t){
        .num_experts = config->num_experts,
        .hidden = config->hidden,
        .num_topk = config->num_topk,
        .num_max_tokens = config->num_max_tokens,
        .dtype = (int64_t)config->dtype,
        .quant = (int64_t)config->quant,
        .map_hash = xccl_moe_hash(0, owner, (size_t)config->num_experts * sizeof *owner),
    };
}

static int compare_member(const xccl_comm_t *comm, const char *who, int rank, const xccl_moe_terms_t *mine,
                          const xccl_moe_terms_t *theirs) {
    const struct {
        const char *name;
        int64_t mine, theirs;
    } numbers[] = {
        {"num_experts", mine->num_experts, theirs->num_experts},
        {"hidden", mine->hidden, theirs->hidden},
        {"num_topk", mine->num_topk, theirs->num_topk},
        {"num_max_tokens_per_rank", mine->num_max_tokens, theirs->num_max_tokens},
        {"dtype (0 float32, 1 float16, 2 bfloat16)", mine->dtype, theirs->dtype},
        {"quant (0 None, 1 int8)", mine->quant, theirs->quant},
        {"path (0 auto, 1 direct, 2 trampoline)", mine->path, theirs->path},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (numbers[i].mine != numbers[i].theirs)
            return xccl_fail(
                XCCL_ERR_USAGE, "%s: %s is %lld on rank %d and %lld on rank %d, it must be equal on all ranks", who,
                numbers[i].name, (long long)numbers[i].mine, comm->rank, (long long)numbers[i].theirs, rank);
    if (mine->ranks_hash != theirs->ranks_hash)
        return xccl_fail(
            XCCL_ERR_USAGE,
            "%s: attention_ranks or expert_ranks differ between rank %d and rank %d, they must be equal on "
            "all ranks",
            who, comm->rank, rank);
    if (mine->map_hash != theirs->map_hash)
        return xccl_fail(XCCL_ERR_USAGE,
                         "%s: expert_map differs between rank %d and rank %d, it must be equal on all ranks", who,
                         comm->rank, rank);
    return XCCL_OK;
}

int xccl_moe_agree(xccl_comm_t *comm, const char *who, const xccl_moe_terms_t *mine, int64_t deadline) {
    unsigned char *all = malloc((size_t)comm->size * XCCL_AGREE_BYTES);
    if (!all)
        return xccl_fail(XCCL_ERR_MEMORY, "rank %d has no memory to open a group of %d", comm->rank, comm->size);
    int status = xccl_comm_agree(comm, mine, all, deadline);
    for (int rank = 0; rank < comm->size && status == XCCL_OK; rank++) {
        xccl_moe_terms_t theirs;
        memcpy(&theirs, all + (size_t)rank * XCCL_AGREE_BYTES, sizeof theirs);
        status = compare_member(comm, who, rank, mine, &theirs);
    }
    free(all);
    return status;
}

/* True if any member wants to keep the pool. */
static int agree_on_pool(xccl_comm_t *comm, int keep_pool, int64_t deadline, bool *out_keep) {
    unsigned char record[XCCL_AGREE_BYTES] = {keep_pool != 0};
    unsigned char *all = malloc((size_t)comm->size * XCCL_AGREE_BYTES);
    if (!all)
        return xccl_fail(XCCL_ERR_MEMORY, "rank %d has no memory to close a group of %d", comm->rank, comm->size);
    int status = xccl_comm_agree(comm, record, all, deadline);
    bool keep = false;
    for (int rank = 0; rank < comm->size && status == XCCL_OK; rank++)
        keep |= all[(size_t)rank * XCCL_AGREE_BYTES] != 0;
    free(all);
    *out_keep = keep;
    return status;
}

/* ---- what is local ---- */

int xccl_moe_kernel(const char *who, xccl_simd_t simd, const xccl_kernel_t **out) {
    const xccl_kernel_t *kernel = xccl_kernel_get(simd);
    if (!kernel)
        return xccl_fail(XCCL_ERR_USAGE,
                         "%s: this processor lacks the vector instructions asked for (XCCL_SIMD=%s): use auto", who,
                         simd == XCCL_SIMD_AVX2 ? "avx2" : "avx512");
    *out = kernel;
    return XCCL_OK;
}

uint64_t xccl_moe_cached_bytes(const xccl_world_t *world) {
    return xccl_cache_bytes() / 4 / (uint64_t)world->size;
}

/* ---- memory ---- */

int xccl_moe_take_blocks(xccl_comm_t *comm, const xccl_moe_bytes_t *bytes, int64_t timeout_ns, xccl_moe_blocks_t *out) {
    const struct {
        xccl_area_t area;
        uint64_t bytes;
        int flags;
        uint64_t *offset;
    } blocks[] = {
        {XCCL_AREA_META, bytes->metadata, XCCL_HEAP_COMMIT, &out->metadata},
        {XCCL_AREA_MANAGED, bytes->staging, XCCL_HEAP_ADDRESS_ONLY, &out->staging},
        {XCCL_AREA_MANAGED, bytes->pool, XCCL_HEAP_ADDRESS_ONLY, &out->pool},
    };
    for (int i = 0; i < 3; i++) {
        int status = xccl_heap_alloc(comm, blocks[i].area, blocks[i].bytes, blocks[i].flags, (uint64_t)i, timeout_ns,
                                     blocks[i].offset);
        if (status == XCCL_OK)
            continue;
        /* unless the members have lost step, it failed on all alike and all give back what they had */
        while (i-- > 0 && !comm->broken)
            xccl_heap_free(comm, blocks[i].area, *blocks[i].offset, timeout_ns);
        return status;
    }
    return XCCL_OK;
}

int xccl_moe_give_blocks(xccl_comm_t *comm, const xccl_moe_blocks_t *blocks, int keep_pool, int64_t timeout_ns) {
    bool keep = false;
    int status = xccl_comm_settle(comm, agree_on_pool(comm, keep_pool, xccl_deadline(comm->world, timeout_ns), &keep));
    /* xccl_heap_free returns when all members have come: nobody pulls from the blocks any more */
    if (status == XCCL_OK && !keep)
        status = xccl_heap_free(comm, XCCL_AREA_MANAGED, blocks->pool, timeout_ns);
    if (status == XCCL_OK)
        status = xccl_heap_free(comm, XCCL_AREA_MANAGED, blocks->staging, timeout_ns);
    if (status == XCCL_OK)
        status = xccl_heap_free(comm, XCCL_AREA_META, blocks->metadata, timeout_ns);
    return status;
}
