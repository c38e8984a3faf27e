#include "moe.h"

#include <stdlib.h>
#include <string.h>

#include "status.h"
#include "wait.h"

/* ---- checks ---- */

static const char *const PHASES[] = {
    [XCCL_MOE_SENT] = "its dispatch has not completed: call the hook of dispatch_async first",
    [XCCL_MOE_COUNTED] = "its dispatch has not completed: call the hook of dispatch_async first",
    [XCCL_MOE_RECEIVED] = "its dispatch has completed and no combine has used it yet",
    [XCCL_MOE_COMBINING] = "a combine that is in flight uses it already",
    [XCCL_MOE_SUMMED] = "a combine that is in flight uses it already",
    [XCCL_MOE_COMBINED] = "a combine has used it already: dispatch again",
};

int xccl_moe_check(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, xccl_moe_phase_t phase,
                   const char *operation) {
    int status = xccl_comm_check(moe->comm);
    if (status != XCCL_OK)
        return status;
    if (moe->broken)
        return xccl_fail(XCCL_ERR_USAGE,
                         "%s on rank %d: an earlier operation of this group failed halfway, its members no longer "
                         "agree: open a new one on all ranks",
                         operation, moe->comm->rank);
    if (!handle)
        return XCCL_OK;
    if (handle->moe != moe)
        return xccl_fail(XCCL_ERR_USAGE, "%s on rank %d: the handle is of another group", operation, moe->comm->rank);
    if (handle->phase != phase)
        return xccl_fail(XCCL_ERR_USAGE, "%s on rank %d: cannot use the handle of dispatch %llu: %s", operation,
                         moe->comm->rank, (unsigned long long)handle->dispatch_epoch, PHASES[handle->phase]);
    return XCCL_OK;
}

/* ---- waiting for the lines of all peers ---- */

typedef struct all_lines_t {
    const xccl_moe_t *moe;
    uint64_t array;
    uint64_t epoch;
    const char *what;
    int arrived; /* peers below this one have arrived; epochs only grow, so they need no second look */
} all_lines_t;

static uint64_t epoch_of(const all_lines_t *wait, int peer) {
    /* acquire, see xccl_gas_load: the peer's data and fields are visible once its epoch is */
    return xccl_gas_load(xccl_moe_own_line(wait->moe, wait->array, peer));
}

static bool all_arrived(void *arg) {
    all_lines_t *wait = arg;
    while (wait->arrived < wait->moe->comm->size && epoch_of(wait, wait->arrived) >= wait->epoch)
        wait->arrived++;
    return wait->arrived == wait->moe->comm->size;
}

static bool awaited_line(void *arg, int index, xccl_awaited_t *out) {
    all_lines_t *wait = arg;
    for (int peer = wait->arrived; peer < wait->moe->comm->size; peer++) {
        uint64_t seen = epoch_of(wait, peer);
        if (seen >= wait->epoch || index-- > 0)
            continue;
        *out = (xccl_awaited_t){wait->moe->comm->ranks[peer], wait->epoch, seen, wait->what};
        return true;
    }
    return false;
}

int xccl_moe_wait_all(xccl_moe_t *moe, uint64_t array, uint64_t epoch, const char *what, int64_t deadline) {
    all_lines_t lines = {moe, array, epoch, what, 0};
    xccl_wait_t wait = {all_arrived, awaited_line, &lines};
    return xccl_wait(moe->comm->world, &wait, deadline);
}

void xccl_moe_signal_all(xccl_moe_t *moe, uint64_t array, uint64_t epoch) {
    const xccl_comm_t *comm = moe->comm;
    uint64_t line = xccl_moe_line_of(moe, array, comm->rank);
    /* release, see xccl_gas_signal_at: earlier loads from the peer's stage are done before it may write there
     */
    for (int i = 1; i <= comm->size; i++)
        xccl_gas_signal_at(comm->world, comm->ranks[(comm->rank + i) % comm->size], line, epoch);
}

/* ---- memory ---- */

int xccl_moe_reserve(xccl_moe_t *moe, uint64_t stage, uint64_t bytes, uint64_t *reserved) {
    if (bytes <= *reserved)
        return XCCL_OK;
    int status = xccl_heap_commit(moe->comm->world, stage + *reserved, bytes - *reserved);
    if (status == XCCL_OK)
        *reserved = bytes;
    return status;
}

xccl_moe_handle_t *xccl_moe_handle_new(const xccl_moe_t *moe, int64_t num_tokens) {
    size_t slots = (size_t)(num_tokens * moe->config.num_topk);
    size_t starts = (size_t)moe->comm->size * xccl_moe_num_local(moe);
    size_t row_start = xccl_moe_lines(sizeof(xccl_moe_handle_t)), expert = row_start + starts * sizeof(uint64_t);
    size_t position = expert + slots * sizeof(int32_t), weights = position + slots * sizeof(uint32_t);
    char *memory = malloc(weights + slots * sizeof(float));
    if (!memory) {
        xccl_fail(XCCL_ERR_MEMORY, "rank %d has no memory for the handle of %lld tokens", moe->comm->rank,
                  (long long)num_tokens);
        return NULL;
    }
    xccl_moe_handle_t *handle = (xccl_moe_handle_t *)memory;
    *handle = (xccl_moe_handle_t){
        .moe = moe,
        .num_tokens = num_tokens,
        .num_topk = moe->config.num_topk,
        .on_missing = moe->config.on_missing,
        .row_start = (uint64_t *)(memory + row_start),
        .expert = (int32_t *)(memory + expert),
        .position = (uint32_t *)(memory + position),
        .weights = (float *)(memory + weights),
    };
    return handle;
}

void xccl_moe_keep_weights(const xccl_moe_t *moe, xccl_moe_handle_t *handle, const float *topk_weights) {
    handle->weighted = topk_weights != NULL;
    if (topk_weights)
        memcpy(handle->weights, topk_weights,
               (size_t)(handle->num_tokens * moe->config.num_topk) * sizeof *topk_weights);
}

void xccl_moe_handle_free(xccl_moe_handle_t *handle) {
    free(handle);
}

/* ---- open ---- */

static int allocate_tables(xccl_moe_t *moe) {
    size_t num_experts = (size_t)moe->config.num_experts, size = (size_t)moe->comm->size;
    size_t num_topk = (size_t)moe->config.num_topk;
    moe->owner = malloc(num_experts * sizeof *moe->owner);
    moe->route = malloc(num_experts * sizeof *moe->route);
    moe->alive = malloc(size * sizeof *moe->alive);
    moe->local_index = malloc(num_experts * sizeof *moe->local_index);
    moe->num_experts_of = calloc(size, sizeof *moe->num_experts_of);
    moe->dest = malloc(size * sizeof *moe->dest);
    moe->expert_count = malloc(num_experts * sizeof *moe->expert_count);
    moe->quantized = malloc((size_t)moe->config.hidden);
    moe->puller.cursor = malloc(num_experts * sizeof *moe->puller.cursor);
    moe->puller.places = malloc(num_topk * sizeof *moe->puller.places);
    moe->outputs = malloc(size * sizeof *moe->outputs);
    moe->terms = malloc(num_topk * sizeof *moe->terms);
    moe->term_weights = malloc(num_topk * sizeof *moe->term_weights);
    bool arrived = xccl_moe_arrived_new(&moe->arrived[0], moe->comm->size) &&
                   xccl_moe_arrived_new(&moe->arrived[1], moe->comm->size);
    if (!arrived || !moe->owner || !moe->route || !moe->alive || !moe->local_index || !moe->num_experts_of ||
        !moe->dest || !moe->expert_count || !moe->quantized || !moe->puller.cursor || !moe->puller.places ||
        !moe->outputs || !moe->terms || !moe->term_weights)
        return xccl_fail(XCCL_ERR_MEMORY, "rank %d has no memory for the tables of %zu experts", moe->comm->rank,
                         num_experts);
    return XCCL_OK;
}

static void free_tables(xccl_moe_t *moe) {
    free(moe->owner);
    free(moe->route);
    free(moe->alive);
    free(moe->local_index);
    free(moe->num_experts_of);
    free(moe->dest);
    free(moe->expert_count);
    free(moe->quantized);
    free(moe->puller.cursor);
    free(moe->puller.places);
    free(moe->outputs);
    free((void *)moe->terms);
    free(moe->term_weights);
    for (int parity = 0; parity < XCCL_MOE_PARITIES; parity++)
        xccl_moe_arrived_free(&moe->arrived[parity]);
}

/* Numbers each owner's experts in their order. All owners are alive. */
static void index_experts(xccl_moe_t *moe, const int32_t *owner) {
    memcpy(moe->owner, owner, (size_t)moe->config.num_experts * sizeof *owner);
    for (int64_t e = 0; e < moe->config.num_experts; e++)
        moe->local_index[e] = owner[e] < 0 ? -1 : (int32_t)moe->num_experts_of[owner[e]]++;
    memset(moe->alive, true, (size_t)moe->comm->size * sizeof *moe->alive);
    xccl_moe_route(moe);
}

static void describe_pulls(xccl_moe_t *moe) {
    moe->puller.operation = "dispatch";
    moe->puller.rank = moe->comm->rank;
    moe->puller.kernel = moe->kernel;
    moe->puller.dtype = moe->config.dtype;
    moe->puller.hidden = (uint64_t)moe->config.hidden;
    moe->puller.staged_bytes = moe->layout.staged_bytes;
    moe->puller.num_topk = (uint64_t)moe->config.num_topk;
    moe->puller.num_local = xccl_moe_num_local(moe);
}

static int open_group(xccl_moe_t *moe, const int32_t *owner, int64_t timeout_ns) {
    xccl_comm_t *comm = moe->comm;
    int status = xccl_moe_layout(&moe->config, comm->size, owner, &moe->layout);
    if (status != XCCL_OK)
        return status;
    status = xccl_moe_kernel("ExpertParallel", moe->config.simd, &moe->kernel);
    if (status == XCCL_OK)
        status = allocate_tables(moe);
    if (status != XCCL_OK)
        return status;
    index_experts(moe, owner);
    describe_pulls(moe);
    moe->cached_bytes = xccl_moe_cached_bytes(comm->world);
    status = xccl_op_begin(comm->world, XCCL_OP_EP_OPEN);
    if (status != XCCL_OK)
        return status;
    xccl_moe_terms_t terms = xccl_moe_terms(&moe->config, owner);
    int64_t deadline = xccl_deadline(comm->world, timeout_ns);
    status = xccl_comm_settle(comm, xccl_moe_agree(comm, "ExpertParallel", &terms, deadline));
    if (status != XCCL_OK)
        return status;
    return xccl_moe_take_blocks(comm, &moe->layout.bytes, timeout_ns, &moe->blocks);
}

int xccl_moe_open(xccl_comm_t *comm, const xccl_moe_config_t *config, const int32_t *owner, int64_t timeout_ns,
                  xccl_moe_t **out) {
    int status = xccl_comm_check(comm);
    if (status != XCCL_OK)
        return status;
    xccl_moe_t *moe = calloc(1, sizeof *moe);
    if (!moe)
        return xccl_fail(XCCL_ERR_MEMORY, "rank %d has no memory for a group", comm->rank);
    moe->comm = comm;
    moe->config = *config;
    status = open_group(moe, owner, timeout_ns);
    if (status != XCCL_OK) {
        xccl_moe_discard(moe);
        return status;
    }
    *out = moe;
    return XCCL_OK;
}

void xccl_moe_pool(const xccl_moe_t *moe, uint64_t *out_offset, uint64_t *out_bytes) {
    *out_offset = moe->blocks.pool;
    *out_bytes = moe->layout.bytes.pool;
}

/* ---- close ---- */

int xccl_moe_close(xccl_moe_t *moe, int keep_pool, int64_t timeout_ns) {
    xccl_comm_t *comm = moe->comm;
    int status = xccl_comm_check(comm);
    if (status != XCCL_OK)
        return status;
    int in_flight = 0;
    for (int parity = 0; parity < XCCL_MOE_PARITIES; parity++)
        in_flight += (moe->dispatching[parity] != NULL) + (moe->combining[parity] != NULL);
    if (in_flight)
        return xccl_fail(XCCL_ERR_USAGE, "close on rank %d: %d operations are in flight: call their hooks first",
                         comm->rank, in_flight);
    status = xccl_moe_give_blocks(comm, &moe->blocks, keep_pool, timeout_ns);
    if (status == XCCL_OK)
        xccl_moe_discard(moe);
    return status;
}

void xccl_moe_discard(xccl_moe_t *moe) {
    free_tables(moe);
    free(moe);
}
