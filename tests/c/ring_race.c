/* The race of ring_harness.c as a program, for the sanitizers. Argument: messages. */
#include <stdio.h>
#include <stdlib.h>

#include "ring_harness.h"

int main(int argc, char **argv) {
    uint64_t wrong = 0;
    for (uint64_t lines = 2; argc == 2 && lines <= 16; lines *= 2) {
        pair_t *pair = pair_new(lines, 1024, UINT32_MAX - 100);
        pair_far_ticks(pair, lines % 3 == 1); /* 4 and 16 lines: copies go around the caches */
        wrong += pair_race(pair, strtoull(argv[1], NULL, 10));
        pair_free(pair);
    }
    if (wrong)
        fprintf(stderr, "%llu wrong messages\n", (unsigned long long)wrong);
    return argc != 2 || wrong != 0;
}
