/* moe_outputs.h - y as the caller's experts leave it: rows that may be apart (moe layer; internal). */
#ifndef XCCL_MOE_OUTPUTS_H
#define XCCL_MOE_OUTPUTS_H

#include "shm.h"

/* Bytes from the first to the last element. */
static inline uint64_t xccl_moe_extent(uint64_t num_rows, uint64_t row_stride, uint64_t row_bytes) {
    return num_rows ? (num_rows - 1) * row_stride + row_bytes : 0;
}

/* Copies the rows without what is between them. */
void xccl_moe_copy_rows(void *copy, const void *y, uint64_t num_rows, uint64_t row_stride, uint64_t row_bytes);

/* Tells the race checker that the rows are read. */
int xccl_moe_note_rows(xccl_world_t *world, const void *y, uint64_t num_rows, uint64_t row_stride, uint64_t row_bytes,
                       xccl_op_t operation);

#endif
