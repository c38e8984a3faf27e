/* The race of ring_harness.c as a program, for the sanitizers. Argument: messages. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct pair_t pair_t;
pair_t *pair_new(uint64_t lines, uint64_t blocks, uint64_t block_bytes, uint64_t position);
void pair_free(pair_t *pair);
uint64_t pair_race(pair_t *pair, uint64_t count);

int main(int argc, char **argv) {
    uint64_t wrong = 0;
    for (uint64_t blocks = 1; argc == 2 && blocks <= 8; blocks *= 2) {
        pair_t *pair = pair_new(8, blocks, 128, UINT32_MAX - 100);
        wrong += pair_race(pair, strtoull(argv[1], NULL, 10));
        pair_free(pair);
    }
    if (wrong)
        fprintf(stderr, "%llu wrong messages\n", (unsigned long long)wrong);
    return argc != 2 || wrong != 0;
}
