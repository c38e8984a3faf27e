#include "moe_outputs.h"

#include <string.h>

#include "racecheck.h"

void xccl_moe_copy_rows(void *copy, const void *y, uint64_t num_rows, uint64_t row_stride, uint64_t row_bytes) {
    if (row_stride == row_bytes)
        memcpy(copy, y, num_rows * row_bytes);
    else
        for (uint64_t row = 0; row < num_rows; row++)
            memcpy((char *)copy + row * row_bytes, (const char *)y + row * row_stride, row_bytes);
}

int xccl_moe_note_rows(xccl_world_t *world, const void *y, uint64_t num_rows, uint64_t row_stride, uint64_t row_bytes,
                       xccl_op_t operation) {
    if (xccl_race_is_off(world))
        return XCCL_OK;
    bool dense = row_stride == row_bytes;
    uint64_t piece = dense ? num_rows * row_bytes : row_bytes;
    int status = XCCL_OK;
    for (uint64_t row = 0; row < (dense ? 1 : num_rows) && status == XCCL_OK; row++)
        status = xccl_race_touch(world, (const char *)y + row * row_stride, piece, XCCL_RACE_READ, (int)operation);
    return status;
}
