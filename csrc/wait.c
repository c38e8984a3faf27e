#define _GNU_SOURCE
#include "wait.h"

#include <sched.h>
#include <sys/resource.h>
#include <time.h>

#include "chaos.h"
#include "doorbell.h"
#include "faults.h"
#include "shm.h"
#include "status.h"

/* A sleeper looks at abort flag, deadline and liveness this often even if nobody rings. */
static const int64_t SLICE_NS = 100 * 1000000ll;

enum {
    SPIN_LEAST = 4,   /* polls: the way of a cache line from another core */
    SPIN_MOST = 4000, /* polls: about 100 us */
    SPIN_BETWEEN = 64 /* the most polls between two yields */
};
static const int64_t YIELD_LEAST_NS = 50 * 1000;  /* about the cost of sleeping and being woken */
static const int64_t YIELD_MOST_NS = 1000 * 1000; /* so that a rank with long waits uses no CPU to speak of */

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* ---- deadlines ----
 * A time out of the future is positive; a timeout whose clock has not started is -1 - timeout. */

int64_t xccl_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Ranks start unevenly (imports, weights to load): the first operation may take longer than any later one. */
static int64_t default_timeout(const xccl_world_t *world) {
    uint64_t begun = atomic_load_explicit(&world->ranks[world->rank].sequence, memory_order_relaxed);
    if (begun > world->opened_sequence + 1)
        return world->timeout_ns;
    int64_t first = world->header->config.first_timeout_ns;
    if (first != 0)
        return first;
    return world->timeout_ns < INT64_MAX / 2 ? 2 * world->timeout_ns : INT64_MAX;
}

int64_t xccl_deadline(xccl_world_t *world, int64_t timeout_ns) {
    if (timeout_ns == XCCL_TIMEOUT_DEFAULT)
        timeout_ns = default_timeout(world);
    world->slow_since = 0;
    if (timeout_ns == XCCL_TIMEOUT_NONE)
        return INT64_MAX;
    return -1 - (timeout_ns > 0 ? timeout_ns : 0);
}

int64_t xccl_deadline_at(xccl_world_t *world, int64_t deadline) {
    if (deadline >= 0)
        return deadline;
    if (world->slow_since == 0)
        world->slow_since = xccl_now_ns();
    int64_t timeout_ns = -1 - deadline;
    return timeout_ns > INT64_MAX - world->slow_since ? INT64_MAX : world->slow_since + timeout_ns;
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

/* ---- what is learned ---- */

void xccl_wait_open(xccl_world_t *world) {
    const xccl_config_t *config = &world->header->config;
    xccl_ladder_t *ladder = &world->ladder;
    ladder->fixed_spin = config->spin != 0;
    ladder->spin = config->spin ? config->spin : config->size <= config->cores ? SPIN_MOST : SPIN_LEAST;
    ladder->yields = config->yields;
    ladder->yield_ns = YIELD_MOST_NS;
    xccl_doorbell_open(world);
}

static long switches(void) {
    struct rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nvcsw + usage.ru_nivcsw;
}

/* Yields, and learns whether anybody else wanted the core. */
static void yield_and_learn(xccl_ladder_t *ladder) {
    long before = switches();
    sched_yield();
    bool shared = switches() != before;
    if (shared)
        ladder->spin = ladder->spin / 2 > SPIN_LEAST ? ladder->spin / 2 : SPIN_LEAST;
    else
        ladder->spin = ladder->spin * 2 < SPIN_MOST ? ladder->spin * 2 : SPIN_MOST;
}

/* Whether this wait's first yield is one to learn from. A rank that spins in vain learns at once; for one that yields
 * anyway, asking costs more than it brings. */
static bool learns(xccl_ladder_t *ladder) {
    enum { OFTEN = 16 };
    return !ladder->fixed_spin && (ladder->spin > SPIN_LEAST || ladder->yielding++ % OFTEN == 0);
}

/* A wait is over, or at least has got so long that one should sleep at once. */
static void learn_length(xccl_ladder_t *ladder, int64_t waited_ns) {
    if (waited_ns > YIELD_MOST_NS)
        ladder->yield_ns = ladder->yield_ns / 2 > YIELD_LEAST_NS ? ladder->yield_ns / 2 : YIELD_LEAST_NS;
    else if (waited_ns > ladder->yield_ns / 2)
        ladder->yield_ns = ladder->yield_ns * 2 < YIELD_MOST_NS ? ladder->yield_ns * 2 : YIELD_MOST_NS;
}

/* ---- the rungs ---- */

/* Ready, or failed, or XCCL_AGAIN. Runs the hooks once. */
static int poll(xccl_world_t *world, const xccl_wait_t *wait) {
    int status = xccl_progress(world);
    if (wait->ready(wait->arg))
        return XCCL_OK;
    return status < 0 ? status : XCCL_AGAIN;
}

static int spin(xccl_world_t *world, const xccl_wait_t *wait, uint64_t polls) {
    for (uint64_t i = 0; i < polls; i++) {
        int status = poll(world, wait);
        if (status != XCCL_AGAIN)
            return status;
        relax();
    }
    return XCCL_AGAIN;
}

static int yield(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline, int64_t since) {
    xccl_ladder_t *ladder = &world->ladder;
    uint64_t between = ladder->spin < SPIN_BETWEEN ? ladder->spin : SPIN_BETWEEN;
    int64_t now = since;
    for (uint64_t i = 0; now < deadline; i++) {
        if (ladder->yields != 0 ? i == ladder->yields : now - since > ladder->yield_ns)
            break;
        if (i == 0 && learns(ladder))
            yield_and_learn(ladder);
        else
            sched_yield();
        int status = spin(world, wait, between);
        if (status != XCCL_AGAIN)
            return status;
        now = xccl_now_ns();
    }
    return XCCL_AGAIN;
}

/* Sleeps until rung, at most one slice or to the deadline. XCCL_AGAIN with *out_rung: somebody rang. */
static int doze(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline, bool *out_rung) {
    uint32_t bell = xccl_doorbell_arm(world);
    xccl_chaos_pause(world, XCCL_CHAOS_SLEEP);
    int status = poll(world, wait);
    xccl_chaos_pause(world, XCCL_CHAOS_SLEEP);
    int64_t left = status == XCCL_AGAIN ? deadline - xccl_now_ns() : 0;
    *out_rung = left > 0 && xccl_doorbell_sleep(world, bell, left < SLICE_NS ? left : SLICE_NS);
    xccl_doorbell_disarm(world);
    return status;
}

/* A ring that brings not yet all that is awaited mostly comes before others soon: so it yields again, rather than let
 * each of them pay for waking it. */
static int sleep_until_ready(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline) {
    int64_t next_look = 0;
    for (unsigned turn = 0;;) {
        int64_t now = xccl_now_ns();
        if (now >= next_look || now >= deadline) {
            int status = xccl_wait_look(world, wait, deadline, turn++);
            if (status != XCCL_AGAIN)
                return status;
            next_look = now + SLICE_NS;
        }
        bool rung;
        int status = doze(world, wait, deadline, &rung);
        if (status == XCCL_AGAIN && rung)
            status = yield(world, wait, deadline, xccl_now_ns());
        if (status != XCCL_AGAIN)
            return status;
    }
}

static int __attribute__((noinline)) wait_slowly(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline) {
    deadline = xccl_deadline_at(world, deadline);
    int64_t since = xccl_now_ns();
    int status = xccl_chaos_skips(world) ? XCCL_AGAIN : yield(world, wait, deadline, since);
    if (status == XCCL_AGAIN) {
        status = sleep_until_ready(world, wait, deadline);
        atomic_store_explicit(&world->ranks[world->rank].waits_for, -1, memory_order_relaxed);
    }
    learn_length(&world->ladder, xccl_now_ns() - since);
    return status;
}

/* A fault that is planned for when the operation waits. */
static int __attribute__((noinline)) strike(xccl_world_t *world) {
    int op = atomic_load_explicit(&world->ranks[world->rank].operation, memory_order_relaxed);
    return xccl_fault_strike(world, op, XCCL_FAULT_WAITS);
}

static int __attribute__((noinline)) wait_in_chaos(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline) {
    xccl_chaos_pause(world, XCCL_CHAOS_WAIT);
    int status = wait->ready(wait->arg) ? XCCL_OK : XCCL_AGAIN;
    if (status == XCCL_AGAIN && !xccl_chaos_skips(world))
        status = spin(world, wait, world->ladder.spin);
    if (status == XCCL_AGAIN) {
        xccl_chaos_stall(world);
        status = wait_slowly(world, wait, deadline);
    }
    xccl_chaos_pause(world, XCCL_CHAOS_WOKEN);
    return status;
}

int xccl_wait(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline) {
    int status = xccl_faults_are_off(world) ? XCCL_OK : strike(world);
    if (status != XCCL_OK)
        return status;
    if (!xccl_chaos_is_off(world))
        return wait_in_chaos(world, wait, deadline);
    if (wait->ready(wait->arg))
        return XCCL_OK;
    status = spin(world, wait, world->ladder.spin);
    return status == XCCL_AGAIN ? wait_slowly(world, wait, deadline) : status;
}

int xccl_wait_for_survivors(xccl_world_t *world, const xccl_wait_t *wait, int64_t deadline) {
    world->outlives_peers = true;
    int status = xccl_wait(world, wait, deadline);
    world->outlives_peers = false;
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
