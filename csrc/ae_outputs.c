#include <string.h>

#include "ae.h"
#include "moe_outputs.h"
#include "racecheck.h"
#include "status.h"
#include "wait.h"

/* E2A at an expert rank: its outputs to the hubs. */

/* Tells every attention rank's hub where its rows begin in y, for each expert of this rank. */
static void write_row_starts(const xccl_ae_t *ae, const xccl_ae_batch_t *batch, uint64_t stage) {
    uint64_t num_local = ae->puller.num_local;
    uint64_t *table = xccl_gas_local(ae->world, stage);
    for (int i = 0; i < ae->config.num_attention_ranks; i++)
        memcpy(table + (uint64_t)i * ae->layout.max_local_experts, batch->row_start + (uint64_t)i * num_local,
               num_local * sizeof *table);
}

/* y as the hubs find it. */
typedef struct published_t {
    uint64_t offset; /* in the own window */
    uint64_t row_stride;
} published_t;

/* Hubs can add up the elements of y where they lie. */
static bool is_aligned(const xccl_ae_t *ae, const void *y, uint64_t row_stride) {
    return ((uintptr_t)y | row_stride) % xccl_kernel_itemsize(ae->config.layer.dtype) == 0;
}

/* The last but one's outputs have been read: the hubs told of this micro-batch after that. */
static int stage_outputs(xccl_ae_t *ae, xccl_ae_batch_t *batch, const void *y, uint64_t row_stride, published_t *out) {
    int parity = xccl_ae_parity(batch->epoch);
    uint64_t stage = ae->blocks.staging + ae->layout.outputs_stage[parity], row_bytes = ae->layout.row_bytes;
    uint64_t num_rows = (uint64_t)batch->num_recv, offset = 0;
    uint64_t extent = xccl_moe_extent(num_rows, row_stride, row_bytes);
    batch->in_place =
        extent > 0 && is_aligned(ae, y, row_stride) && xccl_gas_is_symmetric(ae->world, y, extent, &offset);
    uint64_t copy_bytes = batch->in_place ? 0 : num_rows * row_bytes;
    int status =
        xccl_ae_reserve(ae, ae->rank, stage, ae->layout.outputs_copy + copy_bytes, &ae->outputs_reserved[parity]);
    if (status != XCCL_OK)
        return status;
    write_row_starts(ae, batch, stage);
    *out = (published_t){offset, num_rows > 1 ? row_stride : row_bytes};
    if (!batch->in_place) {
        *out = (published_t){stage + ae->layout.outputs_copy, row_bytes};
        xccl_moe_copy_rows(xccl_gas_local(ae->world, out->offset), y, num_rows, row_stride, row_bytes);
    }
    return XCCL_OK;
}

int xccl_ae_send_begin(xccl_ae_t *ae, uint64_t epoch, const void *y, uint64_t row_stride) {
    xccl_ae_batch_t *batch;
    int status = xccl_ae_check_expert(ae, "e2a_send");
    if (status == XCCL_OK)
        status = xccl_ae_find(ae, epoch, XCCL_AE_RECEIVED, "e2a_send", &batch);
    if (status != XCCL_OK)
        return status;
    if (row_stride < ae->layout.row_bytes && batch->num_recv > 1)
        return xccl_fail(XCCL_ERR_USAGE, "e2a_send on rank %d: rows of y are %llu bytes apart, expected at least %llu",
                         ae->rank, (unsigned long long)row_stride, (unsigned long long)ae->layout.row_bytes);
    status = xccl_op_begin(ae->world, XCCL_OP_E2A_SEND);
    if (status != XCCL_OK)
        return status;
    published_t published;
    status = stage_outputs(ae, batch, y, row_stride, &published);
    if (status == XCCL_OK)
        status = xccl_moe_note_rows(ae->world, y, (uint64_t)batch->num_recv, row_stride, ae->layout.row_bytes,
                                    XCCL_OP_E2A_SEND);
    if (status != XCCL_OK)
        return status;
    xccl_race_publish(ae->comm, XCCL_RACE_E2A, epoch);
    batch->phase = XCCL_AE_SENDING;
    /* the field's release makes y and the row starts visible with it */
    uint64_t line = xccl_ae_line(ae, ae->layout.outputs[xccl_ae_parity(epoch)], ae->expert);
    int num_hubs = (int)ae->layout.num_hubs;
    for (int i = 0; i < num_hubs; i++)
        xccl_ae_publish(ae, xccl_ae_hub_member(ae, (ae->expert + i) % num_hubs), line, epoch, published.offset,
                        (uint64_t)batch->num_recv, published.row_stride << 1 | batch->in_place);
    return xccl_ae_help(ae);
}

/* Waits until y, which lies where the caller has it, is the caller's again. */
static int wait_read(xccl_ae_t *ae, uint64_t epoch, int64_t deadline) {
    int status = xccl_op_phase(ae->world, 2);
    if (status != XCCL_OK)
        return status;
    xccl_ae_lines_t lines = {.ae = ae,
                             .array = ae->layout.read[xccl_ae_parity(epoch)],
                             .count = (int)ae->layout.num_hubs,
                             .epoch = epoch,
                             .writer = xccl_ae_read_by,
                             .what = "e2a: this rank's outputs read"};
    return xccl_ae_wait(&lines, deadline);
}

int xccl_ae_send_finish(xccl_ae_t *ae, uint64_t epoch, int64_t timeout_ns) {
    xccl_ae_batch_t *batch;
    int status = xccl_ae_check_expert(ae, "e2a_send");
    if (status == XCCL_OK)
        status = xccl_ae_find(ae, epoch, XCCL_AE_SENDING, "e2a_send", &batch);
    if (status != XCCL_OK)
        return status;
    status = xccl_op_begin(ae->world, XCCL_OP_E2A_SEND);
    if (status == XCCL_OK)
        status = xccl_op_phase(ae->world, 1);
    if (status != XCCL_OK)
        return status;
    int64_t deadline = xccl_deadline(ae->world, timeout_ns);
    status = xccl_ae_wait_summed(ae, batch, deadline);
    if (status == XCCL_OK && batch->in_place)
        status = wait_read(ae, epoch, deadline);
    if (status == XCCL_OK)
        batch->phase = XCCL_AE_IDLE;
    return status;
}
