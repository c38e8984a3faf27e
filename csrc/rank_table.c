/* rank_table.c - what ranks do and whether they live. */
#include "shm.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "faults.h"
#include "process.h"
#include "status.h"

static const char *const OPERATIONS[XCCL_OP_COUNT] = {
    [XCCL_OP_NONE] = "nothing",
    [XCCL_OP_INIT] = "init",
    [XCCL_OP_SPLIT] = "split",
    [XCCL_OP_CLOSE] = "close",
    [XCCL_OP_ALLOC] = "allocation",
    [XCCL_OP_FREE] = "free",
    [XCCL_OP_WAIT_UNTIL] = "wait_until",
    [XCCL_OP_SEND] = "send",
    [XCCL_OP_RECV] = "recv",
    [XCCL_OP_WAIT] = "wait",
    [XCCL_OP_BARRIER] = "barrier",
    [XCCL_OP_BROADCAST] = "broadcast",
    [XCCL_OP_ALL_GATHER] = "all_gather",
    [XCCL_OP_ALL_REDUCE] = "all_reduce",
    [XCCL_OP_REDUCE_SCATTER] = "reduce_scatter",
    [XCCL_OP_ALL_TO_ALL] = "all_to_all",
    [XCCL_OP_ALL_TO_ALL_V] = "all_to_all_v",
    [XCCL_OP_DISPATCH] = "dispatch",
    [XCCL_OP_COMBINE] = "combine",
    [XCCL_OP_EP_OPEN] = "ExpertParallel",
    [XCCL_OP_EP_ALIVE] = "set_alive",
    [XCCL_OP_SHRINK] = "shrink",
    [XCCL_OP_AE_OPEN] = "AttentionExpert",
    [XCCL_OP_A2E] = "a2e",
    [XCCL_OP_A2E_RECV] = "a2e_recv",
    [XCCL_OP_E2A_SEND] = "e2a_send",
    [XCCL_OP_E2A] = "e2a",
};

const char *xccl_op_name(int op) {
    return op >= 0 && op < XCCL_OP_COUNT ? OPERATIONS[op] : "?";
}

/* The coarse clock costs a few nanoseconds and ticks every few milliseconds: enough for "moved 3 s ago". */
static int64_t coarse_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int xccl_op_begin(xccl_world_t *world, xccl_op_t op) {
    xccl_rank_entry_t *entry = &world->ranks[world->rank];
    /* relaxed: readers only show these words; the rank is their one writer */
    uint64_t sequence = atomic_load_explicit(&entry->sequence, memory_order_relaxed);
    atomic_store_explicit(&entry->sequence, sequence + 1, memory_order_relaxed);
    atomic_store_explicit(&entry->operation, op, memory_order_relaxed);
    atomic_store_explicit(&entry->phase, 0, memory_order_relaxed);
    atomic_store_explicit(&entry->moved_ns, coarse_now_ns(), memory_order_relaxed);
    return xccl_fault_point(world, op, 0);
}

int xccl_op_phase(xccl_world_t *world, int phase) {
    xccl_rank_entry_t *entry = &world->ranks[world->rank];
    atomic_store_explicit(&entry->phase, phase, memory_order_relaxed);
    return xccl_fault_point(world, atomic_load_explicit(&entry->operation, memory_order_relaxed), phase);
}

/* The process of an attached rank has ended. What cannot be told counts as alive. */
static bool is_gone(const xccl_world_t *world, int rank) {
    xccl_rank_entry_t *entry = &world->ranks[rank];
    uint64_t space = atomic_load_explicit(&entry->pid_namespace, memory_order_relaxed);
    if (space == 0 || space != world->pid_namespace) /* of another container: its pid means nothing here */
        return atomic_load_explicit(&entry->locked, memory_order_relaxed) &&
               !xccl_process_is_held(world->fd, (uint64_t)rank);
    int pid = atomic_load_explicit(&entry->pid, memory_order_relaxed);
    xccl_process_t process;
    if (xccl_process_read(pid, &process))
        return process.state == 'Z' || process.state == 'X' ||
               process.start_time != atomic_load_explicit(&entry->start_time, memory_order_relaxed);
    return kill(pid, 0) != 0 && errno == ESRCH;
}

bool xccl_shm_is_dead(const xccl_world_t *world, int rank) {
    xccl_rank_entry_t *entry = &world->ranks[rank];
    int32_t state = atomic_load_explicit(&entry->state, memory_order_acquire);
    if (state == XCCL_RANK_ABSENT) /* the creator holds the object until all have attached: is anybody to come? */
        return world->header->held && !xccl_process_is_held(world->fd, XCCL_CREATOR_BYTE) &&
               atomic_load_explicit(&entry->state, memory_order_acquire) == XCCL_RANK_ABSENT;
    if (state != XCCL_RANK_ATTACHED)
        return state == XCCL_RANK_DEAD;
    if (!is_gone(world, rank))
        return false;
    if (world->read_only)
        return atomic_load_explicit(&entry->state, memory_order_acquire) != XCCL_RANK_CLOSED;
    /* It may have left in order between the first look and its end. */
    return atomic_compare_exchange_strong(&entry->state, &state, XCCL_RANK_DEAD) || state == XCCL_RANK_DEAD;
}

/* The state as others see it: also dead, or stopped, which no rank writes itself. */
static int32_t seen_state(const xccl_world_t *world, int rank) {
    const xccl_rank_entry_t *entry = &world->ranks[rank];
    if (xccl_shm_is_dead(world, rank))
        return XCCL_RANK_DEAD;
    int32_t state = atomic_load_explicit(&entry->state, memory_order_acquire);
    xccl_process_t process;
    if (state == XCCL_RANK_ATTACHED && world->pid_namespace != 0 &&
        atomic_load(&entry->pid_namespace) == world->pid_namespace &&
        xccl_process_read(atomic_load(&entry->pid), &process) && (process.state == 'T' || process.state == 't'))
        return XCCL_RANK_STOPPED;
    return state;
}

/* ---- how a rank ended ---- */

void xccl_shm_note_exit(xccl_world_t *world, int rank, xccl_exit_t kind, int number) {
    if (world->read_only || rank < 0 || rank >= world->size || kind == XCCL_EXIT_UNKNOWN)
        return;
    xccl_rank_entry_t *entry = &world->ranks[rank];
    int32_t state = atomic_load_explicit(&entry->state, memory_order_acquire);
    /* a program between launcher and rank may have ended before the rank */
    if (state != XCCL_RANK_DEAD && (state != XCCL_RANK_ATTACHED || !is_gone(world, rank)))
        return;
    int32_t unknown = 0;
    /* release, and before the mark: who finds the rank marked dead here with acquire order sees how it ended. Who has
     * found it dead by itself polls this one word, which says all by itself. */
    atomic_compare_exchange_strong_explicit(&entry->ended, &unknown, (int32_t)kind << 16 | (number & 0xffff),
                                            memory_order_release, memory_order_relaxed);
    if (!xccl_shm_is_dead(world, rank))
        return;
    for (int other = 0; other < world->size; other++)
        if (other != rank)
            xccl_ring(world, other);
}

static const char *signal_name(int number) {
    static const struct {
        int number;
        const char *name;
    } NAMES[] = {{SIGKILL, "SIGKILL"}, {SIGSEGV, "SIGSEGV"}, {SIGABRT, "SIGABRT"}, {SIGBUS, "SIGBUS"},
                 {SIGTERM, "SIGTERM"}, {SIGINT, "SIGINT"},   {SIGILL, "SIGILL"},   {SIGFPE, "SIGFPE"},
                 {SIGHUP, "SIGHUP"},   {SIGQUIT, "SIGQUIT"}, {SIGPIPE, "SIGPIPE"}, {SIGALRM, "SIGALRM"},
                 {SIGTRAP, "SIGTRAP"}, {SIGSYS, "SIGSYS"},   {SIGXCPU, "SIGXCPU"}, {SIGXFSZ, "SIGXFSZ"}};
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        if (NAMES[i].number == number)
            return NAMES[i].name;
    return NULL;
}

/* "killed by SIGKILL"; empty if it is not known. */
static void describe_end(int32_t ended, char *out, size_t bytes) {
    int number = ended & 0xffff;
    const char *name = signal_name(number);
    out[0] = 0;
    if (ended >> 16 == XCCL_EXIT_CODE)
        snprintf(out, bytes, "exited with code %d", number);
    else if (ended >> 16 == XCCL_EXIT_MEMORY)
        snprintf(out, bytes, "killed, out of memory");
    else if (ended >> 16 == XCCL_EXIT_SIGNAL && name)
        snprintf(out, bytes, "killed by %s", name);
    else if (ended >> 16 == XCCL_EXIT_SIGNAL)
        snprintf(out, bytes, "killed by signal %d", number);
}

/* Whoever notices a death first may come before the launcher has reaped the process: gives it a moment to say why. */
static void await_end(const xccl_world_t *world, const xccl_rank_entry_t *entry) {
    enum { TURNS = 50 };
    const struct timespec moment = {.tv_nsec = 1000000};
    for (int i = 0; i < TURNS && atomic_load_explicit(&entry->ended, memory_order_relaxed) == 0; i++) {
        if (!world->header->held || !xccl_process_is_held(world->fd, XCCL_CREATOR_BYTE))
            return; /* nobody who could tell */
        nanosleep(&moment, NULL);
    }
}

int xccl_shm_fail_lost(const xccl_world_t *world, int lost, const char *operation) {
    char line[256];
    xccl_rank_info_t info = {0};
    if (atomic_load_explicit(&world->ranks[lost].state, memory_order_acquire) == XCCL_RANK_DEAD)
        await_end(world, &world->ranks[lost]);
    xccl_shm_describe_rank(world, lost, line, sizeof line);
    xccl_shm_rank_info(world, lost, &info);
    return xccl_fail_lost(lost, &info, "rank %d: %s cannot complete, rank %d is lost. Its last state: %s", world->rank,
                          operation, lost, line);
}

/* ---- what is shown ---- */

int xccl_shm_rank_info(const xccl_world_t *world, int rank, xccl_rank_info_t *out) {
    if (rank < 0 || rank >= world->size)
        return xccl_fail(XCCL_ERR_USAGE, "rank %d of a world of %d ranks", rank, world->size);
    const xccl_rank_entry_t *entry = &world->ranks[rank];
    *out = (xccl_rank_info_t){
        .state = seen_state(world, rank),
        .pid = atomic_load(&entry->pid),
        .start_time = atomic_load(&entry->start_time),
        .sequence = atomic_load(&entry->sequence),
        .phase = atomic_load(&entry->phase),
        .waits_for = atomic_load(&entry->waits_for),
        .moved_ns = atomic_load(&entry->moved_ns),
        .reads_peers = atomic_load(&entry->reads_peers) == 1,
    };
    snprintf(out->operation, sizeof out->operation, "%s", xccl_op_name(atomic_load(&entry->operation)));
    if (out->state == XCCL_RANK_DEAD)
        describe_end(atomic_load_explicit(&entry->ended, memory_order_relaxed), out->cause, sizeof out->cause);
    return XCCL_OK;
}

void xccl_shm_describe_rank(const xccl_world_t *world, int rank, char *out, size_t bytes) {
    static const char *const STATES[] = {"not attached yet", "alive", "has left", "dead", "stopped"};
    xccl_rank_info_t info;
    if (xccl_shm_rank_info(world, rank, &info) != XCCL_OK) {
        snprintf(out, bytes, "rank %d", rank);
        return;
    }
    const int num_states = sizeof STATES / sizeof *STATES;
    const char *state = info.state >= 0 && info.state < num_states ? STATES[info.state] : "damaged";
    if (info.state == XCCL_RANK_ABSENT) {
        snprintf(out, bytes, "rank %d: %s", rank, state);
        return;
    }
    snprintf(out, bytes, "rank %d (pid %d, %s%s%s): operation %llu (%s), phase %d, last moved %.1f s ago", rank,
             info.pid, state, info.cause[0] ? ": " : "", info.cause, (unsigned long long)info.sequence, info.operation,
             info.phase, ((double)coarse_now_ns() - (double)info.moved_ns) * 1e-9);
}
