/* heap.h - the symmetric heap (gas layer): where blocks lie in the three areas of a window.
 *
 * Each rank keeps, in its own window, a sorted table of its blocks per area. A collective allocation reads the
 * tables of all members and takes the lowest range that is free on every one, so that communicators with
 * different members can allocate independently. Blocks are whole pages; freed pages go back to the system.
 */
#ifndef XCCL_HEAP_H
#define XCCL_HEAP_H

#include "shm.h"

enum { XCCL_HEAP_MAX_BLOCKS = 4096 };

typedef struct xccl_block_t {
    uint64_t offset;  /* from the start of the window, page aligned */
    uint64_t bytes;   /* as asked for */
    uint64_t context; /* communicator that allocated it; 0 is the world */
} xccl_block_t;

typedef struct xccl_heap_table_t {
    uint64_t count;
    xccl_block_t blocks[XCCL_HEAP_MAX_BLOCKS]; /* sorted by offset */
} xccl_heap_table_t;

/* The block of window `rank` that contains [offset, offset+bytes), NULL if there is none. */
const xccl_block_t *xccl_heap_find(const xccl_world_t *world, int rank, uint64_t offset, uint64_t bytes);

/* xccl_heap_commit for the window of `rank`: a sender reserves the pages of its ring at the receiver. */
int xccl_heap_commit_at(xccl_world_t *world, int rank, uint64_t offset, uint64_t bytes);

#endif
