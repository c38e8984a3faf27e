#include "moe.h"

/* Whether a rank writes rows through its caches or past them.
 *
 * Rows are written by one rank and read by others. Where the ranks share a last-level cache, that cache is the way
 * between them. Where they do not (other core complexes, other sockets), each line that a peer has read must be taken
 * back from its cache before it is written again, which costs more than to write it to memory. No table of the system
 * tells which it is, least of all to a virtual machine whose processors move. So both are tried and the faster one
 * stays: what counts is the time of pulling rows and of summing outputs, in which nobody is waited for. The bits are
 * the same either way. */

enum {
    PERIOD = 256,            /* dispatches from trial to trial: all ranks try at the same ones */
    TRIAL = 128,             /* the first of a trial; before it pages are touched and caches filled */
    TRIAL_END = TRIAL + 4,   /* behind the last: only that one is without traces of the other way, and counts */
    SETTLED = TRIAL_END + 4, /* from here on the traces of the trial are gone */
};

static const float CLEARLY = 0.9f; /* how much better the other way must be */

/* Costs are kept apart by size: what fits a cache and what does not have nothing in common. */
static float *cost_of(xccl_moe_t *moe, uint64_t bytes) {
    return moe->store_cost[bytes ? 63 - __builtin_clzll(bytes) : 0];
}

bool xccl_moe_streams(xccl_moe_t *moe, uint64_t epoch, uint64_t bytes) {
    const float *cost = cost_of(moe, bytes);
    bool known = cost[0] > 0 && cost[1] > 0;
    bool streams = known && cost[1] < cost[0] * CLEARLY;
    uint64_t at = epoch % PERIOD;
    return at >= TRIAL && at < TRIAL_END ? !streams : streams;
}

/* A mean that follows a shorter time at once: a longer one may be another process's. */
void xccl_moe_learn(xccl_moe_t *moe, const xccl_moe_handle_t *handle, int64_t ns) {
    uint64_t bytes = (uint64_t)handle->num_recv * moe->layout.row_bytes, at = handle->dispatch_epoch % PERIOD;
    if (bytes == 0 || (at >= TRIAL && at < TRIAL_END - 1) || (at >= TRIAL_END && at < SETTLED))
        return;
    float *cost = &cost_of(moe, bytes)[handle->streams];
    float seen = (float)ns / (float)bytes;
    bool anew = *cost == 0 || at == TRIAL_END - 1;
    *cost = anew ? seen : *cost + (seen - *cost) / (seen < *cost ? 2 : 16);
}
