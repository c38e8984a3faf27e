/* faults.h - faults that a plan injects into this rank, for tests of whoever must stand them (shm layer; internal).
 *
 * A fault strikes at a point: when the rank begins an operation, comes to a phase of it, or comes to wait in it.
 * Without a plan each point is one predicted branch. The faults themselves are described in xccl.h.
 */
#ifndef XCCL_FAULTS_H
#define XCCL_FAULTS_H

#include "shm.h"

/* Does what the plan says for this point. OK, or INJECTED. */
int xccl_fault_strike(xccl_world_t *world, int op, int phase);

/* What to flip in the control word at `word` that this rank is about to publish; flips another word of its line itself
 * if the plan says so. `alone`: the rest of the line is not part of it. */
uint64_t xccl_fault_damage(xccl_world_t *world, void *word, bool alone);

static inline bool xccl_faults_are_off(const xccl_world_t *world) {
    return __builtin_expect(world->faults == NULL, 1);
}

/* The rank is at `phase` of `op`: an xccl_op_t, or one of xccl_race_op_t that the rank table does not know. */
static inline int xccl_fault_point(xccl_world_t *world, int op, int phase) {
    return xccl_faults_are_off(world) ? XCCL_OK : xccl_fault_strike(world, op, phase);
}

/* What this rank publishes at `word` instead of `value`. All else on its line has been written. */
static inline uint64_t xccl_fault_published(xccl_world_t *world, void *word, uint64_t value) {
    return xccl_faults_are_off(world) ? value : value ^ xccl_fault_damage(world, word, false);
}

/* Frees the plan. */
void xccl_faults_close(xccl_world_t *world);

#endif
