#include "ae.h"

#include <stdlib.h>
#include <string.h>

#include "status.h"
#include "wait.h"

/* Opening and closing a domain. */

static const char WHO[] = "AttentionExpert";

/* ---- tables ---- */

static bool allocate_batch(xccl_ae_t *ae, xccl_ae_batch_t *batch) {
    size_t num_attention = (size_t)ae->config.num_attention_ranks, num_experts = (size_t)ae->config.layer.num_experts;
    batch->row_start = malloc(num_attention * num_experts * sizeof *batch->row_start);
    batch->num_recv_per_expert = malloc(num_experts * sizeof *batch->num_recv_per_expert);
    batch->slot_tokens = malloc((size_t)ae->layout.num_slots * sizeof *batch->slot_tokens);
    return xccl_moe_arrived_new(&batch->arrived, ae->config.num_attention_ranks) && batch->row_start &&
           batch->num_recv_per_expert && batch->slot_tokens;
}

static int allocate_tables(xccl_ae_t *ae) {
    size_t num_experts = (size_t)ae->config.layer.num_experts, num_topk = (size_t)ae->config.layer.num_topk;
    size_t expert_ranks = (size_t)ae->config.num_expert_ranks;
    ae->ranks = malloc((size_t)ae->comm->size * sizeof *ae->ranks);
    ae->attention_ranks = malloc((size_t)ae->config.num_attention_ranks * sizeof *ae->attention_ranks);
    ae->expert_ranks = malloc(expert_ranks * sizeof *ae->expert_ranks);
    ae->owner = malloc(num_experts * sizeof *ae->owner);
    ae->local_index = malloc(num_experts * sizeof *ae->local_index);
    ae->num_experts_of = calloc(expert_ranks, sizeof *ae->num_experts_of);
    ae->puller.cursor = malloc(num_experts * sizeof *ae->puller.cursor);
    ae->puller.places = malloc(num_topk * sizeof *ae->puller.places);
    ae->parts = malloc(expert_ranks * sizeof *ae->parts);
    ae->next_entry = malloc(expert_ranks * sizeof *ae->next_entry);
    ae->expert_count = malloc(num_experts * sizeof *ae->expert_count);
    ae->outputs = malloc(expert_ranks * sizeof *ae->outputs);
    ae->terms = malloc(num_topk * sizeof *ae->terms);
    ae->term_weights = malloc(num_topk * sizeof *ae->term_weights);
    bool batches = allocate_batch(ae, &ae->batch[0]) && allocate_batch(ae, &ae->batch[1]);
    if (!batches || !ae->ranks || !ae->attention_ranks || !ae->expert_ranks || !ae->owner || !ae->local_index ||
        !ae->num_experts_of || !ae->puller.cursor || !ae->puller.places || !ae->parts || !ae->next_entry ||
        !ae->expert_count || !ae->outputs || !ae->terms || !ae->term_weights)
        return xccl_fail(XCCL_ERR_MEMORY, "rank %d has no memory for the tables of %zu experts", ae->rank, num_experts);
    return xccl_ae_link(ae);
}

static void free_tables(xccl_ae_t *ae) {
    free(ae->ranks);
    free(ae->attention_ranks);
    free(ae->expert_ranks);
    free(ae->owner);
    free(ae->local_index);
    free(ae->num_experts_of);
    free(ae->puller.cursor);
    free(ae->puller.places);
    free(ae->parts);
    free(ae->next_entry);
    free(ae->expert_count);
    free(ae->outputs);
    free((void *)ae->terms);
    free(ae->term_weights);
    for (int parity = 0; parity < XCCL_AE_PARITIES; parity++) {
        free(ae->batch[parity].row_start);
        free(ae->batch[parity].num_recv_per_expert);
        free(ae->batch[parity].slot_tokens);
        xccl_moe_arrived_free(&ae->batch[parity].arrived);
    }
}

/* Numbers each owner's experts in their order. */
static void index_experts(xccl_ae_t *ae, const int32_t *owner) {
    memcpy(ae->owner, owner, (size_t)ae->config.layer.num_experts * sizeof *owner);
    for (int64_t e = 0; e < ae->config.layer.num_experts; e++)
        ae->local_index[e] = (int32_t)ae->num_experts_of[owner[e]]++;
}

/* ---- who is who ---- */

static int index_of(const int32_t *ranks, int count, int rank) {
    for (int i = 0; i < count; i++)
        if (ranks[i] == rank)
            return i;
    return -1;
}

static int check_ranks(const xccl_comm_t *comm, const char *name, const int32_t *ranks, int count) {
    for (int i = 0; i < count; i++) {
        if (ranks[i] < 0 || ranks[i] >= comm->size)
            return xccl_fail(XCCL_ERR_USAGE, "%s: %s[%d] is %d, expected a rank from 0 to %d", WHO, name, i, ranks[i],
                             comm->size - 1);
        if (i > 0 && ranks[i] <= ranks[i - 1])
            return xccl_fail(XCCL_ERR_USAGE, "%s: %s[%d] is %d after %d, expected each rank once, ascending", WHO, name,
                             i, ranks[i], ranks[i - 1]);
    }
    return XCCL_OK;
}

static int check_roles(const xccl_comm_t *comm, const xccl_ae_config_t *config, const int32_t *attention_ranks,
                       const int32_t *expert_ranks) {
    int status = check_ranks(comm, "attention_ranks", attention_ranks, config->num_attention_ranks);
    if (status == XCCL_OK)
        status = check_ranks(comm, "expert_ranks", expert_ranks, config->num_expert_ranks);
    for (int i = 0; i < config->num_attention_ranks && status == XCCL_OK; i++)
        if (index_of(expert_ranks, config->num_expert_ranks, attention_ranks[i]) >= 0)
            status = xccl_fail(XCCL_ERR_USAGE, "%s: rank %d is among attention_ranks and expert_ranks, expected one",
                               WHO, attention_ranks[i]);
    return status;
}

static void take_roles(xccl_ae_t *ae, const int32_t *attention_ranks, const int32_t *expert_ranks) {
    int rank = ae->rank, num_attention = ae->config.num_attention_ranks;
    memcpy(ae->ranks, ae->comm->ranks, (size_t)ae->comm->size * sizeof *ae->ranks);
    memcpy(ae->attention_ranks, attention_ranks, (size_t)num_attention * sizeof *attention_ranks);
    memcpy(ae->expert_ranks, expert_ranks, (size_t)ae->config.num_expert_ranks * sizeof *expert_ranks);
    ae->attention = index_of(attention_ranks, num_attention, rank);
    ae->expert = index_of(expert_ranks, ae->config.num_expert_ranks, rank);
    ae->hub = -1;
    for (int hub = 0; hub < (int)ae->layout.num_hubs; hub++)
        if (xccl_ae_hub_member(ae, hub) == rank)
            ae->hub = hub;
}

static void describe_pulls(xccl_ae_t *ae) {
    ae->puller.operation = "a2e_recv";
    ae->puller.rank = ae->rank;
    ae->puller.kernel = ae->kernel;
    ae->puller.dtype = ae->config.layer.dtype;
    ae->puller.hidden = (uint64_t)ae->config.layer.hidden;
    ae->puller.staged_bytes = ae->layout.staged_bytes;
    ae->puller.num_topk = (uint64_t)ae->config.layer.num_topk;
    ae->puller.num_local = ae->expert < 0 ? 0 : ae->num_experts_of[ae->expert];
}

/* ---- open ---- */

static int agree(xccl_ae_t *ae, const xccl_ae_config_t *config, int64_t timeout_ns) {
    xccl_comm_t *comm = ae->comm;
    xccl_moe_terms_t terms = xccl_moe_terms(&config->layer, ae->owner);
    const int32_t numbers[] = {config->num_attention_ranks, config->num_expert_ranks, config->first_trampoline};
    terms.path = (int64_t)config->path;
    terms.ranks_hash = xccl_moe_hash(0, numbers, sizeof numbers);
    terms.ranks_hash = xccl_moe_hash(terms.ranks_hash, ae->attention_ranks,
                                     (size_t)config->num_attention_ranks * sizeof *ae->attention_ranks);
    terms.ranks_hash =
        xccl_moe_hash(terms.ranks_hash, ae->expert_ranks, (size_t)config->num_expert_ranks * sizeof *ae->expert_ranks);
    int64_t deadline = xccl_deadline(comm->world, timeout_ns);
    return xccl_comm_settle(comm, xccl_moe_agree(comm, WHO, &terms, deadline));
}

static int open_domain(xccl_ae_t *ae, const xccl_ae_config_t *config, const int32_t *attention_ranks,
                       const int32_t *expert_ranks, const int32_t *owner, int64_t timeout_ns) {
    int status = xccl_ae_layout(config, owner, &ae->layout);
    if (status == XCCL_OK)
        status = check_roles(ae->comm, config, attention_ranks, expert_ranks);
    if (status == XCCL_OK)
        status = xccl_moe_kernel(WHO, config->layer.simd, &ae->kernel);
    if (status == XCCL_OK)
        status = allocate_tables(ae);
    if (status != XCCL_OK)
        return status;
    index_experts(ae, owner);
    take_roles(ae, attention_ranks, expert_ranks);
    describe_pulls(ae);
    ae->cached_bytes = xccl_moe_cached_bytes(ae->world);
    status = xccl_op_begin(ae->world, XCCL_OP_AE_OPEN);
    if (status != XCCL_OK)
        return status;
    status = agree(ae, config, timeout_ns);
    if (status == XCCL_OK)
        status = xccl_moe_take_blocks(ae->comm, &ae->layout.bytes, timeout_ns, &ae->blocks);
    return status;
}

int xccl_ae_open(xccl_comm_t *comm, const xccl_ae_config_t *config, const int32_t *attention_ranks,
                 const int32_t *expert_ranks, const int32_t *owner, int64_t timeout_ns, xccl_ae_t **out) {
    int status = xccl_comm_check(comm);
    if (status != XCCL_OK)
        return status;
    xccl_ae_t *ae = calloc(1, sizeof *ae);
    if (!ae)
        return xccl_fail(XCCL_ERR_MEMORY, "rank %d has no memory for a domain", comm->rank);
    ae->comm = comm;
    ae->world = comm->world;
    ae->rank = comm->rank;
    ae->config = *config;
    ae->config.path = xccl_ae_path(config);
    status = open_domain(ae, config, attention_ranks, expert_ranks, owner, timeout_ns);
    if (status != XCCL_OK) {
        xccl_ae_discard(ae);
        return status;
    }
    *out = ae;
    return XCCL_OK;
}

void xccl_ae_pool(const xccl_ae_t *ae, uint64_t *out_offset, uint64_t *out_bytes) {
    *out_offset = ae->blocks.pool;
    *out_bytes = ae->layout.bytes.pool;
}

xccl_path_t xccl_ae_taken_path(const xccl_ae_t *ae) {
    return ae->config.path;
}

uint64_t xccl_ae_updates(const xccl_ae_t *ae) {
    return ae->updates;
}

/* ---- close ---- */

int xccl_ae_close(xccl_ae_t *ae, int keep_pool, int64_t timeout_ns) {
    xccl_comm_t *comm = ae->comm;
    int status = xccl_comm_check(comm);
    if (status != XCCL_OK)
        return status;
    int in_flight = (ae->batch[0].phase != XCCL_AE_IDLE) + (ae->batch[1].phase != XCCL_AE_IDLE);
    if (in_flight)
        return xccl_fail(XCCL_ERR_USAGE, "close on rank %d: %d micro-batches are in flight: complete them first",
                         comm->rank, in_flight);
    status = xccl_moe_give_blocks(comm, &ae->blocks, keep_pool, timeout_ns);
    if (status == XCCL_OK)
        xccl_ae_discard(ae);
    return status;
}

void xccl_ae_discard(xccl_ae_t *ae) {
    xccl_ae_unlink(ae);
    free_tables(ae);
    free(ae);
}
