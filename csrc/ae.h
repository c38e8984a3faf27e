/* ae.h - attention and experts on separate ranks: A2E and E2A (moe layer; internal).
 *
 * A domain is a group of attention ranks that share the expert ranks. The tokens of an attention rank lie, on their
 * way, in the window of its hub: of the attention rank itself on the direct path, of one of the expert ranks, its
 * trampoline, on the trampoline path (the paper's Fig. 8). The hub tells all expert ranks where the tokens are, and
 * sums the outputs that come back. So an attention rank writes one field a micro-batch instead of one an expert rank,
 * and both paths make the same sums, in the same order, by the same code.
 *
 *     attention --put--> hub's stage --arrived--> experts pull their rows
 *     attention <--put-- hub sums    <--outputs-- experts publish y
 *
 * Micro-batches of a domain count from 1 (epochs), are the same on all its ranks, and never restart. Micro-batch e
 * uses the half e % 2 of everything. An attention rank sends micro-batch e only when it has the sums of e - 2. These
 * it has only after every expert rank has pulled the tokens of e - 2 and its hub has read their outputs, so nothing
 * of a half is read any more when it is written again (bug classes 6, 7), and nobody needs to say so. Only an
 * expert's y that peers read in the caller's memory is the caller's again before that: its readers say when.
 *
 *   metadata block, one 64-byte line for each peer in each array, written by that peer
 *   | staged [2][slots] | arrived [2][A] | outputs [2][E] | read [2][hubs] | summed [2] |
 *     at trampolines      at experts       at hubs          at experts       at attention ranks
 *
 *   staging block
 *   | stages [2][slots] | outputs stage [2] | result stage [2] |
 *     at hubs             at experts          at attention ranks
 *
 *   stage         = | parts [E] | entries for each expert rank | routing [tokens][top-k] | scales | rows |
 *   outputs stage = | row_start [A][max_local_experts] | copy of y |
 *
 * A stage is written by its attention rank, an outputs stage by its owner, a result stage by the trampoline of its
 * owner. A hub has one slot for each of its attention ranks.
 */
#ifndef XCCL_AE_H
#define XCCL_AE_H

#include "comm.h"
#include "gas.h"
#include "heap.h"
#include "kernel.h"
#include "moe_open.h"
#include "moe_pull.h"

enum { XCCL_AE_PARITIES = 2, XCCL_AE_POOL_BUFFERS = 2 };

/* Sizes and offsets of the blocks; the only place where they are computed. Offsets are from the start of a block, or of
 * a stage. Arrays of the other path have no lines. */
typedef struct xccl_ae_layout_t {
    uint64_t num_hubs;
    uint64_t num_slots; /* of a hub */
    uint64_t max_local_experts;
    uint64_t row_bytes;      /* a row of x, y and recv_x */
    uint64_t staged_bytes;   /* a row in a stage: whole lines */
    uint64_t max_recv_bytes; /* all slots of all tokens come to one expert rank */

    uint64_t staged[XCCL_AE_PARITIES]; /* in the metadata block */
    uint64_t arrived[XCCL_AE_PARITIES];
    uint64_t outputs[XCCL_AE_PARITIES];
    uint64_t read[XCCL_AE_PARITIES];
    uint64_t summed[XCCL_AE_PARITIES];

    uint64_t stages[XCCL_AE_PARITIES]; /* in the staging block */
    uint64_t stage_bytes;
    uint64_t stage_entries; /* in a stage */
    uint64_t stage_routing;
    uint64_t stage_scales;
    uint64_t stage_rows;
    uint64_t outputs_stage[XCCL_AE_PARITIES];
    uint64_t outputs_copy; /* of y, in an outputs stage */
    uint64_t outputs_stage_bytes;
    uint64_t result_stage[XCCL_AE_PARITIES];
    uint64_t result_stage_bytes;

    xccl_moe_bytes_t bytes; /* of the three blocks */
} xccl_ae_layout_t;

/* USAGE for a bad configuration or one whose sizes leave 62 bits. `path` must not be AUTO. */
int xccl_ae_layout(const xccl_ae_config_t *config, const int32_t *owner, xccl_ae_layout_t *out);

/* The path that AUTO stands for. */
xccl_path_t xccl_ae_path(const xccl_ae_config_t *config);

/* The entries for one expert rank, in a stage. */
typedef struct xccl_ae_part_t {
    uint64_t offset; /* of the first, in the stage */
    uint64_t count;
} xccl_ae_part_t;
_Static_assert(sizeof(xccl_ae_part_t) == 16, "a part is read by peers");

/* What the hub needs to know of one slot of a token. */
typedef struct xccl_ae_choice_t {
    int32_t expert;    /* -1: none */
    uint32_t position; /* index among the rows of this attention rank for that expert */
    float weight;
    uint32_t unused;
} xccl_ae_choice_t;
_Static_assert(sizeof(xccl_ae_choice_t) == 16, "a choice is read by peers");

/* Each of its words is loaded once: what is checked is what is used. */
static inline xccl_ae_choice_t xccl_ae_read_choice(const xccl_ae_choice_t *choice) {
    const volatile xccl_ae_choice_t *read = choice;
    return (xccl_ae_choice_t){.expert = read->expert, .position = read->position, .weight = read->weight};
}

/* Where a hub finds the outputs of one expert rank: checked when it is filled. */
typedef struct xccl_ae_outputs_t {
    const unsigned char *y;
    uint64_t row_stride;
    uint64_t num_rows;
    const uint64_t *row_start; /* [A][max_local_experts] */
    bool in_place;             /* the expert rank waits until it has been read */
} xccl_ae_outputs_t;

typedef enum xccl_ae_phase_t {
    XCCL_AE_IDLE,      /* never used, or over */
    XCCL_AE_SENT,      /* attention rank: tokens published */
    XCCL_AE_RECEIVING, /* expert rank: begun */
    XCCL_AE_COUNTED,   /* all fields seen */
    XCCL_AE_RECEIVED,  /* rows pulled: outputs may be sent */
    XCCL_AE_SENDING    /* outputs published; sums to make, or y to be read */
} xccl_ae_phase_t;

/* A micro-batch as this rank knows it. */
typedef struct xccl_ae_batch_t {
    uint64_t epoch; /* 0: none yet */
    xccl_ae_phase_t phase;
    int64_t num_tokens;           /* attention rank */
    int64_t num_recv;             /* expert rank */
    bool forwarded;               /* trampoline: it has told the expert ranks */
    bool summed;                  /* trampoline: its attention ranks have their sums */
    bool in_place;                /* y is read in the caller's array */
    uint64_t *row_start;          /* [A][num_local_experts]: first received row of a source for an expert */
    int32_t *num_recv_per_expert; /* [num_local_experts] */
    uint64_t *slot_tokens;        /* [slots]: tokens staged in each of the own slots */
    xccl_moe_arrived_t arrived;   /* the entries of all attention ranks */
} xccl_ae_batch_t;

typedef struct xccl_ae_link_t xccl_ae_link_t;

/* `comm` is for opening, closing and the starts of calls: the rest, which a trampoline may do while it waits for
 * something else, also when the communicator is closed already, has world, rank and ranks of its own. */
struct xccl_ae_t {
    xccl_comm_t *comm;
    xccl_world_t *world;
    int rank;
    int *ranks; /* world rank of each member */
    xccl_ae_link_t *link;
    xccl_ae_config_t config; /* path is not AUTO */
    xccl_ae_layout_t layout;
    const xccl_kernel_t *kernel;
    xccl_moe_blocks_t blocks;
    uint64_t cached_bytes; /* of received rows that are written through the caches */
    uint64_t epoch;        /* of the last micro-batch begun here */
    uint64_t updates;      /* fields and signals written to peers */
    bool broken;           /* shared memory was damaged */
    xccl_ae_batch_t batch[XCCL_AE_PARITIES];

    int attention;            /* index of this rank among the attention ranks, -1 */
    int expert;               /* among the expert ranks, -1 */
    int hub;                  /* among the hubs, -1 */
    int32_t *attention_ranks; /* [A] members of comm, ascending */
    int32_t *expert_ranks;    /* [E] */
    int32_t *owner;           /* [num_experts] expert rank's index */
    int32_t *local_index;     /* [num_experts] index among its owner's experts */
    uint64_t *num_experts_of; /* [E] */

    uint64_t reserved[XCCL_AE_PARITIES];         /* bytes of this attention rank's stages that have pages, */
    uint64_t outputs_reserved[XCCL_AE_PARITIES]; /* of the outputs stages, */
    uint64_t result_reserved[XCCL_AE_PARITIES];  /* and of the result stages */

    xccl_moe_puller_t puller;
    xccl_ae_part_t *parts;         /* [E] scratch of a2e */
    xccl_moe_entry_t **next_entry; /* [E] scratch of a2e */
    uint32_t *expert_count;        /* [num_experts] scratch of a2e */
    xccl_ae_outputs_t *outputs;    /* [E] scratch of the sums */
    const void **terms;            /* [num_topk] scratch of the sums */
    float *term_weights;           /* [num_topk] */
};

static inline int xccl_ae_parity(uint64_t epoch) {
    return (int)(epoch % XCCL_AE_PARITIES);
}

static inline bool xccl_ae_is_direct(const xccl_ae_t *ae) {
    return ae->config.path == XCCL_PATH_DIRECT;
}

/* ---- who is where ---- */

/* Index of an attention rank's hub, and of its slot there. Attention ranks hub, hub + num_hubs, ... have the slots of a
 * hub. */
static inline int xccl_ae_hub_of(const xccl_ae_t *ae, int attention) {
    return (int)((uint64_t)attention % ae->layout.num_hubs);
}
static inline int xccl_ae_slot_of(const xccl_ae_t *ae, int attention) {
    return (int)((uint64_t)attention / ae->layout.num_hubs);
}

/* Slots of this hub that have an attention rank. */
static inline int xccl_ae_own_slots(const xccl_ae_t *ae) {
    int others = ae->config.num_attention_ranks - 1 - ae->hub;
    return ae->hub < 0 ? 0 : others / (int)ae->layout.num_hubs + 1;
}
static inline int xccl_ae_own_attention(const xccl_ae_t *ae, int slot) {
    return ae->hub + slot * (int)ae->layout.num_hubs;
}

/* Trampolines begin with config.first_trampoline, so that those of other domains are other ranks where possible. */
static inline int xccl_ae_hub_member(const xccl_ae_t *ae, int hub) {
    if (xccl_ae_is_direct(ae))
        return ae->attention_ranks[hub];
    return ae->expert_ranks[(ae->config.first_trampoline + hub) % ae->config.num_expert_ranks];
}

/* ---- where things lie ---- */

static inline uint64_t xccl_ae_line(const xccl_ae_t *ae, uint64_t array, int index) {
    return ae->blocks.metadata + array + (uint64_t)index * XCCL_LINE;
}

static inline const xccl_field_t *xccl_ae_own_line(const xccl_ae_t *ae, uint64_t array, int index) {
    return xccl_gas_local(ae->world, xccl_ae_line(ae, array, index));
}

/* Offset of a stage in the window of the hub. */
static inline uint64_t xccl_ae_stage(const xccl_ae_t *ae, uint64_t epoch, int slot) {
    return ae->blocks.staging + ae->layout.stages[xccl_ae_parity(epoch)] + (uint64_t)slot * ae->layout.stage_bytes;
}

/* ---- what the steps share ---- */

/* OK if `operation` may start on this rank, which must be one of the attention ranks, or of the expert ranks. */
int xccl_ae_check_attention(const xccl_ae_t *ae, const char *operation);
int xccl_ae_check_expert(const xccl_ae_t *ae, const char *operation);

/* The micro-batch of that epoch, if it is in flight and in that phase; else USAGE. */
int xccl_ae_find(xccl_ae_t *ae, uint64_t epoch, xccl_ae_phase_t phase, const char *operation, xccl_ae_batch_t **out);

/* Publishes a field, or a signal, at a member's line, and counts it. */
void xccl_ae_publish(xccl_ae_t *ae, int member, uint64_t line, uint64_t epoch, uint64_t offset, uint64_t count,
                     uint64_t time);
void xccl_ae_signal(xccl_ae_t *ae, int member, uint64_t line, uint64_t epoch);

/* Which member writes line `index` of an array. */
typedef int (*xccl_ae_writer_fn)(const xccl_ae_t *ae, int index);
int xccl_ae_staged_by(const xccl_ae_t *ae, int slot);
int xccl_ae_arrived_by(const xccl_ae_t *ae, int attention);
int xccl_ae_outputs_by(const xccl_ae_t *ae, int expert);
int xccl_ae_read_by(const xccl_ae_t *ae, int hub);
int xccl_ae_summed_by(const xccl_ae_t *ae, int unused);

/* The lines that an operation waits for: the first `count` of an array. */
typedef struct xccl_ae_lines_t {
    const xccl_ae_t *ae;
    uint64_t array;
    int count;
    uint64_t epoch;
    xccl_ae_writer_fn writer;
    const char *what;
    int arrived; /* lines below this one have arrived; epochs only grow, so they need no second look */
} xccl_ae_lines_t;

/* Whether all of them say at least `epoch`. Acquire: the fields, and what their writers did before, are visible. */
bool xccl_ae_have(xccl_ae_lines_t *lines);

/* Waits until they do. */
int xccl_ae_wait(xccl_ae_lines_t *lines, int64_t deadline);

/* Fails for a value that `member` wrote and that cannot be true; the domain cannot be used any more. */
int xccl_ae_damaged(xccl_ae_t *ae, const char *operation, int member, const char *field, uint64_t got, uint64_t least,
                    uint64_t most);

/* Makes sure that the first `bytes` at `offset` of a member's window have pages; *reserved is the high-water mark. */
int xccl_ae_reserve(const xccl_ae_t *ae, int member, uint64_t offset, uint64_t bytes, uint64_t *reserved);

/* ---- hubs ---- */

/* Tells the expert ranks what an attention rank of this hub has staged. */
void xccl_ae_tell_experts(xccl_ae_t *ae, uint64_t epoch, int attention, uint64_t num_tokens);

/* The outputs that a hub waits for. */
xccl_ae_lines_t xccl_ae_outputs_lines(const xccl_ae_t *ae, uint64_t epoch);

/* Finds them, when they have come. */
int xccl_ae_find_outputs(xccl_ae_t *ae, uint64_t epoch, const char *operation);

/* The sums of an attention rank of this hub: both paths come here. */
int xccl_ae_sum(xccl_ae_t *ae, uint64_t epoch, int attention, uint64_t num_tokens, const char *operation,
                unsigned char *out);

/* Tells the expert ranks that wait for it that their y has been read. */
void xccl_ae_say_read(xccl_ae_t *ae, uint64_t epoch);

/* ---- trampolines ---- */

/* A trampoline forwards, and sums, in its own calls and whenever it waits for anything: others wait for it. */

/* Does what can be done without waiting, and leaves the rest to the waits to come. */
int xccl_ae_help(xccl_ae_t *ae);

/* Waits until it has forwarded the micro-batch; until it has summed it. */
int xccl_ae_wait_forwarded(xccl_ae_t *ae, xccl_ae_batch_t *batch, int64_t deadline);
int xccl_ae_wait_summed(xccl_ae_t *ae, xccl_ae_batch_t *batch, int64_t deadline);

/* The link between the waits of a world and a domain. */
int xccl_ae_link(xccl_ae_t *ae);
void xccl_ae_unlink(xccl_ae_t *ae);

#endif
