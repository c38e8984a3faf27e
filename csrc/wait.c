#define _GNU_SOURCE
#include "wait.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "shm.h"
#include "status.h"

/* A sleeper looks at abort flag, deadline and liveness this often even if nobody rings. */
static const int64_t SLICE_NS = 100 * 1000000ll;
/* Processes looked up in /proc on each look, besides those waited for: a death is found by somebody soon and
 * marked in the rank table, where all see it. */
enum { PROBES_PER_LOOK = 4, MAX_SLOTS_SHOWN = 16, MAX_RANKS_SHOWN = 64 };

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

int64_t xccl_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int64_t xccl_deadline(const xccl_world_t *world, int64_t timeout_ns) {
    if (timeout_ns == XCCL_TIMEOUT_DEFAULT)
        timeout_ns = world->timeout_ns;
    int64_t now = xccl_now_ns();
    return timeout_ns > INT64_MAX - now ? INT64_MAX : now + timeout_ns;
}

/* ---- the doorbell ----
 * Waiter: sleeping = 1; fence; look again; futex_wait(bell).     Ringer: store the word; fence; read sleeping.
 * Both fences are sequentially consistent, so at least one side sees the other's store: either the waiter's
 * last look finds the word, or the ringer finds the sleeper and wakes it. The bell's value is read before the
 * last look, so a ring between that look and the system call makes futex_wait return at once. */

static long futex(_Atomic uint32_t *word, int operation, uint32_t value, const struct timespec *timeout) {
    return syscall(SYS_futex, word, operation, value, timeout, NULL, 0);
}

void xccl_ring(xccl_world_t *world, int rank) {
    xccl_rank_entry_t *entry = &world->ranks[rank];
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&entry->sleeping, memory_order_relaxed) == 0)
        return;
    atomic_fetch_add_explicit(&entry->bell, 1, memory_order_release);
    futex(&entry->bell, FUTEX_WAKE, INT_MAX, NULL);
}

/* ---- progress hooks ---- */

int xccl_progress_add(xccl_world_t *world, xccl_progress_fn progress, void *arg) {
    if (world->num_hooks == XCCL_MAX_HOOKS)
        return xccl_fail(XCCL_ERR_USAGE, "more than %d communicators with pending requests", XCCL_MAX_HOOKS);
    world->hooks[world->num_hooks++] = (xccl_hook_t){progress, arg};
    return XCCL_OK;
}

void xccl_progress_remove(xccl_world_t *world, xccl_progress_fn progress, void *arg) {
    for (int i = 0; i < world->num_hooks; i++)
        if (world->hooks[i].progress == progress && world->hooks[i].arg == arg) {
            world->hooks[i] = world->hooks[--world->num_hooks];
            return;
        }
}

int xccl_progress(xccl_world_t *world) {
    if (world->num_hooks == 0 || world->in_progress)
        return XCCL_OK;
    int status = XCCL_OK;
    world->in_progress = true;
    for (int i = 0; i < world->num_hooks && status >= 0; i++)
        status = world->hooks[i].progress(world->hooks[i].arg);
    world->in_progress = false;
    return status < 0 ? status : XCCL_OK;
}

/* ---- what a waiter reports ---- */

typedef struct text_t {
    char buffer[24576];
    size_t length;
} text_t;

static void __attribute__((format(printf, 2, 3))) append(text_t *text, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text->buffer + text->length, sizeof text->buffer - text->length, format, args);
    va_end(args);
    if (n > 0) {
        size_t room = sizeof text->buffer - text->length - 1;
        text->length += (size_t)n < room ? (size_t)n : room;
    }
}

static const char *own_operation(const xccl_world_t *world) {
    return xccl_op_name(atomic_load_explicit(&world->ranks[world->rank].operation, memory_order_relaxed));
}

static int fail_timeout(xccl_world_t *world, const xccl_wait_t *wait) {
    text_t text = {.length = 0};
    char line[256];
    append(&text, "rank %d: %s timed out.", world->rank, own_operation(world));
    xccl_awaited_t slot;
    int missing = 0;
    for (; missing < world->size * 4 && wait->awaited(wait->arg, missing, &slot); missing++) {
        if (missing >= MAX_SLOTS_SHOWN)
            continue;
        if (slot.peer >= 0)
            append(&text, "\n  missing: %s of rank %d, expected %llu, seen %llu", slot.what, slot.peer,
                   (unsigned long long)slot.expected, (unsigned long long)slot.seen);
        else
            append(&text, "\n  missing: %s, expected %llu, seen %llu", slot.what, (unsigned long long)slot.expected,
                   (unsigned long long)slot.seen);
    }
    if (missing > MAX_SLOTS_SHOWN)
        append(&text, "\n  ... and %d more", missing - MAX_SLOTS_SHOWN);
    append(&text, "\nAll ranks:");
    for (int rank = 0; rank < world->size && rank < MAX_RANKS_SHOWN; rank++) {
        xccl_shm_describe_rank(world, rank, line, sizeof line);
        append(&text, "\n  %s", line);
    }
    return xccl_fail(XCCL_ERR_TIMEOUT, "%s", text.buffer);
}

static int fail_lost(xccl_world_t *world, int lost) {
    char line[256];
    xccl_shm_describe_rank(world, lost, line, sizeof line);
    return xccl_fail(XCCL_ERR_PEER_LOST, "rank %d: %s cannot complete, rank %d is lost. Its last state: %s",
                     world->rank, own_operation(world), lost, line);
}

/* ---- the slow path ---- */

static int32_t state_of(const xccl_world_t *world, int rank) {
    return atomic_load_explicit(&world->ranks[rank].state, memory_order_acquire);
}

/* A rank whose death is marked or found now; -1 if none. `turn` spreads the /proc look-ups over all ranks. */
static int find_dead(const xccl_world_t *world, unsigned turn) {
    for (int rank = 0; rank < world->size; rank++)
        if (state_of(world, rank) == XCCL_RANK_DEAD)
            return rank;
    for (unsigned i = 0; i < PROBES_PER_LOOK && i < (unsigned)world->size; i++) {
        int rank = (int)((turn * PROBES_PER_LOOK + i + (unsigned)world->rank) % (unsigned)world->size);
        if (rank != world->rank && xccl_shm_is_dead(world, rank))
            return rank;
    }
    return -1;
}

/* Everybody else has left: nobody can write what is waited for. */
static int find_last_leaver(const xccl_world_t *world) {
    int leaver = -1;
    for (int rank = 0; rank < world->size; rank++) {
        if (rank == world->rank)
            continue;
        if (state_of(world, rank) != XCCL_RANK_CLOSED)
            return -1;
        leaver = rank;
    }
    return leaver;
}

/* An awaited rank that is dead or has left, or any dead rank; -1 if none. Notes whom this rank waits for. */
static int find_lost(xccl_world_t *world, const xccl_wait_t *wait, unsigned turn) {
    xccl_awaited_t slot;
    for (int i = 0; i < world->size && wait->awaited(wait->arg, i, &slot); i++) {
        if (i == 0)
            atomic_store_explicit(&world->ranks[world->rank].waits_for, slot.peer, memory_order_relaxed);
        if (slot.peer == world->rank)
            continue;
        if (slot.peer < 0) {
            int leaver = find_last_leaver(world);
            if (leaver >= 0)
                return leaver;
        } else if (state_of(world, slot.peer) == XCCL_RANK_CLOSED || xccl_shm_is_dead(world, slot.peer)) {
            return slot.peer;
        }
    }
    return find_dead(world, turn);
}

/* One look at everything that may end a wait early. XCCL_AGAIN: go on waiting. */
static int look_around(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline, unsigned turn) {
    int status = xccl_check_usable(world);
    if (status != XCCL_OK)
        return status;
    int lost = find_lost(world, wait, turn);
    if (lost >= 0)
        /* a peer may signal and then leave: its state was read first, so the signal is visible now */
        return wait->ready(wait->arg) ? XCCL_OK : fail_lost(world, lost);
    if (xccl_now_ns() >= deadline)
        return wait->ready(wait->arg) ? XCCL_OK : fail_timeout(world, wait);
    if (world->interrupted && world->interrupted())
        return xccl_fail(XCCL_ERR_INTERRUPTED, "rank %d: %s was interrupted", world->rank, own_operation(world));
    return XCCL_AGAIN;
}

/* True: ready. Otherwise runs the hooks once. */
static bool poll(xccl_world_t *world, const xccl_wait_t *wait, int *status) {
    *status = xccl_progress(world);
    return wait->ready(wait->arg);
}

/* Sleeps until rung, at most one slice or to the deadline. True when ready. */
static bool doze(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline, int *status) {
    xccl_rank_entry_t *entry = &world->ranks[world->rank];
    uint32_t bell = atomic_load_explicit(&entry->bell, memory_order_acquire);
    atomic_store_explicit(&entry->sleeping, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    bool ready = poll(world, wait, status);
    if (!ready && *status == XCCL_OK) {
        int64_t left = deadline - xccl_now_ns();
        if (left > SLICE_NS)
            left = SLICE_NS;
        if (left > 0) {
            struct timespec timeout = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
            futex(&entry->bell, FUTEX_WAIT, bell, &timeout);
        }
    }
    atomic_store_explicit(&entry->sleeping, 0, memory_order_relaxed);
    return ready;
}

/* Between two looks a sleeper may be rung many times for things it does not wait for. */
static int wait_asleep(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline) {
    int64_t next_look = 0;
    for (unsigned turn = 0;;) {
        int64_t now = xccl_now_ns();
        if (now >= next_look || now >= deadline) {
            int status = look_around(world, wait, deadline, turn++);
            if (status != XCCL_AGAIN)
                return status;
            next_look = now + SLICE_NS;
        }
        int status;
        if (doze(world, wait, deadline, &status))
            return XCCL_OK;
        if (status < 0)
            return status;
    }
}

int xccl_wait(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline) {
    if (wait->ready(wait->arg))
        return XCCL_OK;
    for (uint64_t i = 0, rungs = world->spin + world->yields; i < rungs; i++) {
        int status;
        if (poll(world, wait, &status))
            return XCCL_OK;
        if (status < 0)
            return status;
        if (i < world->spin)
            relax();
        else
            sched_yield();
    }
    int status = wait_asleep(world, wait, deadline);
    atomic_store_explicit(&world->ranks[world->rank].waits_for, -1, memory_order_relaxed);
    return status;
}

/* ---- waiting for one word ---- */

typedef struct word_t {
    const _Atomic uint64_t *word;
    uint64_t value;
    int peer;
    const char *what;
} word_t;

static bool word_reached(void *arg) {
    const word_t *w = arg;
    /* acquire pairs with the release of the peer's signal */
    return atomic_load_explicit(w->word, memory_order_acquire) >= w->value;
}

static bool word_awaited(void *arg, int index, xccl_awaited_t *out) {
    const word_t *w = arg;
    if (index > 0 || word_reached(arg))
        return false;
    *out = (xccl_awaited_t){w->peer, w->value, atomic_load_explicit(w->word, memory_order_relaxed), w->what};
    return true;
}

int xccl_wait_word(xccl_world_t *world, const _Atomic uint64_t *word, uint64_t value, int peer, const char *what,
                   int64_t deadline) {
    word_t arg = {word, value, peer, what};
    xccl_wait_t wait = {.ready = word_reached, .awaited = word_awaited, .arg = &arg};
    return xccl_wait(world, &wait, deadline);
}
