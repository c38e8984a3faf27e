/* shrink.c - a communicator of the survivors (gas layer).
 *
 * The members may die at any moment, also in here, yet all survivors must end with the same communicator. Shared memory
 * makes that simple: it outlives its writers, and one compare-and-swap decides for all. An attempt k = 1, 2, ... goes
 *
 *   arrive      every member says so; wait until each has arrived or is dead
 *   decide      who gets here proposes those that arrived; the first to swap decision[k] decides for all
 *   clear       each member of that view clears its page of the new context; wait for all, or their death
 *   open        the layers of the new communicator, as after a split: fails if one of the view dies
 *   commit      wait until each has opened, has failed to, or is dead; the first to swap commit[k] decides for all
 *               whether the view stands (each has opened) or everybody begins attempt k + 1
 *
 * Why views cannot differ: both decisions are words that change once. What a decision refers to (the proposal, the
 * progress words) was written before the swap and is not written again before all that live have read it, because
 * attempt k + 1 decides nothing before all of them have arrived there.
 *
 * The words that decide are in the page of member 0, dead or alive: a window stays mapped as long as the world. */
#include <stdlib.h>
#include <string.h>

#include "gas.h"
#include "layers.h"
#include "status.h"

/* Steps of an attempt, in a member's progress word: 4 * attempt + step. */
enum { ARRIVED = 0, CLEARED = 1, OPENED = 2, FAILED = 3, STEPS = 4 };
enum { COMMITTED = 1, REPEATED = 2 };

typedef struct shrink_t {
    xccl_comm_t *parent;
    xccl_world_t *world;
    uint64_t attempt;
    int64_t deadline;
    int view[XCCL_MAX_RANKS]; /* world ranks, in the order of the parent */
    int view_size;
    int context;
} shrink_t;

static xccl_shrink_page_t *page_of(const shrink_t *shrink, int world_rank) {
    return &xccl_comm_page(shrink->parent, world_rank)->shrink;
}

static xccl_shrink_page_t *deciding_page(const shrink_t *shrink) {
    return page_of(shrink, shrink->parent->ranks[0]);
}

static uint64_t progress_of(const shrink_t *shrink, int world_rank) {
    /* acquire pairs with the release in advance: who sees a step sees what was written before it */
    return atomic_load_explicit(&page_of(shrink, world_rank)->progress, memory_order_acquire);
}

static bool is_gone(const xccl_world_t *world, int rank) {
    int32_t state = atomic_load_explicit(&world->ranks[rank].state, memory_order_acquire);
    return state == XCCL_RANK_DEAD || state == XCCL_RANK_CLOSED;
}

/* ---- waiting for all that live ---- */

typedef struct step_t {
    const shrink_t *shrink;
    const int *ranks;
    int count;
    uint64_t progress; /* that each must reach, or be gone */
} step_t;

static bool is_missing(const step_t *step, int rank) {
    return progress_of(step->shrink, rank) < step->progress && !is_gone(step->shrink->world, rank);
}

static bool step_ready(void *arg) {
    const step_t *step = arg;
    for (int i = 0; i < step->count; i++)
        if (is_missing(step, step->ranks[i]))
            return false;
    return true;
}

static bool step_awaited(void *arg, int index, xccl_awaited_t *out) {
    static const char *const NAMES[STEPS] = {"arrival at shrink", "cleared page", "opened communicator", ""};
    const step_t *step = arg;
    for (int i = 0; i < step->count; i++) {
        int rank = step->ranks[i];
        if (!is_missing(step, rank) || index-- > 0)
            continue;
        *out = (xccl_awaited_t){rank, step->progress, progress_of(step->shrink, rank), NAMES[step->progress % STEPS]};
        return true;
    }
    return false;
}

static int await_step(const shrink_t *shrink, const int *ranks, int count, uint64_t name) {
    step_t step = {shrink, ranks, count, STEPS * shrink->attempt + name};
    xccl_wait_t wait = {.ready = step_ready, .awaited = step_awaited, .arg = &step};
    return xccl_wait_for_survivors(shrink->world, &wait, shrink->deadline);
}

static void advance(const shrink_t *shrink, uint64_t step) {
    const xccl_comm_t *parent = shrink->parent;
    XCCL_PUBLISH(shrink->world, &page_of(shrink, shrink->world->rank)->progress, STEPS * shrink->attempt + step,
                 memory_order_release);
    for (int pe = 0; pe < parent->size; pe++)
        if (pe != parent->rank)
            xccl_ring(shrink->world, parent->ranks[pe]);
}

/* ---- deciding ---- */

/* The value that the word has after the first swap, for everybody. */
static uint64_t decide(_Atomic uint64_t *word, uint64_t value) {
    uint64_t decided = 0;
    /* sequentially consistent: publishes what the value refers to, and shows it to those who find it */
    return atomic_compare_exchange_strong(word, &decided, value) ? value : decided;
}

static bool in_view(const uint64_t *view, int rank) {
    return view[rank / 64] >> (rank % 64) & 1;
}

/* The lowest context that none of the view uses; 0 if there is none. */
static int free_context(const shrink_t *shrink, const uint64_t *view) {
    for (int context = 1; context < XCCL_MAX_CONTEXTS; context++) {
        bool used = false;
        for (int pe = 0; pe < shrink->parent->size && !used; pe++) {
            int rank = shrink->parent->ranks[pe];
            used = in_view(view, rank) && page_of(shrink, rank)->contexts_used[context / 64] >> (context % 64) & 1;
        }
        if (!used)
            return context;
    }
    return 0;
}

/* Writes down the members that have arrived. */
static void propose(const shrink_t *shrink) {
    const xccl_comm_t *parent = shrink->parent;
    xccl_shrink_page_t *own = page_of(shrink, shrink->world->rank);
    memset(own->view, 0, sizeof own->view);
    for (int pe = 0; pe < parent->size; pe++) {
        int rank = parent->ranks[pe];
        /* a member that arrived and died since is left for the next attempt if it must be: counting it in is safe */
        if (progress_of(shrink, rank) >= STEPS * shrink->attempt)
            own->view[rank / 64] |= 1ull << (rank % 64);
    }
    own->context = (uint64_t)free_context(shrink, own->view);
}

/* Takes over the first proposal. */
static int agree_on_view(shrink_t *shrink) {
    const xccl_comm_t *parent = shrink->parent;
    _Atomic uint64_t *decision = &deciding_page(shrink)->decision[shrink->attempt - 1];
    /* a rank that comes again after a timeout must not change a proposal of its own that stands */
    if (atomic_load(decision) == 0)
        propose(shrink);
    uint64_t proposer = decide(decision, (uint64_t)parent->rank + 1);
    if (proposer - 1 >= (uint64_t)parent->size)
        return xccl_comm_fail_damaged(parent, 0, "member that decided", proposer, 1, (uint64_t)parent->size);
    const xccl_shrink_page_t *decided = page_of(shrink, parent->ranks[proposer - 1]);
    uint64_t context = xccl_gas_read(&decided->context);
    if (context >= XCCL_MAX_CONTEXTS)
        return xccl_comm_fail_damaged(parent, (int)proposer - 1, "context", context, 0, XCCL_MAX_CONTEXTS - 1);
    shrink->context = (int)context;
    shrink->view_size = 0;
    bool is_member = false;
    for (int pe = 0; pe < parent->size; pe++)
        if (in_view(decided->view, parent->ranks[pe])) {
            shrink->view[shrink->view_size++] = parent->ranks[pe];
            is_member |= pe == parent->rank;
        }
    return is_member ? XCCL_OK
                     : xccl_fail(XCCL_ERR_SYSTEM,
                                 "shrink on rank %d: damaged shared memory: the %d survivors that rank %d names do not "
                                 "contain this rank",
                                 parent->rank, shrink->view_size, (int)proposer - 1);
}

/* Deaths outside the view do not end this rank's waits any more. */
static void mourn(const shrink_t *shrink) {
    xccl_world_t *world = shrink->world;
    for (int rank = 0; rank < world->size; rank++) {
        bool member = false;
        for (int i = 0; i < shrink->view_size && !member; i++)
            member = shrink->view[i] == rank;
        if (!member && atomic_load_explicit(&world->ranks[rank].state, memory_order_acquire) == XCCL_RANK_DEAD)
            world->mourned[rank / 64] |= 1ull << (rank % 64);
    }
}

static bool all_opened(const shrink_t *shrink) {
    for (int i = 0; i < shrink->view_size; i++)
        if (progress_of(shrink, shrink->view[i]) != STEPS * shrink->attempt + OPENED)
            return false;
    return true;
}

/* ---- one attempt ---- */

static int open_view(shrink_t *shrink, xccl_comm_t **out) {
    if (shrink->context == 0)
        return xccl_fail(XCCL_ERR_USAGE, "all %d contexts are in use: close communicators that are no longer needed",
                         XCCL_MAX_CONTEXTS);
    int status = xccl_comm_create_view(shrink->world, shrink->context, shrink->view_size, shrink->view, out);
    if (status != XCCL_OK)
        return status;
    advance(shrink, CLEARED);
    status = await_step(shrink, shrink->view, shrink->view_size, CLEARED);
    if (status == XCCL_OK)
        status = xccl_comm_open_layers(*out, shrink->deadline);
    if (status != XCCL_OK)
        xccl_comm_destroy(*out);
    return status;
}

/* XCCL_AGAIN: the view did not stand, as all survivors know. */
static int attempt(shrink_t *shrink, xccl_comm_t **out) {
    xccl_shrink_page_t *own = page_of(shrink, shrink->world->rank);
    memcpy(own->contexts_used, shrink->world->contexts_used, sizeof own->contexts_used);
    advance(shrink, ARRIVED);
    int status = await_step(shrink, shrink->parent->ranks, shrink->parent->size, ARRIVED);
    if (status != XCCL_OK)
        return status;
    status = agree_on_view(shrink);
    if (status != XCCL_OK)
        return status;
    mourn(shrink);
    xccl_comm_t *comm = NULL;
    int opened = open_view(shrink, &comm);
    advance(shrink, opened == XCCL_OK ? OPENED : FAILED);
    status = await_step(shrink, shrink->view, shrink->view_size, OPENED);
    /* who cannot wait any longer still takes part in the decision, and keeps to it */
    bool stands = status == XCCL_OK && all_opened(shrink);
    uint64_t decided = decide(&deciding_page(shrink)->commit[shrink->attempt - 1], stands ? COMMITTED : REPEATED);
    shrink->attempt++;
    if (decided == COMMITTED) {
        *out = comm;
        return XCCL_OK;
    }
    if (opened == XCCL_OK)
        xccl_comm_discard(comm);
    if (status != XCCL_OK)
        return status;
    return opened == XCCL_OK || opened == XCCL_ERR_PEER_LOST ? XCCL_AGAIN : opened;
}

int xccl_comm_shrink(xccl_comm_t *parent, int64_t timeout_ns, xccl_comm_t **out) {
    xccl_world_t *world = parent->world;
    int status = xccl_check_usable(world);
    if (status != XCCL_OK)
        return status;
    status = xccl_op_begin(world, XCCL_OP_SHRINK);
    if (status != XCCL_OK)
        return status;
    parent->broken = true;
    shrink_t *shrink = calloc(1, sizeof *shrink);
    if (!shrink)
        return xccl_fail(XCCL_ERR_MEMORY, "out of memory");
    *shrink = (shrink_t){
        .parent = parent, .world = world, .deadline = xccl_deadline_at(world, xccl_deadline(world, timeout_ns))};
    for (shrink->attempt = parent->shrink_attempts + 1, status = XCCL_AGAIN; status == XCCL_AGAIN;) {
        if (shrink->attempt > XCCL_SHRINK_ATTEMPTS)
            status = xccl_fail(XCCL_ERR_PEER_LOST, "rank %d, shrink: %d attempts were broken by further deaths",
                               world->rank, XCCL_SHRINK_ATTEMPTS);
        else
            status = attempt(shrink, out);
        int phase = status == XCCL_AGAIN ? xccl_op_phase(world, (int)shrink->attempt) : XCCL_OK;
        if (phase != XCCL_OK)
            status = phase;
    }
    parent->shrink_attempts = shrink->attempt - 1;
    free(shrink);
    return status;
}
