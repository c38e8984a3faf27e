#include "ae.h"
#include "status.h"
#include "wait.h"

/* What the steps of A2E and E2A share. */

/* ---- checks ---- */

static int check_role(const xccl_ae_t *ae, bool has_role, const char *role, const char *operation) {
    int status = xccl_comm_check(ae->comm);
    if (status != XCCL_OK)
        return status;
    if (ae->broken)
        return xccl_fail(
            XCCL_ERR_USAGE,
            "%s on rank %d: an earlier operation of this domain failed halfway: open a new one on all ranks", operation,
            ae->rank);
    if (!has_role)
        return xccl_fail(XCCL_ERR_USAGE, "%s on rank %d: this is not one of the %s of this domain", operation, ae->rank,
                         role);
    return XCCL_OK;
}

int xccl_ae_check_attention(const xccl_ae_t *ae, const char *operation) {
    return check_role(ae, ae->attention >= 0, "attention ranks", operation);
}

int xccl_ae_check_expert(const xccl_ae_t *ae, const char *operation) {
    return check_role(ae, ae->expert >= 0, "expert ranks", operation);
}

static const char *const PHASES[] = {
    [XCCL_AE_IDLE] = "it is not in flight",
    [XCCL_AE_SENT] = "its tokens are on their way",
    [XCCL_AE_RECEIVING] = "its a2e_recv has not completed",
    [XCCL_AE_COUNTED] = "its a2e_recv has not completed",
    [XCCL_AE_RECEIVED] = "its a2e_recv has completed and no e2a_send has used it yet",
    [XCCL_AE_SENDING] = "an e2a_send that is in flight uses it already",
};

int xccl_ae_find(xccl_ae_t *ae, uint64_t epoch, xccl_ae_phase_t phase, const char *operation, xccl_ae_batch_t **out) {
    xccl_ae_batch_t *batch = &ae->batch[xccl_ae_parity(epoch)];
    xccl_ae_phase_t found = batch->epoch == epoch ? batch->phase : XCCL_AE_IDLE;
    if (found != phase)
        return xccl_fail(XCCL_ERR_USAGE, "%s on rank %d: cannot use micro-batch %llu: %s", operation, ae->rank,
                         (unsigned long long)epoch, PHASES[found]);
    *out = batch;
    return XCCL_OK;
}

int xccl_ae_damaged(xccl_ae_t *ae, const char *operation, int member, const char *field, uint64_t got, uint64_t least,
                    uint64_t most) {
    ae->broken = true;
    return xccl_fail_damaged(operation, ae->rank, member, field, got, least, most);
}

/* ---- telling others ---- */

static void count_update(xccl_ae_t *ae, int member) {
    ae->updates += member != ae->rank;
}

void xccl_ae_publish(xccl_ae_t *ae, int member, uint64_t line, uint64_t epoch, uint64_t offset, uint64_t count,
                     uint64_t time) {
    count_update(ae, member);
    /* release, see xccl_gas_field_at: what was staged is visible with the field */
    xccl_gas_field_at(ae->world, ae->ranks[member], line, epoch, offset, count, time);
}

void xccl_ae_signal(xccl_ae_t *ae, int member, uint64_t line, uint64_t epoch) {
    count_update(ae, member);
    /* release, see xccl_gas_signal_at: earlier loads and puts are done before the signal is seen */
    xccl_gas_signal_at(ae->world, ae->ranks[member], line, epoch);
}

void xccl_ae_tell_experts(xccl_ae_t *ae, uint64_t epoch, int attention, uint64_t num_tokens) {
    int num_experts = ae->config.num_expert_ranks;
    uint64_t line = xccl_ae_line(ae, ae->layout.arrived[xccl_ae_parity(epoch)], attention);
    const xccl_ae_part_t *parts = xccl_gas_local(ae->world, xccl_ae_stage(ae, epoch, xccl_ae_slot_of(ae, attention)));
    /* Starting behind the own index spreads the first pulls. The line is free: its reader has pulled epoch - 2, or its
     * attention rank would not have sent this one. */
    for (int i = 0; i < num_experts; i++) {
        int expert = (attention + i) % num_experts;
        xccl_ae_publish(ae, ae->expert_ranks[expert], line, epoch, parts[expert].offset, parts[expert].count,
                        num_tokens);
    }
}

/* ---- waiting for others ---- */

int xccl_ae_staged_by(const xccl_ae_t *ae, int slot) {
    return ae->attention_ranks[xccl_ae_own_attention(ae, slot)];
}

int xccl_ae_arrived_by(const xccl_ae_t *ae, int attention) {
    return xccl_ae_hub_member(ae, xccl_ae_hub_of(ae, attention));
}

int xccl_ae_outputs_by(const xccl_ae_t *ae, int expert) {
    return ae->expert_ranks[expert];
}

int xccl_ae_read_by(const xccl_ae_t *ae, int hub) {
    return xccl_ae_hub_member(ae, hub);
}

int xccl_ae_summed_by(const xccl_ae_t *ae, int unused) {
    (void)unused;
    return xccl_ae_arrived_by(ae, ae->attention);
}

static uint64_t epoch_of(const xccl_ae_lines_t *lines, int index) {
    /* acquire, see xccl_gas_load: the writer's data and the rest of its field are visible once its epoch is */
    return xccl_gas_load(&xccl_ae_own_line(lines->ae, lines->array, index)->event_id);
}

bool xccl_ae_have(xccl_ae_lines_t *lines) {
    while (lines->arrived < lines->count && epoch_of(lines, lines->arrived) >= lines->epoch)
        lines->arrived++;
    return lines->arrived == lines->count;
}

static bool ready(void *arg) {
    return xccl_ae_have(arg);
}

static bool awaited(void *arg, int index, xccl_awaited_t *out) {
    const xccl_ae_lines_t *lines = arg;
    for (int line = lines->arrived; line < lines->count; line++) {
        uint64_t seen = epoch_of(lines, line);
        if (seen >= lines->epoch || index-- > 0)
            continue;
        int member = lines->writer(lines->ae, line);
        *out = (xccl_awaited_t){lines->ae->ranks[member], lines->epoch, seen, lines->what};
        return true;
    }
    return false;
}

int xccl_ae_wait(xccl_ae_lines_t *lines, int64_t deadline) {
    xccl_wait_t wait = {ready, awaited, lines};
    return xccl_wait(lines->ae->world, &wait, deadline);
}

/* ---- memory ---- */

int xccl_ae_reserve(const xccl_ae_t *ae, int member, uint64_t offset, uint64_t bytes, uint64_t *reserved) {
    if (bytes <= *reserved)
        return XCCL_OK;
    int status = xccl_heap_commit_at(ae->world, ae->ranks[member], offset + *reserved, bytes - *reserved);
    if (status == XCCL_OK)
        *reserved = bytes;
    return status;
}
