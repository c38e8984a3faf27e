/* coll_signature.c - what the members of a collective must agree on, and how they differ. */
#include <stdio.h>

#include "coll.h"
#include "status.h"

/*   signature: | param 40 bits | dtype 8 | reduce 4 | op 7 | mode 5 | */
enum { OP_SHIFT = 5, REDUCE_SHIFT = 12, DTYPE_SHIFT = 16, PARAM_SHIFT = 24, MAX_TEXT = 192 };

static const char *const dtype_names[] = {"float32", "float16",   "bfloat16",   "float64", "bool",   "int8",
                                          "int16",   "int32",     "int64",      "uint8",   "uint16", "uint32",
                                          "uint64",  "complex64", "complex128", "bytes"};
static const char *const reduce_names[] = {"sum", "min", "max", "prod"};

uint64_t xccl_coll_signature(xccl_op_t op, int reduce, xccl_dtype_t dtype, uint64_t param) {
    return (uint64_t)op << OP_SHIFT | (uint64_t)reduce << REDUCE_SHIFT | (uint64_t)dtype << DTYPE_SHIFT |
           param << PARAM_SHIFT;
}

bool xccl_coll_agrees(const xccl_coll_t *coll, int pe, const xccl_coll_words_t *header) {
    if (((header->signature ^ coll->signature) & ~(uint64_t)XCCL_COLL_MODE_MASK) != 0 || header->epoch != coll->epoch)
        return false;
    if ((header->signature & XCCL_COLL_MODE_MASK) == XCCL_COLL_REFUSED)
        return false;
    return coll->any_size || header->bytes == coll->peers[pe].in_bytes;
}

xccl_dtype_t xccl_coll_dtype_of(uint64_t signature) {
    return (xccl_dtype_t)(signature >> DTYPE_SHIFT & 0xff);
}

const char *xccl_coll_dtype_name(xccl_dtype_t dtype) {
    return dtype <= XCCL_BYTES ? dtype_names[dtype] : "?";
}

const char *xccl_coll_reduce_name(xccl_reduce_op_t op) {
    return op <= XCCL_PROD ? reduce_names[op] : "?";
}

/* "all_reduce(max) of float32, 80 bytes" */
static void describe(uint64_t signature, uint64_t bytes, char *text, size_t size) {
    int op = signature >> OP_SHIFT & 0x7f, reduce = signature >> REDUCE_SHIFT & 0xf;
    uint64_t param = signature >> PARAM_SHIFT;
    int used = snprintf(text, size, "%s", xccl_op_name(op));
    if (op == XCCL_OP_BARRIER)
        return;
    if (op == XCCL_OP_ALL_REDUCE || op == XCCL_OP_REDUCE_SCATTER)
        used += snprintf(text + used, size - used, "(%s)", xccl_coll_reduce_name((xccl_reduce_op_t)reduce));
    if (op == XCCL_OP_BROADCAST)
        used += snprintf(text + used, size - used, " from root %llu", (unsigned long long)param);
    if (op == XCCL_OP_ALL_TO_ALL_V)
        used += snprintf(text + used, size - used, " with rows of %llu bytes", (unsigned long long)param);
    used += snprintf(text + used, size - used, " of %s", xccl_coll_dtype_name(xccl_coll_dtype_of(signature)));
    if (bytes != UINT64_MAX)
        snprintf(text + used, size - used, ", message of %llu bytes", (unsigned long long)bytes);
}

int xccl_coll_fail_mismatch(const xccl_coll_t *coll) {
    char here[MAX_TEXT], there[MAX_TEXT];
    int pe = coll->differs;
    const xccl_coll_peer_t *peer = &coll->peers[pe];
    const xccl_coll_words_t *header = &coll->different;
    const char *op = xccl_op_name(coll->signature >> OP_SHIFT & 0x7f);
    bool refused = (header->signature & XCCL_COLL_MODE_MASK) == XCCL_COLL_REFUSED;
    describe(coll->signature, coll->any_size || refused ? UINT64_MAX : peer->in_bytes, here, sizeof here);
    describe(header->signature, refused ? UINT64_MAX : header->bytes, there, sizeof there);
    return xccl_fail(XCCL_ERR_USAGE,
                     "%s on rank %d of %d: the members do not agree: rank %d is in collective %llu: %s%s; expected "
                     "collective %llu: %s; every member must make the same calls, with sizes that match",
                     op, coll->rank, coll->size, pe, (unsigned long long)header->epoch, there,
                     refused ? ", and found a call of another rank that differs" : "", (unsigned long long)coll->epoch,
                     here);
}
