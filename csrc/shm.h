/* shm.h - layout of the shared object and a rank's view of it (shm layer; internal).
 *
 *   object    = control | window 0 | window 1 | ... | window size-1
 *   control   = header (one page) | abort text | rank table
 *   window    = boot | metadata area | managed data area | app data area | race checker       `stride` bytes each
 *   boot      = heap tables | one page per context (sync lines and agreement slots of a communicator)
 *
 * All references between ranks are offsets into a window, so no rank depends on where another one maps the
 * object; it is mapped at one address everywhere when that address is free.
 */
#ifndef XCCL_SHM_H
#define XCCL_SHM_H

#include <stdatomic.h>
#include <stdbool.h>

#include "xccl.h"
#include "wait.h"

enum { XCCL_LINE = 64, XCCL_PAGE = 4096, XCCL_MAX_CONTEXTS = 256, XCCL_AREAS = 3, XCCL_MAX_HOOKS = XCCL_MAX_CONTEXTS };

/* Byte of the object that its creator locks; those before it are the ranks'. See process.h. */
enum { XCCL_CREATOR_BYTE = XCCL_MAX_RANKS };

/* What a rank does; shown by hang reports and tools. Names in rank_table.c. */
typedef enum xccl_op_t {
    XCCL_OP_NONE,
    XCCL_OP_INIT,
    XCCL_OP_SPLIT,
    XCCL_OP_CLOSE,
    XCCL_OP_ALLOC,
    XCCL_OP_FREE,
    XCCL_OP_WAIT_UNTIL,
    XCCL_OP_SEND,
    XCCL_OP_RECV,
    XCCL_OP_WAIT,
    XCCL_OP_BARRIER,
    XCCL_OP_BROADCAST,
    XCCL_OP_ALL_GATHER,
    XCCL_OP_ALL_REDUCE,
    XCCL_OP_REDUCE_SCATTER,
    XCCL_OP_ALL_TO_ALL,
    XCCL_OP_ALL_TO_ALL_V,
    XCCL_OP_DISPATCH,
    XCCL_OP_COMBINE,
    XCCL_OP_EP_OPEN,
    XCCL_OP_EP_ALIVE,
    XCCL_OP_SHRINK,
    XCCL_OP_AE_OPEN,
    XCCL_OP_A2E,
    XCCL_OP_A2E_RECV,
    XCCL_OP_E2A_SEND,
    XCCL_OP_E2A,
    XCCL_OP_COUNT
} xccl_op_t;

/*   header (first page; written by the creator before anybody attaches, except the atomics)
 *   0        8    12   16             ...
 *   | magic  |abi |size| config ...   | base_hint | abort_rank |
 */
typedef struct xccl_header_t {
    uint64_t magic;
    uint32_t abi;
    uint32_t uid;
    xccl_config_t config;
    int64_t created_ns; /* CLOCK_MONOTONIC */
    int32_t creator_pid;
    int32_t held; /* the creator holds its byte while it lives: xccl_shm_hold */
    uint64_t control_bytes;
    uint64_t stride;
    uint64_t area_offset[XCCL_AREAS]; /* from the start of a window */
    uint64_t area_bytes[XCCL_AREAS];
    uint64_t race_offset;                     /* of the race checker's area, behind the others */
    _Alignas(64) _Atomic uint64_t base_hint;  /* address of the first mapping, 0: none yet */
    _Alignas(64) _Atomic int32_t abort_state; /* 0, or 1 while the text is written, or 2 */
    _Atomic int32_t abort_rank;               /* who aborted, -1: an observer */
} xccl_header_t;

/*   rank table entry: the words written by the rank itself and those written by others are on lines apart
 *   line 0  identity: process, state, its end       written by the rank, after its death by others; read in slow paths
 *   line 1  sleeping: bits, see wait.c              written by the rank, read at every signal
 *   line 2  bell                                    written by ringers: the futex word
 *   line 3  what it does: operation, sequence, ...  written by the rank, read by tools
 */
typedef struct xccl_rank_entry_t {
    _Alignas(64) _Atomic int32_t state;
    _Atomic int32_t pid;
    _Atomic uint64_t start_time;
    _Atomic uint64_t pid_namespace; /* in which pid and start time mean something; 0: none */
    _Atomic int32_t locked;         /* the rank holds its byte of the object, see process.h */
    _Atomic int32_t ended;          /* kind << 16 | number, see xccl_exit_t; by who reaped it, once; 0: not known */
    _Atomic int32_t reads_peers;    /* this and the next two: see cma.h */
    _Atomic uint64_t cma_address;
    _Atomic uint64_t cma_word;
    _Alignas(64) _Atomic uint32_t sleeping;
    _Alignas(64) _Atomic uint32_t bell;
    _Alignas(64) _Atomic uint64_t sequence;
    _Atomic int64_t moved_ns;
    _Atomic int32_t operation;
    _Atomic int32_t phase;
    _Atomic int32_t waits_for;
} xccl_rank_entry_t;

_Static_assert(sizeof(xccl_header_t) <= XCCL_PAGE, "the header is one page");
_Static_assert(sizeof(xccl_rank_entry_t) == 4 * XCCL_LINE, "a rank entry is four lines");
_Static_assert(offsetof(xccl_rank_entry_t, ended) == 28, "how a rank ended is on the line of its identity");

typedef struct xccl_hook_t {
    xccl_progress_fn progress;
    void *arg;
} xccl_hook_t;

/* The object as a process sees it. Ranks that are threads of one process share one. */
typedef struct xccl_mapping_t {
    unsigned char *base;
    uint64_t bytes;
    _Atomic int users;
} xccl_mapping_t;

/* One rank's attachment. No global state: several ranks may live in one process. */
struct xccl_world_t {
    int rank; /* -1: observer */
    int size;
    int fd; /* an open file description of its own, for its lock */
    bool detached;
    bool read_only;           /* an observer without the right to write */
    unsigned fork_generation; /* of the process that attached */
    uint64_t pid_namespace;   /* as in xccl_rank_entry_t */
    uint64_t cma_word;        /* peers that read it here can read this process: see cma.h */
    xccl_mapping_t *mapping;
    unsigned char *base; /* of the mapping */
    unsigned char *windows;
    uint64_t stride;
    unsigned char *own;     /* windows + rank*stride */
    xccl_header_t *control; /* in the object: for its atomics */
    xccl_header_t *header;  /* the rest, as it was verified: what happens to the object cannot change it */
    char *abort_text;
    xccl_rank_entry_t *ranks;
    xccl_ladder_t ladder;
    struct xccl_chaos_t *chaos; /* owned by chaos.c; NULL: off */
    bool fences_by_membarrier;  /* a rank that goes to sleep fences this process: see xccl_ring */
    int64_t timeout_ns;         /* default of blocking calls */
    uint64_t opened_sequence;   /* operations begun when the world was open: the next one is the user's first */
    int64_t slow_since;         /* when the current operation's clock started; 0: not yet */
    uint64_t streaming_bytes;   /* copies from this size on go around the caches, see copy.h */
    xccl_interrupt_fn interrupted;
    xccl_hook_t hooks[XCCL_MAX_HOOKS];
    int num_hooks;
    bool in_progress; /* a hook runs: hooks do not nest */
    uint64_t contexts_used[XCCL_MAX_CONTEXTS / 64];
    bool outlives_peers;                   /* the current wait goes on when ranks die */
    uint64_t mourned[XCCL_MAX_RANKS / 64]; /* dead ranks that shrink has dealt with */
    struct xccl_race_t *race;              /* owned by racecheck.c; NULL: off */
    struct xccl_faults_t *faults;          /* owned by faults.c; NULL: none are injected */
};

/* Reserves pages of the object; 0 or an errno. Never by writing, as posix_fallocate does where the file system cannot:
 * peers may be writing there. */
int xccl_shm_reserve(int fd, uint64_t offset, uint64_t bytes);

/* Note what this rank does. Relaxed stores to its own line: cheap, always on. OK, unless a fault is injected there. */
int xccl_op_begin(xccl_world_t *world, xccl_op_t op) __attribute__((warn_unused_result));
int xccl_op_phase(xccl_world_t *world, int phase) __attribute__((warn_unused_result));

/* Process of `rank` is gone or a zombie, though it never left; or it cannot come because the creator is gone. */
bool xccl_shm_is_dead(const xccl_world_t *world, int rank);

/* Name of an operation for messages. */
const char *xccl_op_name(int op);

/* "rank 2 (pid 123, alive): operation 118 (combine), phase 1, last moved 0.3 s ago" */
void xccl_shm_describe_rank(const xccl_world_t *world, int rank, char *out, size_t bytes);

/* Fails with PEER_LOST, naming the operation that cannot complete, and what is known of rank `lost` and its end. */
int xccl_shm_fail_lost(const xccl_world_t *world, int lost, const char *operation);

#endif
