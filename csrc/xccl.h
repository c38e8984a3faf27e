/* xccl.h - the public C API of xccl and its manual.
 *
 * xccl gives the processes ("ranks") of one machine a global address space in POSIX shared memory, with
 * one-sided put, get and signal; on it send/receive, collectives and MoE dispatch/combine.
 *
 *     moe          xccl_moe_*, xccl_ae_*      dispatch, combine; A2E, E2A
 *     p2p, coll    xccl_p2p_*, xccl_coll_*    send/receive; collectives
 *     gas          xccl_gas_*, xccl_heap_*    symmetric heap, put/get/signal/atomics
 *     shm          xccl_shm_*                 segment, rank table, wait/wake, liveness
 *
 * Conventions
 * - Every function that can fail returns an xccl_status_t: XCCL_OK, XCCL_AGAIN (not yet: try again) or a
 *   negative error. xccl_error_message() then describes the last error of the calling thread.
 * - Output arguments come last and are set only on success.
 * - A handle (world, communicator, request) belongs to one thread at a time.
 * - "pe" is a rank of the communicator given. Sizes and offsets are bytes, 64 bits wide. Times are nanoseconds.
 * - timeout_ns: XCCL_TIMEOUT_DEFAULT takes the configured one, XCCL_TIMEOUT_NONE waits without a deadline.
 * - "Collective" means that every member of the communicator calls it, in the same order.
 *
 * The binding is generated from this file: it holds declarations only, and preprocessor lines are skipped.
 */
#ifndef XCCL_H
#define XCCL_H

#include <stddef.h>
#include <stdint.h>

/* ---- status ------------------------------------------------------------------------------------------- */

typedef enum xccl_status_t {
    XCCL_OK = 0,
    XCCL_AGAIN = 1,            /* not complete yet, nothing changed */
    XCCL_ERR_USAGE = -1,       /* an argument or the order of calls is wrong */
    XCCL_ERR_TIMEOUT = -2,     /* the deadline passed; the message names what was awaited */
    XCCL_ERR_PEER_LOST = -3,   /* a rank that is waited for is dead or has left */
    XCCL_ERR_ABORTED = -4,     /* a rank raised an error and ended the world */
    XCCL_ERR_MEMORY = -5,      /* shared memory or address space is used up */
    XCCL_ERR_SYSTEM = -6,      /* a system call failed */
    XCCL_ERR_INTERRUPTED = -7, /* the interrupt hook asked to stop waiting (Ctrl-C) */
    XCCL_ERR_RACE = -8,        /* the race checker found two accesses that nothing orders */
    XCCL_ERR_MISSING = -9,     /* tokens chose experts without a live rank; the combine is complete */
    XCCL_ERR_INJECTED = -10    /* a fault that was injected on purpose, see xccl_fault_inject */
} xccl_status_t;

/* Text of the calling thread's last error; valid until its next failing call. */
const char *xccl_error_message(void);

/* World rank that this error is about: who aborted, is lost, or made the other access of a race. -1: none, or the
 * launcher. */
int xccl_error_rank(void);

/* ---- element types ------------------------------------------------------------------------------------ */

/* BYTES stands for any other type: it is moved, but not reduced. Rows of MoE are one of the first three. */
typedef enum xccl_dtype_t {
    XCCL_FLOAT32 = 0,
    XCCL_FLOAT16 = 1,
    XCCL_BFLOAT16 = 2,
    XCCL_FLOAT64 = 3,
    XCCL_BOOL = 4,
    XCCL_INT8 = 5,
    XCCL_INT16 = 6,
    XCCL_INT32 = 7,
    XCCL_INT64 = 8,
    XCCL_UINT8 = 9,
    XCCL_UINT16 = 10,
    XCCL_UINT32 = 11,
    XCCL_UINT64 = 12,
    XCCL_COMPLEX64 = 13,
    XCCL_COMPLEX128 = 14,
    XCCL_BYTES = 15
} xccl_dtype_t;

/* ---- shm: the shared object, the rank table ------------------------------------------------------------ */

typedef struct xccl_world_t xccl_world_t;

enum { XCCL_SESSION_BYTES = 32, XCCL_ABORT_TEXT_BYTES = 8192, XCCL_MAX_RANKS = 4096 };

#define XCCL_TIMEOUT_DEFAULT (-1)
#define XCCL_TIMEOUT_NONE    INT64_MAX

/* What the creator of a world fixes for all its ranks. Zero takes the value in brackets. */
typedef struct xccl_config_t {
    int32_t size;              /* ranks of the world */
    int32_t cores;             /* cores that the ranks share [those of the creator] */
    uint64_t heap_bytes;       /* address space of the app data area, and of the managed one, per rank [64 GiB] */
    uint64_t p2p_slot_bytes;   /* largest chunk of a message, and least one that a symmetric buffer is read in place for
                                  [64 KiB] */
    uint64_t p2p_slots;        /* chunks that a ring of send/receive holds, a power of two [twice the L2 cache] */
    uint64_t coll_block_bytes; /* chunks of collectives on ordinary arrays, for all peers; four of them are staged
                                  at a time [half the L2 cache] */
    uint64_t spin;             /* polls before a waiter yields [measured] */
    uint64_t yields;           /* yields before a waiter sleeps [measured] */
    int64_t timeout_ns;        /* default deadline of a blocking call [300 s] */
    int64_t init_timeout_ns;   /* deadline for all ranks to attach [600 s] */
    int64_t first_timeout_ns;  /* default deadline of a rank's first operation [twice timeout_ns] */
    char session[32];          /* random id of the world, NUL-terminated */
    uint64_t chaos;            /* seed of perturbations, see below; 0: none [0] */
    int32_t racecheck;         /* 1: look for races, see below [0] */
    int32_t no_cma;            /* 1: peers do not read each other's ordinary memory through the kernel [0] */
} xccl_config_t;

/* A rank's state as others see it. */
typedef enum xccl_rank_state_t {
    XCCL_RANK_ABSENT = 0,
    XCCL_RANK_ATTACHED = 1,
    XCCL_RANK_CLOSED = 2, /* left in order */
    XCCL_RANK_DEAD = 3,   /* its process is gone without having left */
    XCCL_RANK_STOPPED = 4 /* attached, and its process is stopped: by SIGSTOP or a debugger */
} xccl_rank_state_t;

/* How the process of a rank ended, as far as whoever reaped it told. */
typedef enum xccl_exit_t {
    XCCL_EXIT_UNKNOWN = 0,
    XCCL_EXIT_CODE = 1,   /* by itself, with this exit code */
    XCCL_EXIT_SIGNAL = 2, /* killed by this signal */
    XCCL_EXIT_MEMORY = 3  /* killed by the kernel because memory ran out */
} xccl_exit_t;

typedef struct xccl_rank_info_t {
    int32_t state; /* xccl_rank_state_t */
    int32_t pid;
    uint64_t start_time; /* of the process, in clock ticks after boot */
    char operation[24];  /* current or last operation */
    uint64_t sequence;   /* operations begun so far */
    int32_t phase;       /* step inside the operation, its own numbering */
    int32_t waits_for;   /* world rank that it waits for first, -1: none */
    int64_t moved_ns;    /* when operation or phase last changed, CLOCK_MONOTONIC */
    char cause[32];      /* of a dead rank's end: "killed by SIGKILL"; empty: not known */
    int32_t
        reads_peers; /* 1: it reads the ordinary memory of its peers through the kernel: one copy for large messages */
} xccl_rank_info_t;

/* What a world is, for tools. */
typedef struct xccl_session_info_t {
    char session[32]; /* as in xccl_config_t */
    int32_t size;
    int32_t creator_pid; /* launcher, or rank 0 */
    int64_t created_ns;  /* CLOCK_MONOTONIC */
    int32_t aborted;     /* 1: ended by xccl_shm_abort */
} xccl_session_info_t;

/* One thing that a wait lacked when it timed out. */
typedef struct xccl_missing_t {
    int32_t rank;      /* world rank that was to bring it, -1: any */
    uint64_t expected; /* in the unit of the slot: an epoch, a counter, a signal's value */
    uint64_t seen;
    char what[40];
    xccl_rank_info_t info; /* of that rank, at that time */
} xccl_missing_t;

/* The index-th slot that the calling thread's last TIMEOUT lacked; XCCL_AGAIN if there are fewer (16 are kept). */
int xccl_error_missing(int index, xccl_missing_t *out);

/* What the calling thread's last PEER_LOST knew of the rank that xccl_error_rank names. */
void xccl_error_lost(xccl_rank_info_t *out);

/* Bytes of the shared object (address space; pages are reserved when they are allocated). */
uint64_t xccl_shm_object_bytes(const xccl_config_t *config);

/* Sizes the fresh, empty object `fd` and writes its control page. Called once, by the creator. */
int xccl_shm_format(int fd, const xccl_config_t *config);

/* Marks the calling process as the creator for as long as it has `fd` open. Ranks must get another
 * one, which refers to the object opened anew. Once the creator is gone, ranks that have not attached count as dead. */
int xccl_shm_hold(int fd);

/* 1 if the creator of the object lives and holds it (see xccl_shm_hold), 0 if not, USAGE if `fd` is no xccl object.
 * Not for the creator's own `fd`. */
int xccl_shm_is_held(int fd);

/* Maps the object as `rank` after verifying magic, ABI, session, owner and layout. `fd` is opened anew.
 * Raises USAGE when the rank is taken (a forked or spawned child of a rank attaches again). */
int xccl_shm_attach(int fd, int rank, const char *session, xccl_world_t **out);

/* Attaches `rank` for another thread of the process in which `beside` is attached. The two ranks share one mapping of
 * the object, which lives as long as either; otherwise they are as apart as ranks of two processes. */
int xccl_shm_attach_beside(const xccl_world_t *beside, int rank, xccl_world_t **out);

/* Waits until all ranks have attached. */
int xccl_shm_wait_all_attached(xccl_world_t *world, int64_t timeout_ns);

/* Leaves the world: peers that still wait for this rank get PEER_LOST. The mapping stays readable. */
void xccl_shm_detach(xccl_world_t *world);

/* Unmaps and frees. No pointer into the world may be used afterwards. */
void xccl_shm_unmap(xccl_world_t *world);

/* Default deadline of this rank's blocking calls, instead of the world's. */
void xccl_shm_set_timeout(xccl_world_t *world, int64_t timeout_ns);

int xccl_shm_rank(const xccl_world_t *world);
int xccl_shm_size(const xccl_world_t *world);

/* Ends the world: every blocked or later call of every rank fails with ABORTED and carries `text`.
 * The first caller wins. */
void xccl_shm_abort(xccl_world_t *world, const char *text);

/* 1 if the world was ended by xccl_shm_abort, else 0. *out_rank is who did it, -1 an observer (the launcher);
 * `text` gets its message. Both may be NULL. */
int xccl_shm_is_aborted(const xccl_world_t *world, int *out_rank, char *text, size_t text_bytes);

/* State of any rank. Also usable by an observer (see xccl_shm_observe). */
int xccl_shm_rank_info(const xccl_world_t *world, int rank, xccl_rank_info_t *out);

/* Maps only the control page, without becoming a rank: for launchers and tools. End with xccl_shm_unmap.
 * A descriptor that is open for reading only is enough; such an observer changes nothing and cannot abort. */
int xccl_shm_observe(int fd, xccl_world_t **out);

/* Tells the ranks how the process of `rank` ended, and wakes them. For whoever has reaped it. Nothing happens if it
 * lives or has left in order. */
void xccl_shm_note_exit(xccl_world_t *world, int rank, xccl_exit_t kind, int number);

/* What the observed or attached world is. */
void xccl_shm_session_info(const xccl_world_t *world, xccl_session_info_t *out);

/* Called between sleeps of a waiting rank; non-zero ends the wait with INTERRUPTED. */
typedef int (*xccl_interrupt_fn)(void);
void xccl_shm_set_interrupt(xccl_world_t *world, xccl_interrupt_fn interrupted);

/* The kernel ends this process when the thread that created it ends (so no orphan outlives its launcher). */
int xccl_shm_die_with_parent(int parent_pid);

/* The kernel's word to a rank that is not a child of its launcher (a shell may stand between): a thread ends this
 * process when the creator of the world ends. */
int xccl_shm_die_with_creator(xccl_world_t *world);

/* ---- shm: injected faults -------------------------------------------------------------------------------- */

/* What a fault does to its rank. */
typedef enum xccl_fault_action_t {
    XCCL_FAULT_KILL = 0,   /* SIGKILL */
    XCCL_FAULT_STOP = 1,   /* SIGSTOP; SIGCONT follows after `ns`, never with 0 */
    XCCL_FAULT_DELAY = 2,  /* sleeps for `ns` */
    XCCL_FAULT_RAISE = 3,  /* the call fails with INJECTED: at the begin of an operation before anything has happened */
    XCCL_FAULT_CORRUPT = 4 /* flips `bits` in the next control line that the rank publishes to another one */
} xccl_fault_action_t;

enum { XCCL_FAULT_ANY_OPERATION = -1 };

/* Phase: the operation comes to wait for others. It has published what it can by then. */
enum { XCCL_FAULT_WAITS = -1 };

/* A fault strikes when its rank comes for the nth time to a phase of an operation. */
typedef struct xccl_fault_t {
    int32_t operation; /* see xccl_fault_operation */
    int32_t phase;     /* as in xccl_rank_info_t: 0 when it begins */
    int32_t action;    /* xccl_fault_action_t */
    int32_t word;      /* corrupt: 0 is the word that publishes its line, 1 to 7 are those that follow */
    uint64_t nth;      /* counted from 1 since the injection; 0: each time */
    int64_t ns;
    uint64_t bits;
} xccl_fault_t;

/* Name of the operation with this number, as xccl_rank_info_t has it, also of put, get, put_signal, signal_op and
 * atomic, which it does not show; NULL beyond the last. */
const char *xccl_fault_operation(int operation);

/* From now on these faults strike this rank, instead of earlier ones; with count 0 none. For tests. USAGE if one makes
 * no sense, or would kill or stop a process with several ranks. */
int xccl_fault_inject(xccl_world_t *world, const xccl_fault_t *faults, int count);

/* ---- communicators ------------------------------------------------------------------------------------- */

typedef struct xccl_comm_t xccl_comm_t;

/* The communicator of all ranks, with its send/receive rings and collective fields. Collective. */
int xccl_comm_open(xccl_world_t *world, xccl_comm_t **out);

/* Members with the same color form a new communicator, ordered by (key, rank). Negative color: none, *out is
 * NULL. Collective over `parent`. */
int xccl_comm_split(xccl_comm_t *parent, int64_t color, int64_t key, int64_t timeout_ns, xccl_comm_t **out);

/* The members that live form a new communicator, in the old order; `parent` is unusable from then on, and is to be
 * discarded. To be called by all survivors, after a call on `parent` failed with PEER_LOST. All get the same members,
 * even if more die meanwhile (those may be among them: the next call then says so). Deaths outside the new communicator
 * no longer end waits. TIMEOUT names the members that neither came nor died; the call may be repeated then. */
int xccl_comm_shrink(xccl_comm_t *parent, int64_t timeout_ns, xccl_comm_t **out);

/* Completes pending sends, then releases the communicator. Collective for a communicator made by split;
 * for that of the world every rank leaves by itself. After an abort, or a failed collective, it only frees the handle.
 */
int xccl_comm_close(xccl_comm_t *comm, int64_t timeout_ns);

/* Frees the local handle without talking to anybody: after an error, or at exit. */
void xccl_comm_discard(xccl_comm_t *comm);

int xccl_comm_rank(const xccl_comm_t *comm);
int xccl_comm_size(const xccl_comm_t *comm);
/* World rank of member `pe`. */
int xccl_comm_world_rank(const xccl_comm_t *comm, int pe);

/* ---- gas: symmetric heap ------------------------------------------------------------------------------- */

/* Areas of a rank's window. Users allocate in APP, the library in META and MANAGED. */
typedef enum xccl_area_t { XCCL_AREA_META = 0, XCCL_AREA_MANAGED = 1, XCCL_AREA_APP = 2 } xccl_area_t;

typedef enum xccl_heap_flags_t {
    XCCL_HEAP_COMMIT = 0,      /* reserve the pages now */
    XCCL_HEAP_ADDRESS_ONLY = 1 /* take address space only; xccl_heap_commit reserves pages later */
} xccl_heap_flags_t;

/* Allocates `bytes` zeroed bytes at one offset of every member's window; page granularity.
 * `tag` is any number that must be equal on all members (a hash of shape and dtype, say). Collective.
 * A member that asks for something else is named in a USAGE error on all members; MEMORY tells needed and free. */
int xccl_heap_alloc(xccl_comm_t *comm, xccl_area_t area, uint64_t bytes, int flags, uint64_t tag, int64_t timeout_ns,
                    uint64_t *out_offset);

/* Gives the block at `offset` back, after all members have arrived. Collective. */
int xccl_heap_free(xccl_comm_t *comm, xccl_area_t area, uint64_t offset, int64_t timeout_ns);

/* Reserves the pages of [offset, offset+bytes) of the own window, so that touching them cannot fail. Local. */
int xccl_heap_commit(xccl_world_t *world, uint64_t offset, uint64_t bytes);

/* Bytes that this rank has allocated in an area (address space, whether its pages are reserved or not). */
uint64_t xccl_heap_used(const xccl_world_t *world, xccl_area_t area);

/* ---- gas: put, get, signal ----------------------------------------------------------------------------- */

typedef enum xccl_signal_op_t { XCCL_SIGNAL_SET = 0, XCCL_SIGNAL_ADD = 1 } xccl_signal_op_t;
typedef enum xccl_cmp_t {
    XCCL_CMP_EQ = 0,
    XCCL_CMP_NE = 1,
    XCCL_CMP_GT = 2,
    XCCL_CMP_GE = 3,
    XCCL_CMP_LT = 4,
    XCCL_CMP_LE = 5
} xccl_cmp_t;
typedef enum xccl_atomic_op_t {
    XCCL_ATOMIC_FETCH = 0,
    XCCL_ATOMIC_FETCH_ADD = 1,
    XCCL_ATOMIC_SWAP = 2,
    XCCL_ATOMIC_COMPARE_SWAP = 3
} xccl_atomic_op_t;

/* Addresses named "symmetric" are local addresses of symmetric memory; the peer's copy is at the same offset. */

/* Address of offset `offset` of the own window. */
void *xccl_gas_local(const xccl_world_t *world, uint64_t offset);

/* Offset of [address, address+bytes) in the own window; USAGE unless it lies in one live allocation. */
int xccl_gas_offset(const xccl_world_t *world, const void *address, uint64_t bytes, uint64_t *out_offset);

/* Address at which this process sees pe's copy of symmetric [address, address+bytes). */
int xccl_gas_ptr(const xccl_comm_t *comm, const void *symmetric, uint64_t bytes, int pe, void **out);

/* Copies `bytes` to pe's copy of `dst`. Complete (visible) after quiet or a later put_signal to the same pe. */
int xccl_gas_put(xccl_comm_t *comm, void *dst, const void *src, uint64_t bytes, int pe);

/* Copies `bytes` from pe's copy of `src`. Complete on return. */
int xccl_gas_get(xccl_comm_t *comm, void *dst, const void *src, uint64_t bytes, int pe);

/* put, then the signal: whoever sees the signal sees the data. `signal` is a symmetric uint64. */
int xccl_gas_put_signal(xccl_comm_t *comm, void *dst, const void *src, uint64_t bytes, uint64_t *signal, uint64_t value,
                        xccl_signal_op_t op, int pe);

/* Sets or adds to pe's copy of `signal`, after all earlier puts of this rank to that pe. */
int xccl_gas_signal_op(xccl_comm_t *comm, uint64_t *signal, uint64_t value, xccl_signal_op_t op, int pe);

/* Waits until the own copy of `signal` compares true; everything ordered before the signal is visible then. */
int xccl_gas_wait_until(xccl_comm_t *comm, uint64_t *signal, xccl_cmp_t cmp, uint64_t value, int64_t timeout_ns,
                        uint64_t *out_seen);

/* Ranks that name each other as `pe` pass a word to and fro in `signal` (symmetric, equal on both, used for nothing
 * else): `rounds` times there and back. `out_ns` is the time of all. It measures the machine: one way is a cache line
 * from core to core. */
int xccl_gas_bounce(xccl_comm_t *comm, uint64_t *signal, int pe, uint64_t rounds, int64_t timeout_ns, uint64_t *out_ns);

/* Returns when all members have arrived; all their earlier puts are visible then. Collective. */
int xccl_gas_sync(xccl_comm_t *comm, int64_t timeout_ns);

/* Orders earlier puts before later puts, to each pe. */
void xccl_gas_fence(xccl_comm_t *comm);
/* Completes all earlier puts. */
void xccl_gas_quiet(xccl_comm_t *comm);

/* One atomic operation on pe's copy of `target`, width 4 or 8 bytes, sequentially consistent.
 * COMPARE_SWAP stores `value` if the target equals `compare`. *out_old is the value before. */
int xccl_gas_atomic(xccl_comm_t *comm, void *target, int width, xccl_atomic_op_t op, uint64_t value, uint64_t compare,
                    int pe, uint64_t *out_old);

/* ---- shm: chaos ------------------------------------------------------------------------------------------- */

/* In a world with chaos > 0 each rank pauses at random where ranks wait for each other, and its puts become visible in
 * any order that is not ruled out by what is promised; the same seed does it in the same way. Messages of errors name
 * the seed. */

/* The seed of this rank; 0: it is not perturbed. An observer sees the one that the world began with. */
uint64_t xccl_chaos_seed(const xccl_world_t *world);

/* Begins anew with another seed, on this rank. It must be > 0, and the world made with chaos. For tests: many seeds in
 * one world. */
int xccl_chaos_reseed(xccl_world_t *world, uint64_t seed);

/* ---- gas: the race checker ------------------------------------------------------------------------------ */

/* In a world with racecheck = 1, each operation notes what it reads and writes in the app data area, and fails with
 * RACE if another rank reads or writes the same bytes, one of the two writes, and no signal, atomic, message or
 * collective orders them. The message names both. Elsewhere the functions here do nothing. */

int xccl_race_is_on(const xccl_world_t *world);

/* Makes a number of this rank for a place in the program, for reports; *out is 0 when there are too many. */
int xccl_race_add_site(xccl_world_t *world, const char *text, uint32_t *out);

/* The operations that follow are at `site`. */
void xccl_race_set_site(xccl_world_t *world, uint32_t site);

/* The array that begins at `address` of the own window is described by the text of `site`. */
void xccl_race_label(xccl_world_t *world, const void *address, uint32_t site);

/* This rank reads or writes [address, address+bytes) of any window by itself, until its next operation. */
int xccl_race_declare(xccl_comm_t *comm, const void *address, uint64_t bytes, int is_write);

/* ---- p2p: send and receive ------------------------------------------------------------------------------ */

enum { XCCL_ANY_SOURCE = -1, XCCL_ANY_TAG = -1 };

typedef enum xccl_send_mode_t {
    XCCL_SEND_DEFAULT = 0, /* complete when the buffer may be used again */
    XCCL_SEND_SYNC = 1     /* complete when the receiver has acknowledged the message */
} xccl_send_mode_t;

/* What was received, or found by probe. */
typedef struct xccl_message_t {
    int32_t source;
    int64_t tag;
    uint64_t bytes;
} xccl_message_t;

typedef struct xccl_request_t xccl_request_t;

/* Messages of one source and tag are received in the order of the sends. A tag is any number from 0 to INT64_MAX,
 * the event id of the protocol. A large message, and any one from a large symmetric buffer (p2p_slot_bytes or more:
 * the receiver copies it straight from there), completes only while the receiver receives it; smaller ones complete
 * as long as the ring has room, and every message to the own rank does. A send that fails (timeout, interrupt, peer
 * lost) withdraws its message, unless the status says otherwise, and leaves the communicator usable. */
int xccl_p2p_send(xccl_comm_t *comm, const void *buffer, uint64_t bytes, int dest, int64_t tag, xccl_send_mode_t mode,
                  int64_t timeout_ns);

/* Receives a message of exactly `bytes`. One of another size is a USAGE error that names both, and stays queued. A
 * receive that fails consumes nothing. With XCCL_ANY_SOURCE the sources take turns. */
int xccl_p2p_recv(xccl_comm_t *comm, void *buffer, uint64_t bytes, int source, int64_t tag, int64_t timeout_ns,
                  xccl_message_t *out);

/* The buffer belongs to the operation until it is complete. Progress is made in every blocking call of this rank, on
 * any communicator of the world, and in test. Receives match in posting order. */
int xccl_p2p_isend(xccl_comm_t *comm, const void *buffer, uint64_t bytes, int dest, int64_t tag, xccl_send_mode_t mode,
                   xccl_request_t **out);
int xccl_p2p_irecv(xccl_comm_t *comm, void *buffer, uint64_t bytes, int source, int64_t tag, xccl_request_t **out);

/* OK when complete, XCCL_AGAIN while not, or the error with which it ended. A send sets source to the own rank. */
int xccl_p2p_request_test(xccl_request_t *request, xccl_message_t *out);
/* A wait that fails (timeout, ...) leaves the request pending, and may be repeated. */
int xccl_p2p_request_wait(xccl_request_t *request, int64_t timeout_ns, xccl_message_t *out);
/* Complete or failed. Makes no progress. */
int xccl_p2p_request_is_done(const xccl_request_t *request);
/* Gives the handle up. A pending operation still completes, and needs its buffer until then. */
void xccl_p2p_request_free(xccl_request_t *request);

/* Waits for a message that recv would take now, and leaves it where it is. */
int xccl_p2p_probe(xccl_comm_t *comm, int source, int64_t tag, int64_t timeout_ns, xccl_message_t *out);
/* The same without waiting: XCCL_AGAIN if there is none. */
int xccl_p2p_iprobe(xccl_comm_t *comm, int source, int64_t tag, xccl_message_t *out);

/* ---- moe: dispatch and combine ------------------------------------------------------------------------ */

/* How dispatch carries a row: as it is, or as int8 with one float32 scale (max|x| / 127). */
typedef enum xccl_quant_t { XCCL_QUANT_NONE = 0, XCCL_QUANT_INT8 = 1 } xccl_quant_t;

/* Vector width of the arithmetic; AUTO is the widest that the processor has. All give the same bits. */
typedef enum xccl_simd_t {
    XCCL_SIMD_AUTO = 0,
    XCCL_SIMD_SCALAR = 1,
    XCCL_SIMD_AVX2 = 2,
    XCCL_SIMD_AVX512 = 3
} xccl_simd_t;

/* An expert-parallel group: the experts of one MoE layer shape, spread over the members of a communicator.
 * It belongs to one thread. All its operations are collective: a member without tokens takes part with none.
 *
 *     dispatch    send -> wait -> pull         tokens to the ranks of their experts
 *     combine     send -> wait                 outputs of the experts back to the tokens, summed
 *
 * `send` publishes this member's part and does not wait for that of others; whatever lies between send and
 * wait overlaps with the peers. Two dispatches and two combines may be in flight. Every step that fails with
 * TIMEOUT or INTERRUPTED may be called again. */
typedef struct xccl_moe_t xccl_moe_t;

/* One dispatch of one member: what it sent where, and what it received. Combine needs it, once. */
typedef struct xccl_moe_handle_t xccl_moe_handle_t;

/* What combine does about a token with an expert that had no live rank when it was dispatched. Each sum of weights
 * is in float32 over the slots in ascending order; without weights each slot weighs 1.
 *   RAISE        sums as ZERO does, completes, then returns MISSING
 *   RENORMALIZE  each weight w becomes w / (sum over the live experts) * (sum over all experts of the token). Where a
 *                weight is negative or NaN, or a sum 0 or infinite, they stay as they are
 *   ZERO         sums over the live experts
 * With each of them a token without any live expert gets zeros. */
typedef enum xccl_on_missing_t {
    XCCL_MISSING_RAISE = 0,
    XCCL_MISSING_RENORMALIZE = 1,
    XCCL_MISSING_ZERO = 2
} xccl_on_missing_t;

/* Equal on all members, except simd and on_missing. */
typedef struct xccl_moe_config_t {
    int64_t num_experts;
    int64_t hidden;         /* elements of a row */
    int64_t num_topk;       /* expert slots of a token */
    int64_t num_max_tokens; /* the most tokens that a member dispatches at once */
    xccl_dtype_t dtype;
    xccl_quant_t quant;
    xccl_simd_t simd;
    xccl_on_missing_t on_missing;
} xccl_moe_config_t;

/* Address space of each member's window that a group takes, in bytes. Pages are reserved only up to what
 * routings really used, so this is the upper bound of the memory. */
typedef struct xccl_moe_bytes_t {
    uint64_t metadata; /* fields and signals; reserved at open */
    uint64_t staging;  /* rows on their way, for two dispatches and two combines */
    uint64_t pool;     /* for the caller's received rows and expert outputs */
} xccl_moe_bytes_t;

/* What xccl_moe_open will take with these arguments: the same computation. owner[expert] is the member that
 * holds it, -1 if none does. Local. */
int xccl_moe_bytes(const xccl_moe_config_t *config, int num_ranks, const int32_t *owner, xccl_moe_bytes_t *out);

/* Opens a group over `comm`. A member whose arguments differ is named in a USAGE error on all members. Collective. */
int xccl_moe_open(xccl_comm_t *comm, const xccl_moe_config_t *config, const int32_t *owner, int64_t timeout_ns,
                  xccl_moe_t **out);

/* Gives the blocks back and frees the group; USAGE while a dispatch or combine is in flight. If any member
 * passes keep_pool, the pool stays reserved until the world ends, for arrays still in it. Collective. */
int xccl_moe_close(xccl_moe_t *moe, int keep_pool, int64_t timeout_ns);

/* Frees the local state without talking to anybody: after an error, or at exit. */
void xccl_moe_discard(xccl_moe_t *moe);

/* Offset in the own window, and bytes, of the pool: address space for rows that peers may read in place.
 * Its owner decides what lies where and reserves pages with xccl_heap_commit. */
void xccl_moe_pool(const xccl_moe_t *moe, uint64_t *out_offset, uint64_t *out_bytes);

/* Says which members are alive [comm size], 0 or 1; at first all are. Dispatches sent from now on skip the experts
 * of the others, which still take part in every call; a handle keeps what held at its dispatch. USAGE on all members,
 * naming rank, got and expected, if it differs between them; then nothing changed. May be called while operations are
 * in flight. Collective. */
int xccl_moe_set_alive(xccl_moe_t *moe, const unsigned char *alive, int64_t timeout_ns);

/* Stages and publishes the rows of x [num_tokens, hidden]. topk_idx [num_tokens, num_topk]: experts, -1 for
 * none. topk_weights (may be NULL) are kept for combine. All arrays may be reused on return. Waits only for the
 * receivers of the last dispatch but one. USAGE names the token and slot of a bad id. */
int xccl_moe_dispatch_send(xccl_moe_t *moe, const void *x, int64_t num_tokens, const int64_t *topk_idx,
                           const float *topk_weights, int64_t timeout_ns, xccl_moe_handle_t **out);

/* Waits for the parts of all members. Gives the number of rows to receive, in all and for each local expert. */
int xccl_moe_dispatch_wait(xccl_moe_t *moe, xccl_moe_handle_t *handle, int64_t timeout_ns, int64_t *out_num_recv,
                           int32_t *out_num_recv_per_expert);

/* Writes the rows to recv_x [num_recv, hidden] in the order (local expert, source, token, slot), and where
 * each comes from to src_rank and src_token [num_recv]. With `scales` (quantised groups only), recv_x gets the
 * int8 rows and scales [num_recv] theirs; with NULL rows are in dtype. Does not wait. */
int xccl_moe_dispatch_pull(xccl_moe_t *moe, xccl_moe_handle_t *handle, void *recv_x, float *scales, int32_t *src_rank,
                           int32_t *src_token);

/* Publishes y [num_recv, hidden], whose rows are `row_stride` bytes apart and in the order of the dispatch. A y in
 * symmetric memory of the own window is read there by the peers: it must not change before the wait has returned.
 * Any other y is copied. topk_weights (may be NULL) replace those given to dispatch. */
int xccl_moe_combine_send(xccl_moe_t *moe, xccl_moe_handle_t *handle, const void *y, uint64_t row_stride,
                          const float *topk_weights, int64_t timeout_ns);

/* Waits for the outputs of all members and writes the weighted sums to out [num_tokens, hidden]. Returns
 * when no member reads y any more, if it was read in place. MISSING, for which see xccl_on_missing_t, is no failure
 * of the group: out is written, the handle used. */
int xccl_moe_combine_wait(xccl_moe_t *moe, xccl_moe_handle_t *handle, void *out, int64_t timeout_ns);

/* Another policy than the group's for this handle. Local; before xccl_moe_combine_wait. */
void xccl_moe_on_missing(xccl_moe_handle_t *handle, xccl_on_missing_t policy);

/* What each token lacks [num_tokens]: the sum of the weights of its experts without a live rank (their number, without
 * weights), and how many of its slots name such an expert and a live one. Weights are those of combine once it was
 * sent with some, before that those of dispatch. Local; the group may be closed already. */
void xccl_moe_missing(const xccl_moe_handle_t *handle, float *out_weight, int32_t *out_num_missing,
                      int32_t *out_num_kept);

/* Frees a handle, NULL too; not while its dispatch or combine is in flight. The group may be closed already. */
void xccl_moe_handle_free(xccl_moe_handle_t *handle);

/* ---- moe: attention and experts on separate ranks ------------------------------------------------------- */

/* The way of tokens from attention ranks to expert ranks (A2E) and of outputs back (E2A).
 * DIRECT: every attention rank tells every expert rank, and sums the outputs itself. TRAMPOLINE: each attention rank
 * has one of the first expert ranks as its trampoline, writes its tokens there and tells only that one; the trampoline
 * tells the others, and sums. Both give the same bits. AUTO: TRAMPOLINE if there are fewer attention ranks than expert
 * ranks. */
typedef enum xccl_path_t { XCCL_PATH_AUTO = 0, XCCL_PATH_DIRECT = 1, XCCL_PATH_TRAMPOLINE = 2 } xccl_path_t;

/* One domain: attention ranks that send together, and the expert ranks. It belongs to one thread. Each attention rank
 * calls a2e, then e2a; each expert rank the others, for the same micro-batches:
 *
 *     attention ranks    a2e ------------------------------------------------------> e2a
 *     expert ranks       recv_begin -> recv_wait -> recv_pull -> send_begin -> send_finish
 *
 * Two micro-batches may be in flight, and complete in any order. Ranks without tokens, or rows, take part with none.
 * Every step that fails with TIMEOUT or INTERRUPTED may be called again. */
typedef struct xccl_ae_t xccl_ae_t;

/* Equal on all members, except layer.simd. */
typedef struct xccl_ae_config_t {
    xccl_moe_config_t layer; /* num_max_tokens is that of an attention rank */
    xccl_path_t path;
    int32_t num_attention_ranks;
    int32_t num_expert_ranks;
    int32_t first_trampoline; /* index of the expert rank that is the first: others for other domains */
} xccl_ae_config_t;

/* What xccl_ae_open will take with these arguments. owner[expert] is the index of its expert rank. Local. */
int xccl_ae_bytes(const xccl_ae_config_t *config, const int32_t *owner, xccl_moe_bytes_t *out);

/* Opens a domain. attention_ranks and expert_ranks are members of `comm`, each ascending, none in both; members in
 * neither take part in opening and closing only. Collective over `comm`. */
int xccl_ae_open(xccl_comm_t *comm, const xccl_ae_config_t *config, const int32_t *attention_ranks,
                 const int32_t *expert_ranks, const int32_t *owner, int64_t timeout_ns, xccl_ae_t **out);

/* As xccl_moe_close. USAGE while a micro-batch is in flight here. Collective. */
int xccl_ae_close(xccl_ae_t *ae, int keep_pool, int64_t timeout_ns);

/* As xccl_moe_discard and xccl_moe_pool. */
void xccl_ae_discard(xccl_ae_t *ae);
void xccl_ae_pool(const xccl_ae_t *ae, uint64_t *out_offset, uint64_t *out_bytes);

/* The path that is taken, never AUTO. */
xccl_path_t xccl_ae_taken_path(const xccl_ae_t *ae);

/* Fields and signals that this rank has written to other ranks so far. */
uint64_t xccl_ae_updates(const xccl_ae_t *ae);

/* Attention rank: stages and publishes the rows of x [num_tokens, hidden]; arguments as in xccl_moe_dispatch_send.
 * Does not wait. Gives the number of the micro-batch, from 1. USAGE if two are in flight already. */
int xccl_ae_a2e(xccl_ae_t *ae, const void *x, int64_t num_tokens, const int64_t *topk_idx, const float *topk_weights,
                uint64_t *out_batch);

/* Attention rank: waits for the outputs of the micro-batch, and writes the weighted sums to out [num_tokens, hidden].
 */
int xccl_ae_e2a(xccl_ae_t *ae, uint64_t batch, void *out, int64_t timeout_ns);

/* Expert rank: begins to receive the next micro-batch. A trampoline whose tokens are there tells the others now. Does
 * not wait. USAGE if two are in flight already. */
int xccl_ae_recv_begin(xccl_ae_t *ae, uint64_t *out_batch);

/* As xccl_moe_dispatch_wait and xccl_moe_dispatch_pull; src_rank is a member of the communicator. */
int xccl_ae_recv_wait(xccl_ae_t *ae, uint64_t batch, int64_t timeout_ns, int64_t *out_num_recv,
                      int32_t *out_num_recv_per_expert);
int xccl_ae_recv_pull(xccl_ae_t *ae, uint64_t batch, void *recv_x, float *scales, int32_t *src_rank,
                      int32_t *src_token);

/* Publishes y [num_recv, hidden] as xccl_moe_combine_send does. Does not wait. */
int xccl_ae_send_begin(xccl_ae_t *ae, uint64_t batch, const void *y, uint64_t row_stride);

/* A trampoline waits for the outputs of all expert ranks, and sums. Returns when nobody reads y any more, if it is read
 * in place. */
int xccl_ae_send_finish(xccl_ae_t *ae, uint64_t batch, int64_t timeout_ns);

/* ---- coll: collectives --------------------------------------------------------------------------------- */

/* How elements are reduced: over the members 0, 1, ... in this order, so the result has the same bits on every
 * rank, on every run and for every algorithm. Integers wrap. float16 and bfloat16 are accumulated in float32
 * and rounded once, to nearest even. min and max give NaN if any element is NaN. BOOL has min and max only. */
typedef enum xccl_reduce_op_t { XCCL_SUM = 0, XCCL_MIN = 1, XCCL_MAX = 2, XCCL_PROD = 3 } xccl_reduce_op_t;

/* All functions here are collective. Members must agree on the operation, sizes, dtype, reduction and root; a
 * rank that differs is named in a USAGE error, and the communicator is unusable from then on.
 * Any contiguous memory serves. Symmetric memory is read in place by the peers: it saves a copy. Buffers must
 * not overlap unless a function says so. On return the buffers are the caller's again. */

/* Returns when every member has called it; all that a member wrote before is visible then. */
int xccl_coll_barrier(xccl_comm_t *comm, int64_t timeout_ns);

/* Copies `bytes` bytes of `data` of member `root` to `out` of every member. `data` is read on the root only, and may
 * be `out` there. */
int xccl_coll_broadcast(xccl_comm_t *comm, const void *data, uint64_t bytes, xccl_dtype_t dtype, int root,
                        int64_t timeout_ns, void *out);

/* out[pe] = x of pe; x has `bytes` bytes. x may be this rank's part of out. */
int xccl_coll_all_gather(xccl_comm_t *comm, const void *x, uint64_t bytes, xccl_dtype_t dtype, int64_t timeout_ns,
                         void *out);

/* out = the reduction of x over all members; `count` elements. x may be out. */
int xccl_coll_all_reduce(xccl_comm_t *comm, const void *x, uint64_t count, xccl_dtype_t dtype, xccl_reduce_op_t op,
                         int64_t timeout_ns, void *out);

/* x has size * `count` elements; out = part `rank` of the reduction of x over all members. */
int xccl_coll_reduce_scatter(xccl_comm_t *comm, const void *x, uint64_t count, xccl_dtype_t dtype, xccl_reduce_op_t op,
                             int64_t timeout_ns, void *out);

/* x has one part of `bytes` bytes for each member; out[pe] = the part that pe has for this rank. */
int xccl_coll_all_to_all(xccl_comm_t *comm, const void *x, uint64_t bytes, xccl_dtype_t dtype, int64_t timeout_ns,
                         void *out);

/* As all_to_all, with send_bytes[pe] bytes for each member and recv_bytes[pe] from each; the parts lie in member
 * order without gaps. `row_bytes` divides all of them and must be equal on all members. */
int xccl_coll_all_to_all_v(xccl_comm_t *comm, const void *x, const uint64_t *send_bytes, uint64_t row_bytes,
                           xccl_dtype_t dtype, const uint64_t *recv_bytes, int64_t timeout_ns, void *out);

/* all_to_all_v in two calls, for a receiver that does not know what it gets: begin sets recv_bytes[0..size-1];
 * finish delivers to `out`. Members may mix this with the one call. x must stay unchanged and no other collective
 * may start on the communicator in between. */
int xccl_coll_all_to_all_v_begin(xccl_comm_t *comm, const void *x, const uint64_t *send_bytes, uint64_t row_bytes,
                                 xccl_dtype_t dtype, int64_t timeout_ns, uint64_t *recv_bytes);
int xccl_coll_all_to_all_v_finish(xccl_comm_t *comm, int64_t timeout_ns, void *out);

#endif /* XCCL_H */
