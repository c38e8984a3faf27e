/* race.h - what the parts of the happens-before checker share (racecheck.c, race_clock.c, race_shadow.c).
 *
 *   checker's area of a window, behind the app data area
 *   | slots | streams | acks | fence | keys | overflow word | words | sites | cells, one for each line of app data |
 *
 * A clock has, for each rank q, the time up to which all that q did itself is known, and for each rank d the time up to
 * which q's puts to d are known to be complete: these lag behind until q calls quiet or signals d. With more than
 * XCCL_RACE_MAX_EXACT ranks the second are kept together, as if each signal completed all puts.
 */
#ifndef XCCL_RACE_H
#define XCCL_RACE_H

#include "racecheck.h"

enum {
    XCCL_RACE_MAX_EXACT = 32,
    XCCL_RACE_CONTEXTS = 8, /* communicators that do not share slots; those that do only take more for ordered */
    XCCL_RACE_SLOTS = 12,   /* of a context: two epochs of six kinds */
    XCCL_RACE_WORDS = 4096, /* words of a window with a history of their own; further ones share one */
    XCCL_RACE_HISTORY = 8,  /* releases of a word that are told apart */
    XCCL_RACE_SITES = 4096,
    XCCL_RACE_SITE_BYTES = 192,
    XCCL_RACE_LEAST_RECORDS = 6, /* of a line, and one more for each rank */
    XCCL_RACE_MOST_RECORDS = 16
};

typedef struct xccl_race_clock_t {
    _Atomic uint32_t lock; /* rank + 1 of the holder */
    uint32_t unused;
    uint64_t time; /* of the fence clock: when its rank fenced last */
    uint64_t at[];
} xccl_race_clock_t;

/* History of a word that is waited for; behind it the clocks: that of all releases forgotten, then those kept. */
struct xccl_race_word_t {
    _Atomic uint32_t lock;
    bool is_shared;
    uint64_t releases;
    uint64_t values[XCCL_RACE_HISTORY];
};

/* An access to some bytes of a line. */
typedef struct xccl_race_record_t {
    uint64_t mask;
    uint64_t time;
    uint32_t site;
    uint16_t rank;
    uint8_t flags;
    uint8_t op;
} xccl_race_record_t;
_Static_assert(sizeof(xccl_race_record_t) == 24, "a record is read by other ranks");

typedef struct xccl_race_cell_t {
    _Atomic uint32_t lock;
    _Atomic uint32_t label; /* site that describes the array that begins here */
    uint16_t count;
    uint16_t next; /* record that is given up next */
    uint32_t lost; /* a put was given up */
    xccl_race_record_t records[];
} xccl_race_cell_t;

typedef struct xccl_race_layout_t {
    uint64_t columns; /* of a rank's completed puts */
    uint64_t width;   /* numbers of a clock */
    uint64_t clock_bytes, word_bytes, cell_bytes;
    uint64_t num_records;
    uint64_t slots, streams, acks, fence, keys, overflow, words, sites, cells; /* offsets */
    uint64_t bytes;
} xccl_race_layout_t;

typedef struct xccl_race_t {
    xccl_world_t *world;
    xccl_race_layout_t layout;
    uint64_t area; /* of the checker in every window */
    uint64_t now;  /* this rank's time: grows with each release */
    uint32_t site; /* where the program is */
    uint32_t num_sites;
    uint64_t known[]; /* the clock of this rank */
} xccl_race_t;

static inline void *xccl_race_at(const xccl_race_t *race, int rank, uint64_t offset) {
    return race->world->windows + (uint64_t)rank * race->world->stride + race->area + offset;
}
/* Index of the time of rank q's own doings, and of its puts to d. */
static inline uint64_t xccl_race_own(const xccl_race_t *race, int q) {
    return (uint64_t)q * (1 + race->layout.columns);
}
static inline uint64_t xccl_race_puts(const xccl_race_t *race, int q, int d) {
    return xccl_race_own(race, q) + 1 + (race->layout.columns == 1 ? 0 : (uint64_t)d);
}

/* ---- clocks (race_clock.c) ---- */

/* A lock of shared state, given up for a holder that is dead. */
void xccl_race_lock(xccl_world_t *world, _Atomic uint32_t *lock);
void xccl_race_unlock(_Atomic uint32_t *lock);

/* This rank learns what `clock` says. Its `time`. */
uint64_t xccl_race_learn(xccl_race_t *race, xccl_race_clock_t *clock);
/* All that this rank knows and did goes into `clock`, with its puts to `rank` (or to all). */
void xccl_race_tell(xccl_race_t *race, xccl_race_clock_t *clock, int rank);
/* The puts to `rank` (or to all) are complete. */
void xccl_race_settle_puts(xccl_race_t *race, int rank);

/* Before a release that completes the puts to `rank` (or to all): this rank's clock says all that it did, and what it
 * does from now on is not among that. */
void xccl_race_advance(xccl_race_t *race, int rank);

/* The word at (rank, offset), NULL if nothing was released on it and `create` is false. */
xccl_race_word_t *xccl_race_find_word(xccl_race_t *race, int rank, uint64_t offset, bool create);
void xccl_race_release_word(xccl_race_t *race, xccl_race_word_t *word, uint64_t value, bool is_update);
/* What was released up to when the word got `value`; by the last release in particular if `last`. */
void xccl_race_acquire_word(xccl_race_t *race, xccl_race_word_t *word, uint64_t value, bool last);

/* ---- accesses (race_shadow.c) ---- */

/* Notes an access to (rank, offset); RACE if it races with one noted before. */
int xccl_race_access(xccl_race_t *race, int rank, uint64_t offset, uint64_t bytes, int flags, int op);
/* This rank has seen the word at (rank, offset): it learns what puts to it came behind (fence). */
void xccl_race_learn_from_puts(xccl_race_t *race, int rank, uint64_t offset);
xccl_race_cell_t *xccl_race_cell(const xccl_race_t *race, int rank, uint64_t offset);

/* (rank, offset) of an address in an app data area; false if it is none. */
bool xccl_race_locate(const xccl_race_t *race, const void *address, int *out_rank, uint64_t *out_offset);

#endif
