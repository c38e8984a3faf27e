#define _GNU_SOURCE
#include "doorbell.h"

#include <limits.h>
#include <linux/futex.h>
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "chaos.h"

/*   sleeper                                              ringer
 *   bell = load(bell)                                    store the word that is waited for
 *   sleeping = ASLEEP                                    fence
 *   fence                                                if (sleeping & ASLEEP) count the bell up; futex_wake
 *   look for the word; if it has not come, futex_wait
 *
 * With both fences sequentially consistent, one side at least sees the other's store: the sleeper finds the word, or
 * the ringer finds the sleeper. The bell is read first, so a ring between the look and futex_wait makes that return at
 * once.
 *
 * A ringer's fence would last until its store has reached the other core: as long as the message itself takes, and
 * nearly always for nobody. So the sleeper, which has the time, fences for both: membarrier returns when every running
 * thread of the registered processes has executed a full fence. A ringer whose load of `sleeping` comes after that
 * fence finds the sleeper; if the load comes before it, then so does the store, which stands before the load (the
 * compiler is kept from swapping them), and the sleeper finds the word.
 *
 * Where membarrier is refused, a ringer fences for itself, and a sleeper that cannot fence its ringers says
 * FENCE_YOURSELF from the start: whoever reads that fences and reads again. If it is refused later (a sandbox that
 * closes after the start), a ringer may have left out its fence and read `sleeping` before the sleeper says so. Its
 * store is then on its way to memory, where nothing holds it up, so the sleeper, once, waits out that time before it
 * looks. */
enum { ASLEEP = 1, FENCE_YOURSELF = 2 };

enum { STORE_NS = 1000000 }; /* many times what a store takes from a core to memory */

static long futex(_Atomic uint32_t *word, int operation, uint32_t value, const struct timespec *timeout) {
    return syscall(SYS_futex, word, operation, value, timeout, NULL, 0);
}

static bool membarrier(int command) {
    return syscall(SYS_membarrier, command, 0, 0) == 0;
}

static uint32_t awake(const xccl_world_t *world) {
    return world->fences_by_membarrier ? 0 : FENCE_YOURSELF;
}

void xccl_doorbell_open(xccl_world_t *world) {
    world->fences_by_membarrier = membarrier(MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED);
    xccl_doorbell_disarm(world);
}

uint32_t xccl_doorbell_arm(xccl_world_t *world) {
    xccl_rank_entry_t *entry = &world->ranks[world->rank];
    uint32_t bell = atomic_load_explicit(&entry->bell, memory_order_acquire);
    atomic_store_explicit(&entry->sleeping, awake(world) | ASLEEP, memory_order_relaxed);
    if (world->fences_by_membarrier && membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED))
        return bell;
    bool refused_now = world->fences_by_membarrier;
    world->fences_by_membarrier = false;
    atomic_store_explicit(&entry->sleeping, awake(world) | ASLEEP, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    if (refused_now)
        nanosleep(&(struct timespec){.tv_nsec = STORE_NS}, NULL);
    return bell;
}

void xccl_doorbell_disarm(xccl_world_t *world) {
    atomic_store_explicit(&world->ranks[world->rank].sleeping, awake(world), memory_order_relaxed);
}

bool xccl_doorbell_sleep(xccl_world_t *world, uint32_t bell, int64_t ns) {
    xccl_rank_entry_t *entry = &world->ranks[world->rank];
    struct timespec timeout = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    futex(&entry->bell, FUTEX_WAIT, bell, &timeout);
    return atomic_load_explicit(&entry->bell, memory_order_relaxed) != bell;
}

/* ---- ringing ---- */

static void fence(const xccl_world_t *world) {
    if (world->fences_by_membarrier)
        atomic_signal_fence(memory_order_seq_cst);
    else
        atomic_thread_fence(memory_order_seq_cst);
}

static void wake(xccl_rank_entry_t *entry) {
    atomic_thread_fence(memory_order_seq_cst);
    if ((atomic_load_explicit(&entry->sleeping, memory_order_relaxed) & ASLEEP) == 0)
        return;
    atomic_fetch_add_explicit(&entry->bell, 1, memory_order_release);
    futex(&entry->bell, FUTEX_WAKE, INT_MAX, NULL);
}

static void ring(xccl_world_t *world, int rank) {
    xccl_rank_entry_t *entry = &world->ranks[rank];
    if (atomic_load_explicit(&entry->sleeping, memory_order_relaxed) != 0)
        wake(entry);
}

void xccl_ring(xccl_world_t *world, int rank) {
    xccl_chaos_pause(world, XCCL_CHAOS_RING);
    fence(world);
    ring(world, rank);
}

void xccl_ring_members(xccl_world_t *world, const int *ranks, int count) {
    xccl_chaos_pause(world, XCCL_CHAOS_RING);
    fence(world);
    for (int i = 0; i < count; i++)
        if (ranks[i] != world->rank)
            ring(world, ranks[i]);
}
