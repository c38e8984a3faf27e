#include <stdlib.h>

#include "ae.h"
#include "status.h"
#include "wait.h"

/* What a trampoline does for its attention ranks. */

/* ---- forwarding ---- */

static xccl_ae_lines_t staged_lines(const xccl_ae_t *ae, uint64_t epoch) {
    return (xccl_ae_lines_t){.ae = ae,
                             .array = ae->layout.staged[xccl_ae_parity(epoch)],
                             .count = xccl_ae_own_slots(ae),
                             .epoch = epoch,
                             .writer = xccl_ae_staged_by,
                             .what = "a2e: tokens for this trampoline"};
}

/* Tells the expert ranks about the tokens in all own slots. */
static int forward(xccl_ae_t *ae, xccl_ae_batch_t *batch) {
    int parity = xccl_ae_parity(batch->epoch);
    uint64_t most = (uint64_t)ae->config.layer.num_max_tokens;
    for (int slot = 0; slot < xccl_ae_own_slots(ae); slot++) {
        uint64_t num_tokens = xccl_gas_read(&xccl_ae_own_line(ae, ae->layout.staged[parity], slot)->count);
        if (num_tokens > most)
            return xccl_ae_damaged(ae, "a2e_recv", xccl_ae_staged_by(ae, slot), "number of tokens", num_tokens, 0,
                                   most);
        batch->slot_tokens[slot] = num_tokens;
    }
    for (int slot = 0; slot < xccl_ae_own_slots(ae); slot++)
        xccl_ae_tell_experts(ae, batch->epoch, xccl_ae_own_attention(ae, slot), batch->slot_tokens[slot]);
    batch->forwarded = true;
    return XCCL_OK;
}

int xccl_ae_wait_forwarded(xccl_ae_t *ae, xccl_ae_batch_t *batch, int64_t deadline) {
    if (batch->forwarded)
        return XCCL_OK;
    xccl_ae_lines_t lines = staged_lines(ae, batch->epoch);
    int status = xccl_ae_wait(&lines, deadline);
    return status == XCCL_OK && !batch->forwarded ? forward(ae, batch) : status;
}

/* ---- summing ---- */

/* Writes the sums of all own slots into their attention ranks' windows. */
static int sum_slots(xccl_ae_t *ae, xccl_ae_batch_t *batch) {
    int parity = xccl_ae_parity(batch->epoch);
    int status = xccl_ae_find_outputs(ae, batch->epoch, "e2a_send");
    for (int slot = 0; slot < xccl_ae_own_slots(ae) && status == XCCL_OK; slot++) {
        int attention = xccl_ae_own_attention(ae, slot), member = ae->attention_ranks[attention];
        uint64_t result = ae->blocks.staging + ae->layout.result_stage[parity];
        status = xccl_ae_sum(ae, batch->epoch, attention, batch->slot_tokens[slot], "e2a_send",
                             xccl_gas_at(ae->world, ae->ranks[member], result));
        if (status == XCCL_OK)
            xccl_ae_signal(ae, member, xccl_ae_line(ae, ae->layout.summed[parity], 0), batch->epoch);
    }
    if (status != XCCL_OK)
        return status;
    xccl_ae_say_read(ae, batch->epoch);
    batch->summed = true;
    return XCCL_OK;
}

int xccl_ae_wait_summed(xccl_ae_t *ae, xccl_ae_batch_t *batch, int64_t deadline) {
    if (batch->summed)
        return XCCL_OK;
    xccl_ae_lines_t lines = xccl_ae_outputs_lines(ae, batch->epoch);
    int status = xccl_ae_wait(&lines, deadline);
    return status == XCCL_OK && !batch->summed ? sum_slots(ae, batch) : status;
}

/* ---- while it waits for something else ---- */

/* Lives until both the domain and the hook are gone. */
struct xccl_ae_link_t {
    xccl_world_t *world;
    xccl_ae_t *ae; /* NULL: the domain is gone */
    bool hooked;
};

static bool wants_forward(const xccl_ae_batch_t *batch) {
    return batch->phase == XCCL_AE_RECEIVING && !batch->forwarded;
}

static bool wants_sums(const xccl_ae_batch_t *batch) {
    return batch->phase == XCCL_AE_SENDING && !batch->summed;
}

static int help_now(xccl_ae_t *ae) {
    int status = XCCL_OK;
    for (int parity = 0; parity < XCCL_AE_PARITIES && status == XCCL_OK; parity++) {
        xccl_ae_batch_t *batch = &ae->batch[parity];
        xccl_ae_lines_t staged = staged_lines(ae, batch->epoch);
        xccl_ae_lines_t outputs = xccl_ae_outputs_lines(ae, batch->epoch);
        if (wants_forward(batch) && xccl_ae_have(&staged))
            status = forward(ae, batch);
        else if (wants_sums(batch) && xccl_ae_have(&outputs))
            status = sum_slots(ae, batch);
    }
    return status;
}

static bool is_wanted(const xccl_ae_t *ae) {
    for (int parity = 0; parity < XCCL_AE_PARITIES; parity++)
        if (wants_forward(&ae->batch[parity]) || wants_sums(&ae->batch[parity]))
            return true;
    return false;
}

/* Runs in every wait of this rank, but is there only while something is wanted. */
static int progress(void *arg) {
    xccl_ae_link_t *link = arg;
    int status = link->ae ? help_now(link->ae) : XCCL_OK;
    if (link->ae && is_wanted(link->ae))
        return status;
    xccl_progress_remove(link->world, progress, link);
    link->hooked = false;
    if (!link->ae)
        free(link);
    return status;
}

int xccl_ae_help(xccl_ae_t *ae) {
    int status = help_now(ae);
    if (status != XCCL_OK || ae->link->hooked || !is_wanted(ae))
        return status;
    status = xccl_progress_add(ae->world, progress, ae->link);
    ae->link->hooked = status == XCCL_OK;
    return status;
}

int xccl_ae_link(xccl_ae_t *ae) {
    ae->link = malloc(sizeof *ae->link);
    if (!ae->link)
        return xccl_fail(XCCL_ERR_MEMORY, "rank %d has no memory for a domain", ae->rank);
    *ae->link = (xccl_ae_link_t){ae->world, ae, false};
    return XCCL_OK;
}

/* The world may be gone already: so a hook that is still there goes at its next turn. */
void xccl_ae_unlink(xccl_ae_t *ae) {
    if (ae->link && ae->link->hooked)
        ae->link->ae = NULL;
    else
        free(ae->link);
}
