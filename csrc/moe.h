/* moe.h - dispatch and combine (moe layer; internal).
 *
 * Everything a member publishes lies in its own window; peers pull it. Epochs count the dispatches and the
 * combines of a group from 1, are the same on all members, and never restart. Epoch e uses the half e % 2 of
 * every array ("parity"), so two operations can be in flight; before a member writes a half again it waits
 * until all readers of epoch e - 2 have said that they are done (bug classes 6, 7). Nothing in a half depends
 * on the shape of an earlier operation: fields have fixed places, and say where the data lies (bug class 8).
 *
 *   metadata block, one 64-byte line for each peer in each array, written by that peer
 *   | dispatch field [2][R] | dispatch done [2][R] | combine field [2][R] | combine done [2][R] |
 *
 *   staging block, written by the owner, read by peers
 *   | dispatch stage 0 | dispatch stage 1 | combine stage 0 | combine stage 1 |
 *
 *   dispatch stage = | entries for each destination, behind each other | scales | rows |
 *   combine stage  = | row_start [R][max_local_experts] | copy of y |
 *
 * A token is staged once, however many of its destinations pull it; what each of them shall do with it is in
 * its entries. A receiver learns from these alone how many rows it gets, so one signal publishes it all.
 */
#ifndef XCCL_MOE_H
#define XCCL_MOE_H

#include "comm.h"
#include "gas.h"
#include "kernel.h"
#include "moe_open.h"
#include "moe_pull.h"
#include "racecheck.h"

enum { XCCL_MOE_PARITIES = 2, XCCL_MOE_POOL_BUFFERS = 2 };

/* Sizes and offsets of the blocks; the only place where they are computed. Offsets are from the start of a
 * block. */
typedef struct xccl_moe_layout_t {
    uint64_t max_local_experts;
    uint64_t row_bytes;      /* a row of x, y and recv_x */
    uint64_t staged_bytes;   /* a row in a dispatch stage: whole lines */
    uint64_t max_recv_bytes; /* all slots of all tokens of all members come to one member */

    uint64_t dispatch_field[XCCL_MOE_PARITIES]; /* in the metadata block */
    uint64_t dispatch_done[XCCL_MOE_PARITIES];
    uint64_t combine_field[XCCL_MOE_PARITIES];
    uint64_t combine_done[XCCL_MOE_PARITIES];

    uint64_t dispatch_stage[XCCL_MOE_PARITIES]; /* in the staging block */
    uint64_t dispatch_scales;                   /* from the start of a dispatch stage */
    uint64_t dispatch_rows;
    uint64_t dispatch_stage_bytes;
    uint64_t combine_stage[XCCL_MOE_PARITIES];
    uint64_t combine_copy; /* of y, from the start of a combine stage */
    uint64_t combine_stage_bytes;

    xccl_moe_bytes_t bytes; /* of the three blocks */
} xccl_moe_layout_t;

/* USAGE for a bad configuration or one whose sizes leave 62 bits. */
int xccl_moe_layout(const xccl_moe_config_t *config, int num_ranks, const int32_t *owner, xccl_moe_layout_t *out);

/* USAGE naming `who` for a number out of range, or an owner that is none of the ranks. */
int xccl_moe_check_config(const char *who, const xccl_moe_config_t *config, int num_ranks, const int32_t *owner);

/* The highest count of experts at one owner. */
uint64_t xccl_moe_most_experts(const xccl_moe_config_t *config, int num_ranks, const int32_t *owner);

static inline uint64_t xccl_moe_lines(uint64_t bytes) {
    return (bytes + XCCL_LINE - 1) / XCCL_LINE * XCCL_LINE;
}

/* What the send half notes about one destination. */
typedef struct xccl_moe_dest_t {
    uint64_t num_entries;
    uint64_t offset;        /* of its entries in the own window */
    xccl_moe_entry_t *next; /* where the next one goes */
} xccl_moe_dest_t;

/* Where combine finds the outputs of one member. */
typedef struct xccl_moe_outputs_t {
    const unsigned char *y;
    uint64_t row_stride;
    uint64_t num_rows;         /* that lie in its window: no more can be read */
    const uint64_t *row_start; /* first of this rank's rows for each of the member's experts */
} xccl_moe_outputs_t;

typedef enum xccl_moe_phase_t {
    XCCL_MOE_SENT,      /* dispatch published */
    XCCL_MOE_COUNTED,   /* all fields seen */
    XCCL_MOE_RECEIVED,  /* rows pulled: combine may start */
    XCCL_MOE_COMBINING, /* y published */
    XCCL_MOE_SUMMED,    /* result written, peers may still read y */
    XCCL_MOE_COMBINED
} xccl_moe_phase_t;

struct xccl_moe_handle_t {
    const xccl_moe_t *moe;
    xccl_moe_phase_t phase;
    uint64_t dispatch_epoch;
    uint64_t combine_epoch;
    int64_t num_tokens;
    int64_t num_recv;
    int64_t num_topk;
    int64_t num_missing; /* slots whose expert had no live rank at the dispatch */
    xccl_on_missing_t on_missing;
    bool weighted;
    bool in_place; /* y is read in the caller's array */
    bool streams;  /* rows were written past the caches */
    int64_t pull_ns;
    uint64_t *row_start; /* [R][num_local_experts]: first received row of a source for an expert */
    int32_t *expert;     /* [num_tokens][num_topk], -1: none, below: missing, see xccl_moe_missed */
    uint32_t *position;  /* [num_tokens][num_topk]: index among the own rows for that expert */
    float *weights;      /* [num_tokens][num_topk] */
};

struct xccl_moe_t {
    xccl_comm_t *comm;
    xccl_moe_config_t config;
    xccl_moe_layout_t layout;
    const xccl_kernel_t *kernel;
    xccl_moe_blocks_t blocks;
    uint64_t cached_bytes;   /* of received rows that are written through the caches, unless all go past them */
    bool streams;            /* what the last dispatch did with its rows: stages follow it */
    float store_cost[64][2]; /* ns a byte by log2 of the bytes; through the caches, past them; 0 unknown */
    uint64_t dispatch_epoch, combine_epoch;
    xccl_moe_handle_t *dispatching[XCCL_MOE_PARITIES]; /* sent and not yet received */
    xccl_moe_handle_t *combining[XCCL_MOE_PARITIES];
    uint64_t dispatch_reserved[XCCL_MOE_PARITIES]; /* bytes of the stages that have pages */
    uint64_t combine_reserved[XCCL_MOE_PARITIES];
    bool broken; /* members disagree on epochs */

    int32_t *owner;           /* [num_experts] member that holds it, -1: nobody */
    int32_t *route;           /* [num_experts] where dispatch sends its tokens: the owner if alive, else -1 */
    bool *alive;              /* [R] what xccl_moe_set_alive agreed on */
    int32_t *local_index;     /* [num_experts] index among its owner's experts */
    uint64_t *num_experts_of; /* [R] */

    xccl_moe_puller_t puller;
    xccl_moe_arrived_t arrived[XCCL_MOE_PARITIES]; /* of the dispatches that are being received */

    xccl_moe_dest_t *dest;       /* [R] scratch of the send half */
    uint32_t *expert_count;      /* [num_experts] scratch of the send half */
    int8_t *quantized;           /* [hidden] scratch of the send half */
    xccl_moe_outputs_t *outputs; /* [R] scratch of combine */
    const void **terms;          /* [num_topk] scratch of combine */
    float *term_weights;         /* [num_topk] */
};

static inline uint64_t xccl_moe_num_local(const xccl_moe_t *moe) {
    return moe->num_experts_of[moe->comm->rank];
}

/* How a handle notes an expert that had no live rank; the mapping is its own inverse. */
static inline int32_t xccl_moe_missed(int32_t expert) {
    return -2 - expert;
}

/* Where a member's peer writes its line of an array of the metadata block. */
static inline uint64_t xccl_moe_line_of(const xccl_moe_t *moe, uint64_t array, int peer) {
    return moe->blocks.metadata + array + (uint64_t)peer * XCCL_LINE;
}

/* The own line that `peer` writes. */
static inline const void *xccl_moe_own_line(const xccl_moe_t *moe, uint64_t array, int peer) {
    return xccl_gas_local(moe->comm->world, xccl_moe_line_of(moe, array, peer));
}

static inline int xccl_moe_parity(uint64_t epoch) {
    return (int)(epoch % XCCL_MOE_PARITIES);
}

/* OK if an operation may start on the group and, unless NULL, the handle, which must be in `phase`. */
int xccl_moe_check(const xccl_moe_t *moe, const xccl_moe_handle_t *handle, xccl_moe_phase_t phase,
                   const char *operation);

/* Waits until the first word of every peer's line of an array is at least `epoch`. */
int xccl_moe_wait_all(xccl_moe_t *moe, uint64_t array, uint64_t epoch, const char *what, int64_t deadline);

/* Writes `epoch` to the own line of an array at all peers. Release: whoever sees it knows that what this
 * member read or wrote before is done. */
void xccl_moe_signal_all(xccl_moe_t *moe, uint64_t array, uint64_t epoch);

/* Makes sure that the first `bytes` of a stage have pages; *reserved is the high-water mark. */
int xccl_moe_reserve(xccl_moe_t *moe, uint64_t stage, uint64_t bytes, uint64_t *reserved);

/* Whether this dispatch writes its rows, `bytes` of them, past the caches. */
bool xccl_moe_streams(xccl_moe_t *moe, uint64_t epoch, uint64_t bytes);

/* Notes what pulling and summing of a handle took. */
void xccl_moe_learn(xccl_moe_t *moe, const xccl_moe_handle_t *handle, int64_t ns);

/* Memory for a handle with nothing in it, NULL and a message if there is none. */
xccl_moe_handle_t *xccl_moe_handle_new(const xccl_moe_t *moe, int64_t num_tokens);

/* Fills the table `route` from owners and mask. */
void xccl_moe_route(xccl_moe_t *moe);

/* Scales the weights of a token's terms for RENORMALIZE. False if they stay as they are. */
bool xccl_moe_renormalize(const xccl_moe_handle_t *handle, int64_t token, float *term_weights, size_t num_terms);

/* MISSING with a message if slots of the handle miss their expert and its policy is RAISE. */
int xccl_moe_judge(const xccl_moe_t *moe, const xccl_moe_handle_t *handle);

/* Copies topk_weights [num_tokens, num_topk] to the handle; NULL: none. */
void xccl_moe_keep_weights(const xccl_moe_t *moe, xccl_moe_handle_t *handle, const float *topk_weights);

#endif
