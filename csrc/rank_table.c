/* rank_table.c - what ranks do and whether they live. */
#include "shm.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

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
    [XCCL_OP_SHRINK] = "shrink",
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

void xccl_op_begin(xccl_world_t *world, xccl_op_t op) {
    xccl_rank_entry_t *entry = &world->ranks[world->rank];
    /* relaxed: readers only show these words; the rank is their one writer */
    uint64_t sequence = atomic_load_explicit(&entry->sequence, memory_order_relaxed);
    atomic_store_explicit(&entry->sequence, sequence + 1, memory_order_relaxed);
    atomic_store_explicit(&entry->operation, op, memory_order_relaxed);
    atomic_store_explicit(&entry->phase, 0, memory_order_relaxed);
    atomic_store_explicit(&entry->moved_ns, coarse_now_ns(), memory_order_relaxed);
}

void xccl_op_phase(xccl_world_t *world, int phase) {
    atomic_store_explicit(&world->ranks[world->rank].phase, phase, memory_order_relaxed);
}

bool xccl_shm_read_process(int pid, xccl_process_t *out) {
    char path[32], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    if (length <= 0)
        return false;
    text[length] = 0;
    /* the name may hold blanks and parentheses: fields are counted from the last ')' */
    char *after_name = strrchr(text, ')');
    unsigned long long start = 0;
    if (!after_name ||
        sscanf(after_name + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
               &out->state, &start) != 2)
        return false;
    out->start_time = start;
    return true;
}

bool xccl_shm_is_dead(const xccl_world_t *world, int rank) {
    xccl_rank_entry_t *entry = &world->ranks[rank];
    int32_t state = atomic_load_explicit(&entry->state, memory_order_acquire);
    if (state != XCCL_RANK_ATTACHED)
        return state == XCCL_RANK_DEAD;
    int pid = atomic_load_explicit(&entry->pid, memory_order_relaxed);
    xccl_process_t process;
    bool gone;
    if (xccl_shm_read_process(pid, &process))
        gone = process.state == 'Z' || process.state == 'X' ||
               process.start_time != atomic_load_explicit(&entry->start_time, memory_order_relaxed);
    else
        gone = kill(pid, 0) != 0 && errno == ESRCH;
    if (!gone)
        return false;
    /* It may have left in order between the first look and its end. */
    return atomic_compare_exchange_strong(&entry->state, &state, XCCL_RANK_DEAD) || state == XCCL_RANK_DEAD;
}

int xccl_shm_rank_info(const xccl_world_t *world, int rank, xccl_rank_info_t *out) {
    if (rank < 0 || rank >= world->size)
        return xccl_fail(XCCL_ERR_USAGE, "rank %d of a world of %d ranks", rank, world->size);
    const xccl_rank_entry_t *entry = &world->ranks[rank];
    *out = (xccl_rank_info_t){
        .state = xccl_shm_is_dead(world, rank) ? XCCL_RANK_DEAD : atomic_load(&entry->state),
        .pid = atomic_load(&entry->pid),
        .start_time = atomic_load(&entry->start_time),
        .sequence = atomic_load(&entry->sequence),
        .phase = atomic_load(&entry->phase),
        .waits_for = atomic_load(&entry->waits_for),
        .moved_ns = atomic_load(&entry->moved_ns),
    };
    snprintf(out->operation, sizeof out->operation, "%s", xccl_op_name(atomic_load(&entry->operation)));
    return XCCL_OK;
}

void xccl_shm_describe_rank(const xccl_world_t *world, int rank, char *out, size_t bytes) {
    static const char *const STATES[] = {"not attached yet", "alive", "has left", "dead"};
    xccl_rank_info_t info;
    if (xccl_shm_rank_info(world, rank, &info) != XCCL_OK) {
        snprintf(out, bytes, "rank %d", rank);
        return;
    }
    if (info.state == XCCL_RANK_ABSENT) {
        snprintf(out, bytes, "rank %d: %s", rank, STATES[info.state]);
        return;
    }
    snprintf(out, bytes, "rank %d (pid %d, %s): operation %llu (%s), phase %d, last moved %.1f s ago", rank, info.pid,
             STATES[info.state], (unsigned long long)info.sequence, info.operation, info.phase,
             (double)(coarse_now_ns() - info.moved_ns) * 1e-9);
}
