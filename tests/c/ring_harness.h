/* The ring alone, for its race: see ring_harness.c. */
#ifndef RING_HARNESS_H
#define RING_HARNESS_H

#include <stdint.h>

typedef struct pair_t pair_t;

pair_t *pair_new(uint64_t lines, uint64_t data_bytes, uint64_t position);
void pair_free(pair_t *pair);
void pair_far_ticks(pair_t *pair, uint64_t ticks);

/* Two threads pass `count` messages; the number of wrong ones. Needs 1024 bytes of data. */
uint64_t pair_race(pair_t *pair, uint64_t count);

#endif
