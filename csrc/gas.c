#include "gas.h"

#include "copy.h"
#include "heap.h"
#include "racecheck.h"
#include "status.h"

/* ---- addresses ---- */

void *xccl_gas_local(const xccl_world_t *world, uint64_t offset) {
    return world->own + offset;
}

static bool find_own(const xccl_world_t *world, const void *address, uint64_t bytes, const xccl_block_t **out_block,
                     uint64_t *out_offset) {
    uintptr_t own = (uintptr_t)world->own, at = (uintptr_t)address;
    if (at < own || at - own >= world->stride)
        return false;
    *out_offset = at - own;
    *out_block = xccl_heap_find(world, world->rank, *out_offset, bytes);
    return *out_block != NULL;
}

bool xccl_gas_is_symmetric(const xccl_world_t *world, const void *address, uint64_t bytes, uint64_t *out_offset) {
    const xccl_block_t *block;
    uint64_t offset;
    if (!find_own(world, address, bytes, &block, &offset))
        return false;
    *out_offset = offset;
    return true;
}

static int not_symmetric(const xccl_world_t *world, const char *operation, uint64_t bytes) {
    return xccl_fail(
        XCCL_ERR_USAGE,
        "rank %d, %s: the %llu bytes at this address are not inside one live symmetric array: make it with "
        "comm.zeros/empty/array, and do not use it after comm.free",
        world->rank, operation, (unsigned long long)bytes);
}

int xccl_gas_offset(const xccl_world_t *world, const void *address, uint64_t bytes, uint64_t *out_offset) {
    return xccl_gas_is_symmetric(world, address, bytes, out_offset) ? XCCL_OK : not_symmetric(world, "offset", bytes);
}

/* pe's copy of symmetric [address, address+bytes) of the app data area. */
static int resolve(const xccl_comm_t *comm, const void *address, uint64_t bytes, int pe, const char *operation,
                   void **out) {
    const xccl_world_t *world = comm->world;
    const xccl_block_t *block;
    uint64_t offset;
    int status = xccl_comm_check_pe(comm, pe, operation);
    if (status != XCCL_OK)
        return status;
    if (!find_own(world, address, bytes, &block, &offset) || offset < world->header->area_offset[XCCL_AREA_APP])
        return not_symmetric(world, operation, bytes);
    int rank = comm->ranks[pe];
    /* Memory of this communicator or of the world exists at every member; that of another one may not. */
    if (block->context != 0 && block->context != (uint64_t)comm->context && !xccl_heap_find(world, rank, offset, bytes))
        return xccl_fail(XCCL_ERR_USAGE,
                         "rank %d, %s: rank %d has no copy of this array, it was allocated on another communicator",
                         comm->rank, operation, pe);
    *out = xccl_gas_at(world, rank, offset);
    return XCCL_OK;
}

int xccl_gas_ptr(const xccl_comm_t *comm, const void *symmetric, uint64_t bytes, int pe, void **out) {
    int status = xccl_comm_check(comm);
    if (status == XCCL_OK)
        status = resolve(comm, symmetric, bytes, pe, "ptr", out);
    if (status == XCCL_OK)
        xccl_chaos_expose(comm->world, comm->ranks[pe], *out, bytes);
    return status;
}

/* ---- put and get ---- */

/* A rank may put to itself, so the ranges may overlap. */
static void move(const xccl_world_t *world, void *to, const void *from, uint64_t bytes) {
    uintptr_t target = (uintptr_t)to, source = (uintptr_t)from;
    if (target - source < bytes || source - target < bytes)
        memmove(to, from, bytes);
    else
        xccl_copy_part(to, from, bytes, bytes, world->streaming_bytes);
}

static inline void put(xccl_world_t *world, int rank, void *to, const void *from, uint64_t bytes) {
    if (!xccl_chaos_holds(world, rank, to, from, bytes))
        move(world, to, from, bytes);
}

/* Tells the race checker. `put`: XCCL_RACE_PUT if the write is a put. */
static inline int note_move(xccl_world_t *world, const void *dst, const void *src, uint64_t bytes, int put, int op) {
    int status = xccl_race_touch(world, src, bytes, XCCL_RACE_READ, op);
    return status == XCCL_OK ? xccl_race_touch(world, dst, bytes, XCCL_RACE_WRITE | put, op) : status;
}

int xccl_gas_put(xccl_comm_t *comm, void *dst, const void *src, uint64_t bytes, int pe) {
    void *remote = NULL;
    int status = xccl_comm_check(comm);
    if (status == XCCL_OK)
        status = resolve(comm, dst, bytes, pe, "put", &remote);
    if (status == XCCL_OK)
        status = xccl_fault_point(comm->world, XCCL_RACE_OP_PUT, 0);
    if (status == XCCL_OK)
        status = note_move(comm->world, remote, src, bytes, XCCL_RACE_PUT, XCCL_RACE_OP_PUT);
    if (status == XCCL_OK)
        put(comm->world, comm->ranks[pe], remote, src, bytes);
    return status;
}

int xccl_gas_get(xccl_comm_t *comm, void *dst, const void *src, uint64_t bytes, int pe) {
    void *remote = NULL;
    int status = xccl_comm_check(comm);
    if (status == XCCL_OK)
        status = resolve(comm, src, bytes, pe, "get", &remote);
    if (status == XCCL_OK)
        status = xccl_fault_point(comm->world, XCCL_RACE_OP_GET, 0);
    if (status == XCCL_OK)
        status = note_move(comm->world, dst, remote, bytes, 0, XCCL_RACE_OP_GET);
    if (status != XCCL_OK)
        return status;
    xccl_chaos_read(comm->world, comm->ranks[pe], remote, bytes);
    move(comm->world, dst, remote, bytes);
    return XCCL_OK;
}

int xccl_gas_sync(xccl_comm_t *comm, int64_t timeout_ns) {
    int status = xccl_comm_check(comm);
    if (status != XCCL_OK)
        return status;
    status = xccl_op_begin(comm->world, XCCL_OP_BARRIER);
    if (status != XCCL_OK)
        return status;
    return xccl_comm_settle(comm, xccl_comm_sync(comm, xccl_deadline(comm->world, timeout_ns)));
}

void xccl_gas_fence(xccl_comm_t *comm) {
    xccl_race_fence(comm->world);
    xccl_chaos_fence(comm->world);
    /* puts are plain stores of this thread: a release fence keeps them before every later store */
    atomic_thread_fence(memory_order_release);
}

void xccl_gas_quiet(xccl_comm_t *comm) {
    xccl_race_quiet(comm->world);
    xccl_chaos_order(comm->world, XCCL_CHAOS_ALL, memory_order_seq_cst);
    atomic_thread_fence(memory_order_seq_cst);
}

/* ---- signals ---- */

static int apply_signal(xccl_comm_t *comm, void *word, uint64_t value, xccl_signal_op_t op, int pe, int race_op) {
    int status = xccl_race_touch(comm->world, word, sizeof value, XCCL_RACE_WRITE | XCCL_RACE_ATOMIC, race_op);
    if (status != XCCL_OK)
        return status;
    xccl_chaos_order(comm->world, comm->ranks[pe], memory_order_release);
    xccl_race_word_t *held = xccl_race_hold(comm->world, word);
    if (!xccl_faults_are_off(comm->world))
        value ^= xccl_fault_damage(comm->world, word, true);
    /* release pairs with the acquire in wait_until: who sees the signal sees all earlier puts */
    if (op == XCCL_SIGNAL_ADD)
        atomic_fetch_add_explicit((_Atomic uint64_t *)word, value, memory_order_release);
    else
        atomic_store_explicit((_Atomic uint64_t *)word, value, memory_order_release);
    xccl_race_signalled(comm->world, held, word, comm->ranks[pe], op == XCCL_SIGNAL_ADD);
    xccl_ring(comm->world, comm->ranks[pe]);
    return XCCL_OK;
}

static int check_word(const void *word, int width, const char *operation) {
    if ((uintptr_t)word % (uintptr_t)width == 0)
        return XCCL_OK;
    return xccl_fail(XCCL_ERR_USAGE, "%s: the word is not aligned to its %d bytes", operation, width);
}

int xccl_gas_put_signal(xccl_comm_t *comm, void *dst, const void *src, uint64_t bytes, uint64_t *signal, uint64_t value,
                        xccl_signal_op_t op, int pe) {
    void *remote, *word;
    int status = xccl_comm_check(comm);
    if (status == XCCL_OK)
        status = resolve(comm, dst, bytes, pe, "put_signal", &remote);
    if (status == XCCL_OK)
        status = resolve(comm, signal, sizeof *signal, pe, "put_signal", &word);
    if (status == XCCL_OK)
        status = check_word(signal, sizeof *signal, "put_signal");
    if (status == XCCL_OK)
        status = xccl_fault_point(comm->world, XCCL_RACE_OP_PUT_SIGNAL, 0);
    if (status != XCCL_OK)
        return status;
    status = note_move(comm->world, remote, src, bytes, XCCL_RACE_PUT, XCCL_RACE_OP_PUT_SIGNAL);
    if (status != XCCL_OK)
        return status;
    put(comm->world, comm->ranks[pe], remote, src, bytes);
    return apply_signal(comm, word, value, op, pe, XCCL_RACE_OP_PUT_SIGNAL);
}

int xccl_gas_signal_op(xccl_comm_t *comm, uint64_t *signal, uint64_t value, xccl_signal_op_t op, int pe) {
    void *word;
    int status = xccl_comm_check(comm);
    if (status == XCCL_OK)
        status = resolve(comm, signal, sizeof *signal, pe, "signal_op", &word);
    if (status == XCCL_OK)
        status = check_word(signal, sizeof *signal, "signal_op");
    if (status == XCCL_OK)
        status = xccl_fault_point(comm->world, XCCL_RACE_OP_SIGNAL_OP, 0);
    return status == XCCL_OK ? apply_signal(comm, word, value, op, pe, XCCL_RACE_OP_SIGNAL_OP) : status;
}

typedef struct comparison_t {
    const _Atomic uint64_t *word;
    xccl_cmp_t cmp;
    uint64_t value;
    uint64_t seen; /* the value that made it true: a peer may change the word right after */
} comparison_t;

static bool compares(void *arg) {
    comparison_t *c = arg;
    /* acquire pairs with the release in apply_signal */
    uint64_t seen = atomic_load_explicit(c->word, memory_order_acquire);
    c->seen = seen;
    switch (c->cmp) {
    case XCCL_CMP_EQ:
        return seen == c->value;
    case XCCL_CMP_NE:
        return seen != c->value;
    case XCCL_CMP_GT:
        return seen > c->value;
    case XCCL_CMP_GE:
        return seen >= c->value;
    case XCCL_CMP_LT:
        return seen < c->value;
    case XCCL_CMP_LE:
        return seen <= c->value;
    }
    return false;
}

/* Any member may write a user's signal: no peer can be named. */
static bool comparison_awaited(void *arg, int index, xccl_awaited_t *out) {
    const comparison_t *c = arg;
    if (index > 0)
        return false;
    *out = (xccl_awaited_t){.peer = -1, .expected = c->value, .seen = c->seen, .what = "signal"};
    return true;
}

int xccl_gas_wait_until(xccl_comm_t *comm, uint64_t *signal, xccl_cmp_t cmp, uint64_t value, int64_t timeout_ns,
                        uint64_t *out_seen) {
    void *word;
    int status = xccl_comm_check(comm);
    if (status == XCCL_OK)
        status = resolve(comm, signal, sizeof *signal, comm->rank, "wait_until", &word);
    if (status == XCCL_OK)
        status = check_word(signal, sizeof *signal, "wait_until");
    if (status == XCCL_OK && (cmp < XCCL_CMP_EQ || cmp > XCCL_CMP_LE))
        status = xccl_fail(XCCL_ERR_USAGE, "wait_until: unknown comparison %d", (int)cmp);
    if (status != XCCL_OK)
        return status;
    status = xccl_op_begin(comm->world, XCCL_OP_WAIT_UNTIL);
    if (status != XCCL_OK)
        return status;
    comparison_t comparison = {.word = word, .cmp = cmp, .value = value};
    xccl_wait_t wait = {.ready = compares, .awaited = comparison_awaited, .arg = &comparison};
    status = xccl_wait(comm->world, &wait, xccl_deadline(comm->world, timeout_ns));
    if (status != XCCL_OK)
        return status;
    xccl_race_waited(comm->world, word, comparison.seen);
    *out_seen = comparison.seen;
    return XCCL_OK;
}

/* ---- atomics ---- */

#define DEFINE_ATOMIC(width, type)                                                                                     \
    static uint64_t atomic_##width(void *target, xccl_atomic_op_t op, uint64_t value, uint64_t compare) {              \
        _Atomic type *word = target;                                                                                   \
        type expected = (type)compare;                                                                                 \
        switch (op) {                                                                                                  \
        case XCCL_ATOMIC_FETCH:                                                                                        \
            return atomic_load(word);                                                                                  \
        case XCCL_ATOMIC_FETCH_ADD:                                                                                    \
            return atomic_fetch_add(word, (type)value);                                                                \
        case XCCL_ATOMIC_SWAP:                                                                                         \
            return atomic_exchange(word, (type)value);                                                                 \
        case XCCL_ATOMIC_COMPARE_SWAP:                                                                                 \
            atomic_compare_exchange_strong(word, &expected, (type)value);                                              \
            return expected;                                                                                           \
        }                                                                                                              \
        return 0;                                                                                                      \
    }
DEFINE_ATOMIC(4, uint32_t)
DEFINE_ATOMIC(8, uint64_t)

/* Tells the race checker what the atomic operation has seen and written. */
static void note_update(xccl_world_t *world, xccl_race_word_t *held, const void *word, xccl_atomic_op_t op,
                        uint64_t value, bool swaps, uint64_t old) {
    bool wrote = op == XCCL_ATOMIC_FETCH_ADD || op == XCCL_ATOMIC_SWAP || (op == XCCL_ATOMIC_COMPARE_SWAP && swaps);
    xccl_race_updated(world, held, word, op == XCCL_ATOMIC_FETCH_ADD ? old + value : value, wrote);
}

int xccl_gas_atomic(xccl_comm_t *comm, void *target, int width, xccl_atomic_op_t op, uint64_t value, uint64_t compare,
                    int pe, uint64_t *out_old) {
    void *word;
    if (width != 4 && width != 8)
        return xccl_fail(XCCL_ERR_USAGE, "atomic: a word has 4 or 8 bytes, got %d", width);
    int status = xccl_comm_check(comm);
    if (status == XCCL_OK)
        status = resolve(comm, target, (uint64_t)width, pe, "atomic", &word);
    if (status == XCCL_OK)
        status = check_word(target, width, "atomic");
    if (status == XCCL_OK)
        status = xccl_fault_point(comm->world, XCCL_RACE_OP_ATOMIC, 0);
    if (status != XCCL_OK)
        return status;
    if (op != XCCL_ATOMIC_FETCH)
        status = xccl_race_touch(comm->world, word, (uint64_t)width, XCCL_RACE_WRITE | XCCL_RACE_ATOMIC,
                                 XCCL_RACE_OP_ATOMIC);
    if (status != XCCL_OK)
        return status;
    xccl_chaos_order(comm->world, XCCL_CHAOS_ALL, memory_order_seq_cst);
    xccl_race_word_t *held = xccl_race_hold(comm->world, word);
    *out_old = width == 4 ? atomic_4(word, op, value, compare) : atomic_8(word, op, value, compare);
    if (held)
        note_update(comm->world, held, word, op, value, *out_old == (width == 4 ? (uint32_t)compare : compare),
                    *out_old);
    if (op != XCCL_ATOMIC_FETCH)
        xccl_ring(comm->world, comm->ranks[pe]);
    return XCCL_OK;
}
