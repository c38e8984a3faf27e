#define _GNU_SOURCE
#include "cma.h"

#include <errno.h>
#include <sys/random.h>
#include <sys/uio.h>
#include <time.h>

#include "status.h"

/* Bytes read, or -1 and errno. */
static ssize_t read_process(int pid, void *to, uint64_t address, uint64_t bytes) {
    struct iovec local = {to, bytes}, remote = {(void *)(uintptr_t)address, bytes};
    return process_vm_readv(pid, &local, 1, &remote, 1, 0);
}

static ssize_t write_process(int pid, void *from, uint64_t address, uint64_t bytes) {
    struct iovec local = {from, bytes}, remote = {(void *)(uintptr_t)address, bytes};
    return process_vm_writev(pid, &local, 1, &remote, 1, 0);
}

void xccl_cma_open(xccl_world_t *world) {
    xccl_rank_entry_t *entry = &world->ranks[world->rank];
    if (world->header->config.no_cma ||
        getrandom(&world->cma_word, sizeof world->cma_word, 0) != sizeof world->cma_word)
        return;
    /* relaxed: they are published with the state of the rank */
    atomic_store_explicit(&entry->cma_word, world->cma_word, memory_order_relaxed);
    atomic_store_explicit(&entry->cma_address, (uint64_t)(uintptr_t)&world->cma_word, memory_order_relaxed);
}

static bool reads(const xccl_world_t *world, int rank) {
    const xccl_rank_entry_t *entry = &world->ranks[rank];
    /* acquire pairs with the release of ATTACHED: pid, address and word are there */
    if (atomic_load_explicit(&entry->state, memory_order_acquire) != XCCL_RANK_ATTACHED)
        return false;
    uint64_t address = atomic_load_explicit(&entry->cma_address, memory_order_relaxed), word = 0;
    int pid = atomic_load_explicit(&entry->pid, memory_order_relaxed);
    return address != 0 && read_process(pid, &word, address, sizeof word) == sizeof word &&
           word == atomic_load_explicit(&entry->cma_word, memory_order_relaxed);
}

void xccl_cma_probe(xccl_world_t *world) {
    bool all = world->cma_word != 0;
    for (int rank = 0; rank < world->size && all; rank++)
        all = rank == world->rank || reads(world, rank);
    /* relaxed: the sync that follows publishes it */
    atomic_store_explicit(&world->ranks[world->rank].reads_peers, all, memory_order_relaxed);
}

bool xccl_cma_can_read(const xccl_world_t *world, int reader) {
    /* relaxed: it does not change after the sync behind the probe */
    return atomic_load_explicit(&world->ranks[reader].reads_peers, memory_order_relaxed) == 1;
}

/* A process loses its memory a moment before it is seen to be dead. */
static bool is_dying(const xccl_world_t *world, int rank) {
    enum { TURNS = 100 };
    const struct timespec moment = {.tv_nsec = 1000000};
    for (int i = 0; i < TURNS; i++) {
        if (xccl_shm_is_dead(world, rank))
            return true;
        nanosleep(&moment, NULL);
    }
    return false;
}

static int fail(const xccl_world_t *world, int rank, uint64_t address, uint64_t bytes, int error) {
    if (is_dying(world, rank))
        return xccl_shm_fail_lost(world, rank, "the copy of a message");
    char line[256];
    xccl_shm_describe_rank(world, rank, line, sizeof line);
    return xccl_fail_errno(error,
                           "rank %d: %llu bytes at %#llx in the memory of rank %d cannot be copied (XCCL_CMA=off does "
                           "without). Its last state: %s",
                           world->rank, (unsigned long long)bytes, (unsigned long long)address, rank, line);
}

typedef ssize_t (*copy_fn)(int pid, void *here, uint64_t there, uint64_t bytes);

/* The kernel may stop early, where it meets a page that is not there. */
static int copy_all(const xccl_world_t *world, int rank, copy_fn copy, void *here, uint64_t there, uint64_t bytes) {
    int pid = atomic_load_explicit(&world->ranks[rank].pid, memory_order_relaxed);
    for (uint64_t done = 0; done < bytes;) {
        ssize_t count = copy(pid, (unsigned char *)here + done, there + done, bytes - done);
        if (count <= 0)
            return fail(world, rank, there + done, bytes - done, count < 0 ? errno : EFAULT);
        done += (uint64_t)count;
    }
    return XCCL_OK;
}

int xccl_cma_read(xccl_world_t *world, int rank, void *to, uint64_t address, uint64_t bytes) {
    return copy_all(world, rank, read_process, to, address, bytes);
}

int xccl_cma_write(xccl_world_t *world, int rank, const void *from, uint64_t address, uint64_t bytes) {
    return copy_all(world, rank, write_process, (void *)(uintptr_t)from, address, bytes);
}
