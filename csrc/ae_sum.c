#include <string.h>

#include "ae.h"
#include "racecheck.h"
#include "status.h"
#include "wait.h"

/* E2A where outputs are summed: on the direct path at the attention rank, else at its trampoline, which writes the sums
 * into the attention rank's window. */

/* ---- at a hub ---- */

xccl_ae_lines_t xccl_ae_outputs_lines(const xccl_ae_t *ae, uint64_t epoch) {
    return (xccl_ae_lines_t){.ae = ae,
                             .array = ae->layout.outputs[xccl_ae_parity(epoch)],
                             .count = ae->config.num_expert_ranks,
                             .epoch = epoch,
                             .writer = xccl_ae_outputs_by,
                             .what = "e2a: outputs of the experts"};
}

/* Whether what an expert rank says of its y can be followed: where it begins, how many rows, and how far apart. */
static int check_place(xccl_ae_t *ae, int member, const char *operation, uint64_t offset, uint64_t num_rows,
                       uint64_t row_stride) {
    uint64_t row_bytes = ae->layout.row_bytes, itemsize = xccl_kernel_itemsize(ae->config.layer.dtype);
    uint64_t window = ae->world->stride, most = window - row_bytes;
    if (offset > most || offset % itemsize != 0)
        return xccl_ae_damaged(ae, operation, member, "offset of outputs", offset, 0, most);
    if (row_stride < row_bytes || row_stride > window || row_stride % itemsize != 0)
        return xccl_ae_damaged(ae, operation, member, "distance of output rows", row_stride, row_bytes, window);
    most = (window - offset - row_bytes) / row_stride + 1;
    if (num_rows > most)
        return xccl_ae_damaged(ae, operation, member, "number of output rows", num_rows, 0, most);
    return XCCL_OK;
}

static int find_outputs_of(xccl_ae_t *ae, uint64_t epoch, int expert, const char *operation, xccl_ae_outputs_t *out) {
    const xccl_ae_layout_t *layout = &ae->layout;
    int parity = xccl_ae_parity(epoch), member = ae->expert_ranks[expert];
    const xccl_field_t *field = xccl_ae_own_line(ae, layout->outputs[parity], expert);
    uint64_t offset = xccl_gas_read(&field->offset), num_rows = xccl_gas_read(&field->count);
    uint64_t time = xccl_gas_read(&field->time), row_stride = time >> 1;
    int status = check_place(ae, member, operation, offset, num_rows, row_stride);
    if (status != XCCL_OK)
        return status;
    const unsigned char *window = xccl_gas_at(ae->world, ae->ranks[member], 0);
    *out = (xccl_ae_outputs_t){
        .y = window + offset,
        .row_stride = row_stride,
        .num_rows = num_rows,
        .row_start = (const uint64_t *)(window + ae->blocks.staging + layout->outputs_stage[parity]),
        .in_place = time & 1,
    };
    return XCCL_OK;
}

int xccl_ae_find_outputs(xccl_ae_t *ae, uint64_t epoch, const char *operation) {
    int status = XCCL_OK;
    for (int expert = 0; expert < ae->config.num_expert_ranks && status == XCCL_OK; expert++)
        status = find_outputs_of(ae, epoch, expert, operation, &ae->outputs[expert]);
    return status;
}

/* The output of one choice's expert, in the memory of its rank. */
static int find_term(xccl_ae_t *ae, int attention, const xccl_ae_choice_t *choice, const char *operation,
                     const void **out) {
    int64_t num_experts = ae->config.layer.num_experts;
    if (choice->expert >= num_experts)
        return xccl_ae_damaged(ae, operation, ae->attention_ranks[attention], "expert of a slot",
                               (uint64_t)choice->expert, 0, (uint64_t)num_experts - 1);
    int owner = ae->owner[choice->expert];
    const xccl_ae_outputs_t *outputs = &ae->outputs[owner];
    uint64_t start = (uint64_t)attention * ae->layout.max_local_experts + (uint64_t)ae->local_index[choice->expert];
    uint64_t row = xccl_gas_read(&outputs->row_start[start]);
    if (row >= outputs->num_rows || choice->position >= outputs->num_rows - row)
        return xccl_ae_damaged(ae, operation, ae->expert_ranks[owner], "row of an output", row, 0, outputs->num_rows);
    *out = outputs->y + (row + choice->position) * outputs->row_stride;
    return XCCL_OK;
}

/* Both paths come here: the same additions in the same order. */
static int sum_token(xccl_ae_t *ae, int attention, const xccl_ae_choice_t *choices, const char *operation, void *out) {
    size_t num_terms = 0;
    for (int64_t slot = 0; slot < ae->config.layer.num_topk; slot++) {
        xccl_ae_choice_t choice = xccl_ae_read_choice(&choices[slot]);
        if (choice.expert < 0)
            continue;
        int status = find_term(ae, attention, &choice, operation, &ae->terms[num_terms]);
        if (status != XCCL_OK)
            return status;
        ae->term_weights[num_terms++] = choice.weight;
    }
    ae->kernel->weighted_sum(ae->config.layer.dtype, out, ae->terms, ae->term_weights, num_terms,
                             (size_t)ae->config.layer.hidden);
    return XCCL_OK;
}

int xccl_ae_sum(xccl_ae_t *ae, uint64_t epoch, int attention, uint64_t num_tokens, const char *operation,
                unsigned char *out) {
    const unsigned char *stage = xccl_gas_local(ae->world, xccl_ae_stage(ae, epoch, xccl_ae_slot_of(ae, attention)));
    const xccl_ae_choice_t *choices = (const xccl_ae_choice_t *)(stage + ae->layout.stage_routing);
    int status = XCCL_OK;
    for (uint64_t token = 0; token < num_tokens && status == XCCL_OK; token++)
        status = sum_token(ae, attention, choices + token * (uint64_t)ae->config.layer.num_topk, operation,
                           out + token * ae->layout.row_bytes);
    return status;
}

void xccl_ae_say_read(xccl_ae_t *ae, uint64_t epoch) {
    uint64_t line = xccl_ae_line(ae, ae->layout.read[xccl_ae_parity(epoch)], ae->hub);
    for (int expert = 0; expert < ae->config.num_expert_ranks; expert++)
        if (ae->outputs[expert].in_place)
            xccl_ae_signal(ae, ae->expert_ranks[expert], line, epoch);
}

/* ---- at an attention rank ---- */

static int sum_here(xccl_ae_t *ae, const xccl_ae_batch_t *batch, void *out, int64_t deadline) {
    xccl_ae_lines_t lines = xccl_ae_outputs_lines(ae, batch->epoch);
    int status = xccl_ae_wait(&lines, deadline);
    if (status == XCCL_OK)
        status = xccl_ae_find_outputs(ae, batch->epoch, "e2a");
    if (status == XCCL_OK)
        status = xccl_ae_sum(ae, batch->epoch, ae->attention, (uint64_t)batch->num_tokens, "e2a", out);
    if (status == XCCL_OK)
        xccl_ae_say_read(ae, batch->epoch);
    return status;
}

static int take_sums(xccl_ae_t *ae, const xccl_ae_batch_t *batch, void *out, int64_t deadline) {
    int parity = xccl_ae_parity(batch->epoch);
    xccl_ae_lines_t lines = {.ae = ae,
                             .array = ae->layout.summed[parity],
                             .count = 1,
                             .epoch = batch->epoch,
                             .writer = xccl_ae_summed_by,
                             .what = "e2a: sums of the trampoline"};
    int status = xccl_ae_wait(&lines, deadline);
    if (status == XCCL_OK)
        memcpy(out, xccl_gas_local(ae->world, ae->blocks.staging + ae->layout.result_stage[parity]),
               (uint64_t)batch->num_tokens * ae->layout.row_bytes);
    return status;
}

/* Tells the race checker that all expert ranks have entered, and that `out` is written. */
static int note_sums(const xccl_ae_t *ae, const xccl_ae_batch_t *batch, void *out) {
    for (int expert = 0; expert < ae->config.num_expert_ranks; expert++)
        xccl_race_join(ae->comm, XCCL_RACE_E2A, batch->epoch, ae->expert_ranks[expert]);
    return xccl_race_touch(ae->world, out, (uint64_t)batch->num_tokens * ae->layout.row_bytes, XCCL_RACE_WRITE,
                           XCCL_OP_E2A);
}

int xccl_ae_e2a(xccl_ae_t *ae, uint64_t epoch, void *out, int64_t timeout_ns) {
    xccl_ae_batch_t *batch;
    int status = xccl_ae_check_attention(ae, "e2a");
    if (status == XCCL_OK)
        status = xccl_ae_find(ae, epoch, XCCL_AE_SENT, "e2a", &batch);
    if (status != XCCL_OK)
        return status;
    status = xccl_op_begin(ae->world, XCCL_OP_E2A);
    if (status != XCCL_OK)
        return status;
    int64_t deadline = xccl_deadline(ae->world, timeout_ns);
    status = xccl_ae_is_direct(ae) ? sum_here(ae, batch, out, deadline) : take_sums(ae, batch, out, deadline);
    if (status == XCCL_OK && !xccl_race_is_off(ae->world))
        status = note_sums(ae, batch, out);
    if (status == XCCL_OK)
        batch->phase = XCCL_AE_IDLE;
    return status;
}
