#include "moe.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "status.h"
#include "wait.h"

/* Experts without a live rank: the agreed mask of ranks, and what a handle misses because of it. */

/* ---- the mask ---- */

enum { RANKS_AT_ONCE = XCCL_AGREE_BYTES * 8 }; /* one bit each */

void xccl_moe_route(xccl_moe_t *moe) {
    for (int64_t e = 0; e < moe->config.num_experts; e++) {
        int32_t owner = moe->owner[e];
        moe->route[e] = owner >= 0 && moe->alive[owner] ? owner : -1;
    }
}

static bool bit_of(const unsigned char *bits, int index) {
    return bits[index / 8] >> (index % 8) & 1;
}

/* Member 0 is the measure, so all members report the same difference. */
static int compare_masks(const xccl_comm_t *comm, const unsigned char *all, int first) {
    for (int rank = 1; rank < comm->size; rank++) {
        const unsigned char *theirs = all + (size_t)rank * XCCL_AGREE_BYTES;
        if (memcmp(theirs, all, XCCL_AGREE_BYTES) == 0)
            continue;
        int index = 0;
        while (bit_of(theirs, index) == bit_of(all, index))
            index++;
        bool alive = bit_of(theirs, index);
        return xccl_fail(XCCL_ERR_USAGE,
                         "set_alive on rank %d: mask[%d] is %s on rank %d, expected %s as on rank 0: it must be equal "
                         "on all ranks; nothing was changed",
                         comm->rank, first + index, alive ? "True" : "False", rank, alive ? "False" : "True");
    }
    return XCCL_OK;
}

static int agree_on_mask(xccl_comm_t *comm, const unsigned char *alive, int64_t deadline) {
    unsigned char *all = malloc((size_t)comm->size * XCCL_AGREE_BYTES);
    if (!all)
        return xccl_fail(XCCL_ERR_MEMORY, "rank %d has no memory to agree with %d ranks", comm->rank, comm->size);
    int status = XCCL_OK;
    for (int first = 0; first < comm->size && status == XCCL_OK; first += RANKS_AT_ONCE) {
        unsigned char bits[XCCL_AGREE_BYTES] = {0};
        for (int i = 0; i < RANKS_AT_ONCE && first + i < comm->size; i++)
            bits[i / 8] |= (unsigned char)((alive[first + i] != 0) << (i % 8));
        status = xccl_comm_agree(comm, bits, all, deadline);
        if (status == XCCL_OK)
            status = compare_masks(comm, all, first);
    }
    free(all);
    return status;
}

int xccl_moe_set_alive(xccl_moe_t *moe, const unsigned char *alive, int64_t timeout_ns) {
    int status = xccl_moe_check(moe, NULL, XCCL_MOE_SENT, "set_alive");
    if (status != XCCL_OK)
        return status;
    xccl_comm_t *comm = moe->comm;
    status = xccl_op_begin(comm->world, XCCL_OP_EP_ALIVE);
    if (status != XCCL_OK)
        return status;
    status = xccl_comm_settle(comm, agree_on_mask(comm, alive, xccl_deadline(comm->world, timeout_ns)));
    if (status != XCCL_OK)
        return status;
    for (int rank = 0; rank < comm->size; rank++)
        moe->alive[rank] = alive[rank] != 0;
    xccl_moe_route(moe);
    return XCCL_OK;
}

/* ---- what a handle misses ---- */

/* What a token's experts weigh, each sum in float32 over the slots in ascending order. */
typedef struct weight_t {
    float total, kept, missing;
    int64_t num_kept, num_missing; /* slots */
    bool ordinary;                 /* no weight is negative or NaN */
} weight_t;

static weight_t weigh(const xccl_moe_handle_t *handle, int64_t token) {
    weight_t sum = {.ordinary = true};
    for (int64_t slot = token * handle->num_topk; slot < (token + 1) * handle->num_topk; slot++) {
        if (handle->expert[slot] == -1)
            continue;
        float weight = handle->weighted ? handle->weights[slot] : 1.0f;
        sum.total += weight;
        sum.ordinary &= weight >= 0;
        if (handle->expert[slot] < 0) {
            sum.missing += weight;
            sum.num_missing++;
        } else {
            sum.kept += weight;
            sum.num_kept++;
        }
    }
    return sum;
}

void xccl_moe_missing(const xccl_moe_handle_t *handle, float *out_weight, int32_t *out_num_missing,
                      int32_t *out_num_kept) {
    for (int64_t token = 0; token < handle->num_tokens; token++) {
        weight_t sum = weigh(handle, token);
        out_weight[token] = sum.missing;
        out_num_missing[token] = (int32_t)sum.num_missing;
        out_num_kept[token] = (int32_t)sum.num_kept;
    }
}

void xccl_moe_on_missing(xccl_moe_handle_t *handle, xccl_on_missing_t policy) {
    handle->on_missing = policy;
}

bool xccl_moe_renormalize(const xccl_moe_handle_t *handle, int64_t token, float *term_weights, size_t num_terms) {
    weight_t sum = weigh(handle, token);
    if (sum.num_missing == 0 || !sum.ordinary || !(sum.kept > 0) || !isfinite(sum.total))
        return false;
    /* the quotient is at most 1, so nothing overflows; and a sole weight becomes exactly the total */
    for (size_t i = 0; i < num_terms; i++)
        term_weights[i] = term_weights[i] / sum.kept * sum.total;
    return true;
}

/* "expert 5 of rank 2, expert 7 of no rank": the experts that a token misses, as many as there is room for. */
static void list_missing(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, int64_t token, char *text,
                         size_t bytes) {
    size_t length = 0;
    for (int64_t slot = token * handle->num_topk; slot < (token + 1) * handle->num_topk && length < bytes; slot++) {
        if (handle->expert[slot] >= -1)
            continue;
        int32_t expert = xccl_moe_missed(handle->expert[slot]), owner = moe->owner[expert];
        const char *comma = length ? ", " : "";
        length += (size_t)(owner < 0 ? snprintf(text + length, bytes - length, "%sexpert %d of no rank", comma, expert)
                                     : snprintf(text + length, bytes - length, "%sexpert %d of rank %d", comma, expert,
                                                owner));
    }
}

int xccl_moe_judge(const xccl_moe_t *moe, const xccl_moe_handle_t *handle) {
    if (handle->on_missing != XCCL_MISSING_RAISE)
        return XCCL_OK;
    int64_t first = -1, count = 0;
    for (int64_t token = 0; token < handle->num_tokens; token++)
        if (weigh(handle, token).num_missing) {
            first = first < 0 ? token : first;
            count++;
        }
    char experts[512];
    list_missing(moe, handle, first, experts, sizeof experts);
    return xccl_fail(
        XCCL_ERR_MISSING,
        "combine on rank %d: %lld of %lld tokens chose experts that had no live rank at their dispatch; the "
        "first is token %lld: %s. This combine is complete and the group works; on_missing='renormalize' "
        "or 'zero' goes on without such experts",
        moe->comm->rank, (long long)count, (long long)handle->num_tokens, (long long)first, experts);
}
