/* reduce.h - element-wise reduction of several arrays in a fixed order; knows nothing of ranks or shared memory. */
#ifndef XCCL_REDUCE_H
#define XCCL_REDUCE_H

#include "xccl.h"

/* Bytes of one element. */
uint64_t xccl_reduce_itemsize(xccl_dtype_t dtype);

/* Whether elements of this type have this reduction. */
int xccl_reduce_supports(xccl_dtype_t dtype, xccl_reduce_op_t op);

/* out[i] = sources[0][i] op sources[1][i] op ... from left to right; `count` elements, supported dtype and op.
 * float16 and bfloat16 are reduced in float32 and rounded once. `out` may be one of the sources. */
void xccl_reduce(xccl_dtype_t dtype, xccl_reduce_op_t op, void *out, const void *const *sources, int num_sources,
                 uint64_t count);

#endif
