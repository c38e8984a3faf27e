/* moe_open.h - what opening and closing any group of ranks that moves MoE rows needs (moe layer; internal). */
#ifndef XCCL_MOE_OPEN_H
#define XCCL_MOE_OPEN_H

#include "comm.h"
#include "kernel.h"

/* What all members must agree on, exchanged at open. */
typedef struct xccl_moe_terms_t {
    int64_t num_experts, hidden, num_topk, num_max_tokens, dtype, quant;
    int64_t path;        /* 0 where there is no choice */
    uint32_t ranks_hash; /* of lists of ranks, 0 where there are none */
    uint32_t map_hash;   /* of the owners of the experts */
} xccl_moe_terms_t;
_Static_assert(sizeof(xccl_moe_terms_t) == XCCL_AGREE_BYTES, "fills an agreement slot");

/* FNV-1a, continued from `hash`; begin with 0. */
uint32_t xccl_moe_hash(uint32_t hash, const void *data, size_t bytes);

/* The terms that a layer's shape and the owners of its experts make. */
xccl_moe_terms_t xccl_moe_terms(const xccl_moe_config_t *config, const int32_t *owner);

/* USAGE naming `who`, the argument and both values if a member's terms differ. Collective. */
int xccl_moe_agree(xccl_comm_t *comm, const char *who, const xccl_moe_terms_t *mine, int64_t deadline);

/* The arithmetic that `simd` asks for; USAGE if this processor lacks it. */
int xccl_moe_kernel(const char *who, xccl_simd_t simd, const xccl_kernel_t **out);

/* Received rows up to this are written through the caches, for combine to find them there; what follows goes past
 * them. A quarter of the last-level cache for the rows of all ranks leaves room for what they are made from and what
 * the caller makes of them. */
uint64_t xccl_moe_cached_bytes(const xccl_world_t *world);

/* The three blocks of a group: offsets in every window. */
typedef struct xccl_moe_blocks_t {
    uint64_t metadata, staging, pool;
} xccl_moe_blocks_t;

/* Takes all three, or none. Collective. */
int xccl_moe_take_blocks(xccl_comm_t *comm, const xccl_moe_bytes_t *bytes, int64_t timeout_ns, xccl_moe_blocks_t *out);

/* Gives them back; the pool only if no member passes keep_pool. Returns when all members have come. Collective. */
int xccl_moe_give_blocks(xccl_comm_t *comm, const xccl_moe_blocks_t *blocks, int keep_pool, int64_t timeout_ns);

#endif
