/* Vector clocks, and the words that carry them. */
#include <sched.h>

#include "gas.h"
#include "heap.h"
#include "race.h"

/* ---- locks ---- */

void xccl_race_lock(xccl_world_t *world, _Atomic uint32_t *lock) {
    const uint32_t mine = (uint32_t)world->rank + 1;
    for (unsigned turn = 1;; turn++) {
        uint32_t holder = 0;
        /* acquire pairs with the release of the last holder */
        if (atomic_compare_exchange_weak_explicit(lock, &holder, mine, memory_order_acquire, memory_order_relaxed))
            return;
        if (turn % 64 == 0)
            sched_yield();
        /* what a dead holder left half done may lose a report of that rank's accesses; a holder that is no rank never
         * leaves */
        bool is_rank = holder - 1 < (uint32_t)world->size;
        if (turn % 4096 == 0 && holder != 0 && (!is_rank || xccl_shm_is_dead(world, (int)holder - 1)) &&
            atomic_compare_exchange_strong_explicit(lock, &holder, mine, memory_order_acquire, memory_order_relaxed))
            return;
    }
}

void xccl_race_unlock(_Atomic uint32_t *lock) {
    /* release pairs with the acquire of the next holder */
    atomic_store_explicit(lock, 0, memory_order_release);
}

/* ---- clocks ---- */

static void join(uint64_t *to, const uint64_t *from, uint64_t width) {
    for (uint64_t i = 0; i < width; i++)
        if (from[i] > to[i])
            to[i] = from[i];
}

uint64_t xccl_race_learn(xccl_race_t *race, xccl_race_clock_t *clock) {
    xccl_race_lock(race->world, &clock->lock);
    join(race->known, clock->at, race->layout.width);
    uint64_t time = clock->time;
    xccl_race_unlock(&clock->lock);
    return time;
}

void xccl_race_settle_puts(xccl_race_t *race, int rank) {
    int me = race->world->rank;
    if (rank != XCCL_RACE_ALL) {
        race->known[xccl_race_puts(race, me, rank)] = race->now;
        return;
    }
    for (uint64_t column = 0; column < race->layout.columns; column++)
        race->known[xccl_race_own(race, me) + 1 + column] = race->now;
}

void xccl_race_advance(xccl_race_t *race, int rank) {
    xccl_race_settle_puts(race, rank);
    race->known[xccl_race_own(race, race->world->rank)] = race->now++;
}

void xccl_race_tell(xccl_race_t *race, xccl_race_clock_t *clock, int rank) {
    xccl_race_advance(race, rank);
    xccl_race_lock(race->world, &clock->lock);
    join(clock->at, race->known, race->layout.width);
    xccl_race_unlock(&clock->lock);
}

void xccl_race_fence_slow(xccl_world_t *world) {
    xccl_race_t *race = world->race;
    xccl_race_clock_t *fence = xccl_race_at(race, world->rank, race->layout.fence);
    /* Not the puts: the fence orders them for who sees a later put of this rank in the same window. */
    race->known[xccl_race_own(race, world->rank)] = race->now;
    xccl_race_lock(world, &fence->lock);
    join(fence->at, race->known, race->layout.width);
    fence->time = race->now++;
    xccl_race_unlock(&fence->lock);
}

void xccl_race_quiet_slow(xccl_world_t *world) {
    xccl_race_settle_puts(world->race, XCCL_RACE_ALL);
    world->race->now++; /* later puts are not among those */
}

/* ---- words ---- */

static const uint64_t CLAIMED = 1ull << 63; /* of a key: its word is being made */

static xccl_race_word_t *word_at(const xccl_race_t *race, int rank, uint64_t index) {
    return xccl_race_at(race, rank, race->layout.words + index * race->layout.word_bytes);
}

/* Clock 0 is that of the releases that are forgotten. */
static uint64_t *clock_of(const xccl_race_t *race, xccl_race_word_t *word, uint64_t index) {
    return (uint64_t *)(word + 1) + index * race->layout.width;
}

static xccl_race_word_t *overflow(const xccl_race_t *race, int rank) {
    return xccl_race_at(race, rank, race->layout.overflow);
}

xccl_race_word_t *xccl_race_find_word(xccl_race_t *race, int rank, uint64_t offset, bool create) {
    _Atomic uint64_t *keys = xccl_race_at(race, rank, race->layout.keys);
    uint64_t start = (offset / 4 * 0x9e3779b97f4a7c15ull) >> 52;
    for (uint64_t probe = 0; probe < XCCL_RACE_WORDS; probe++) {
        uint64_t index = (start + probe) % XCCL_RACE_WORDS;
        /* acquire pairs with the release below: who sees the key sees the word's pages */
        uint64_t key = atomic_load_explicit(&keys[index], memory_order_acquire);
        if (key == 0) {
            if (!create)
                return NULL;
            if (!atomic_compare_exchange_strong(&keys[index], &key, offset | CLAIMED)) {
                probe--; /* somebody else's now, perhaps for the same word: look again */
                continue;
            }
            uint64_t at = race->area + race->layout.words + index * race->layout.word_bytes;
            if (xccl_heap_commit_at(race->world, rank, at, race->layout.word_bytes) != XCCL_OK) {
                atomic_store_explicit(&keys[index], 0, memory_order_release);
                return overflow(race, rank);
            }
            atomic_store_explicit(&keys[index], offset, memory_order_release);
            return word_at(race, rank, index);
        }
        if (key == (offset | CLAIMED)) {
            sched_yield();
            probe--;
        } else if (key == offset) {
            return word_at(race, rank, index);
        }
    }
    return overflow(race, rank);
}

void xccl_race_release_word(xccl_race_t *race, xccl_race_word_t *word, uint64_t value, bool is_update) {
    uint64_t width = race->layout.width, place = word->releases % XCCL_RACE_HISTORY;
    uint64_t *clock = clock_of(race, word, 1 + place);
    if (word->releases >= XCCL_RACE_HISTORY)
        join(clock_of(race, word, 0), clock, width);
    memcpy(clock, race->known, width * sizeof *clock);
    /* an update keeps the chain: who sees its value has also seen what it was added to */
    if (is_update && word->releases > 0)
        join(clock, clock_of(race, word, 1 + (word->releases - 1) % XCCL_RACE_HISTORY), width);
    word->values[place] = value;
    word->releases++;
}

void xccl_race_acquire_word(xccl_race_t *race, xccl_race_word_t *word, uint64_t value, bool last) {
    uint64_t width = race->layout.width;
    uint64_t kept = word->releases < XCCL_RACE_HISTORY ? word->releases : XCCL_RACE_HISTORY;
    for (uint64_t back = 1; back <= kept; back++) {
        uint64_t place = (word->releases - back) % XCCL_RACE_HISTORY;
        if (last || word->is_shared || word->values[place] == value)
            join(race->known, clock_of(race, word, 1 + place), width);
        if (!word->is_shared && (last || word->values[place] == value))
            return;
    }
    join(race->known, clock_of(race, word, 0), width);
}
