/* moe_pull.h - rows from where their sources staged them to where the experts want them (moe layer; internal).
 *
 * A source lists its rows for this rank as entries, in the order of (token, slot), and has staged each token once. The
 * puller counts the entries of all sources, so that it knows where each one's rows for an expert begin, then copies
 * each token, dequantised once, to all its places: rows lie in the order (local expert, source, token, slot).
 *
 * Entries lie in memory that others write: each is read once in each pass, and what it says is checked.
 */
#ifndef XCCL_MOE_PULL_H
#define XCCL_MOE_PULL_H

#include "kernel.h"

/* One row that a destination has to place: a token that chose one of its experts. A source's entries are in the
 * order of (token, slot), so its rows for an expert are placed in the order in which they are found here. */
typedef struct xccl_moe_entry_t {
    uint32_t token; /* also the index of its staged row and scale */
    uint32_t local_expert;
} xccl_moe_entry_t;
_Static_assert(sizeof(xccl_moe_entry_t) == 8, "an entry is read by peers");

/* What one source has for the puller. */
typedef struct xccl_moe_source_t {
    int rank;
    const xccl_moe_entry_t *entries;
    uint64_t num_entries;
    uint64_t num_tokens; /* that it has staged */
    const unsigned char *rows;
    const float *scales; /* of int8 rows, else NULL */
} xccl_moe_source_t;

/* What is the same for all sources and pulls of a group. */
typedef struct xccl_moe_puller_t {
    const char *operation;
    int rank;
    const xccl_kernel_t *kernel;
    xccl_dtype_t dtype;
    uint64_t hidden;
    uint64_t staged_bytes; /* from row to row of a source */
    uint64_t num_topk;
    uint64_t num_local;     /* experts of this rank */
    uint64_t *cursor;       /* [num_local] scratch: next row of an expert */
    unsigned char **places; /* [num_topk] scratch: where one token goes */
} xccl_moe_puller_t;

/* Where a pull writes. */
typedef struct xccl_moe_rows_t {
    unsigned char *x;
    float *scales; /* NULL: rows are of the group's dtype, else int8 as they come */
    int32_t *src_rank;
    int32_t *src_token;
    uint64_t num_rows;
    uint64_t row_bytes;
    const unsigned char *streamed; /* rows from here on go past the caches */
} xccl_moe_rows_t;

/* counts[local expert] += rows of this source. USAGE for an entry that names no expert of this rank. */
int xccl_moe_count(const xccl_moe_puller_t *puller, const xccl_moe_source_t *source, uint64_t *counts);

/* Turns the counts [num_sources][num_local] into where each source's rows for an expert begin. USAGE if one expert gets
 * more than an int32 counts. */
int xccl_moe_place(const xccl_moe_puller_t *puller, int num_sources, uint64_t *row_start,
                   int32_t *out_num_recv_per_expert, int64_t *out_num_recv);

/* Copies the rows of a source, whose rows for each expert begin at row_start [num_local]. Whoever pulled from all
 * calls xccl_kernel_stream_end. USAGE if the entries are not those that were counted. */
int xccl_moe_pull(const xccl_moe_puller_t *puller, const xccl_moe_source_t *source, const uint64_t *row_start,
                  const xccl_moe_rows_t *to);

#endif
