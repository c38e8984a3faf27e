/* moe_pull.h - rows from where their sources staged them to where the experts want them (moe layer; internal).
 *
 * A source lists its rows for this rank as entries, in the order of (token, slot), and has staged each token once. The
 * puller fetches the entries of all sources, counts them, so that it knows where each one's rows for an expert begin,
 * then copies each token, dequantised once, to all its places: rows lie in the order (local expert, source, token,
 * slot).
 *
 * Entries lie in memory that others write: they are copied once and checked before anything depends on them.
 */
#ifndef XCCL_MOE_PULL_H
#define XCCL_MOE_PULL_H

#include <stdbool.h>

#include "kernel.h"

/* One row that a destination has to place: a token that chose one of its experts. A source's entries are in the
 * order of (token, slot), so its rows for an expert are placed in the order in which they are found here. */
typedef struct xccl_moe_entry_t {
    uint32_t token; /* also the index of its staged row and scale */
    uint32_t local_expert;
} xccl_moe_entry_t;
_Static_assert(sizeof(xccl_moe_entry_t) == 8, "an entry is read by peers");

/* The entries of all sources, copied and checked. */
typedef struct xccl_moe_arrived_t {
    uint64_t *first; /* [sources + 1] where those of each source begin; first[0] is 0 */
    xccl_moe_entry_t *entries;
    uint64_t room; /* entries that there is memory for */
} xccl_moe_arrived_t;

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

/* Entries as a source has published them. */
typedef struct xccl_moe_listed_t {
    int rank;            /* for messages */
    const void *entries; /* in its memory */
    uint64_t count;
    uint64_t num_tokens; /* tokens are less than this */
} xccl_moe_listed_t;

/* Rows that a source has staged. */
typedef struct xccl_moe_staged_t {
    int rank; /* goes to src_rank */
    const unsigned char *rows;
    const float *scales; /* of int8 rows, else NULL */
} xccl_moe_staged_t;

/* Where a pull writes. */
typedef struct xccl_moe_rows_t {
    unsigned char *x;
    float *scales; /* NULL: rows are of the group's dtype, else int8 as they come */
    int32_t *src_rank;
    int32_t *src_token;
    uint64_t row_bytes;
    const unsigned char *streamed; /* rows from here on go past the caches */
} xccl_moe_rows_t;

/* Memory for the entries of so many sources; false if there is none. */
bool xccl_moe_arrived_new(xccl_moe_arrived_t *arrived, int num_sources);
void xccl_moe_arrived_free(xccl_moe_arrived_t *arrived);

/* Copies the entries of source `index` behind those of the sources before it, and checks them. SYSTEM if they are not
 * such as it can have written. */
int xccl_moe_fetch(const xccl_moe_puller_t *puller, xccl_moe_arrived_t *arrived, int index,
                   const xccl_moe_listed_t *listed);

/* Sets row_start [num_sources][num_local]: where each source's rows for an expert begin. USAGE if one expert gets more
 * than an int32 counts. */
int xccl_moe_place(const xccl_moe_puller_t *puller, const xccl_moe_arrived_t *arrived, int num_sources,
                   uint64_t *row_start, int32_t *out_num_recv_per_expert, int64_t *out_num_recv);

/* Copies the rows of source `index`. Whoever pulled from all calls xccl_kernel_stream_end. */
void xccl_moe_pull(const xccl_moe_puller_t *puller, const xccl_moe_arrived_t *arrived, int index,
                   const xccl_moe_staged_t *staged, const uint64_t *row_start, const xccl_moe_rows_t *to);

#endif
