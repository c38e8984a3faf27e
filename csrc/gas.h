/* gas.h - the global address space as the protocols above see it (gas layer; internal part).
 *
 * Protocols name memory as (world rank, offset in its window) and touch a peer's memory only through these
 * functions. Whatever a rank may wait for is written by a signal function, which also rings its doorbell.
 */
#ifndef XCCL_GAS_H
#define XCCL_GAS_H

#include <string.h>

#include "chaos.h"
#include "comm.h"
#include "faults.h"
#include "shm.h"

/* The paper's 32-byte metadata field; one per (peer, channel), alone on its 64-byte line.
 *   0          8        16      24
 *   | event_id | offset | count | time |
 * event_id is written last with release order and read first with acquire order: who sees it sees the rest.
 * The writer may overwrite a field only when it knows that the reader is done with it. */
typedef struct xccl_field_t {
    _Alignas(64) _Atomic uint64_t event_id;
    uint64_t offset;
    uint64_t count;
    uint64_t time; /* ns, or free for the protocol */
} xccl_field_t;
_Static_assert(sizeof(xccl_field_t) == XCCL_LINE, "a field has its line for itself");

/* A counter or flag that one peer writes and the owner waits for, alone on its line. */
typedef struct xccl_signal_line_t {
    _Alignas(64) _Atomic uint64_t value;
} xccl_signal_line_t;
_Static_assert(sizeof(xccl_signal_line_t) == XCCL_LINE, "a signal has its line for itself");

/* Address of (rank, offset): for reading rows in place and for kernels. Stores that anybody waits for go
 * through the signal functions below. */
static inline void *xccl_gas_at(const xccl_world_t *world, int rank, uint64_t offset) {
    return world->windows + (uint64_t)rank * world->stride + offset;
}

/* Begins to fetch the line at (rank, offset) for a store to come. Changes nothing but time. */
static inline void xccl_gas_expect_to_write(const xccl_world_t *world, int rank, uint64_t offset) {
    void *line = xccl_gas_at(world, rank, offset);
#if defined(__x86_64__)
    __asm__ volatile("prefetchw %0" : : "m"(*(char *)line)); /* the builtin needs a compiler flag for it */
#else
    __builtin_prefetch(line, 1);
#endif
}

/* Copies into / out of a peer's window. Unordered until a signal function or fence. */
static inline void xccl_gas_put_at(xccl_world_t *world, int rank, uint64_t offset, const void *src, uint64_t bytes) {
    void *to = xccl_gas_at(world, rank, offset);
    if (!xccl_chaos_holds(world, rank, to, src, bytes))
        memcpy(to, src, bytes);
}
static inline void xccl_gas_get_at(xccl_world_t *world, void *dst, int rank, uint64_t offset, uint64_t bytes) {
    const void *from = xccl_gas_at(world, rank, offset);
    xccl_chaos_read(world, rank, from, bytes);
    memcpy(dst, from, bytes);
}

/* Stores `value` in the signal word at (rank, offset). Release: all earlier puts are visible to who sees it. */
static inline void xccl_gas_signal_at(xccl_world_t *world, int rank, uint64_t offset, uint64_t value) {
    _Atomic uint64_t *word = xccl_gas_at(world, rank, offset);
    value = xccl_fault_published(world, word, value);
    /* release pairs with the acquire load of the rank's wait */
    XCCL_PUBLISH(world, word, value, memory_order_release);
    xccl_ring(world, rank);
}

/* Publishes a field at (rank, offset): offset, count and time first, event_id last with release order. */
static inline void xccl_gas_field_at(xccl_world_t *world, int rank, uint64_t at, uint64_t event_id, uint64_t offset,
                                     uint64_t count, uint64_t time) {
    xccl_field_t *field = xccl_gas_at(world, rank, at);
    field->offset = offset;
    field->count = count;
    field->time = time;
    event_id = xccl_fault_published(world, field, event_id);
    /* release pairs with the acquire load of event_id: the reader then sees the three words and all earlier puts */
    XCCL_PUBLISH(world, &field->event_id, event_id, memory_order_release);
    xccl_ring(world, rank);
}

/* Stores `value` in the word at (rank, offset) if it equals `compare`. Returns what it was. Sequentially consistent. */
static inline uint64_t xccl_gas_compare_swap_at(xccl_world_t *world, int rank, uint64_t offset, uint64_t compare,
                                                uint64_t value) {
    _Atomic uint64_t *word = xccl_gas_at(world, rank, offset);
    xccl_chaos_order(world, XCCL_CHAOS_ALL, memory_order_seq_cst);
    if (atomic_compare_exchange_strong(word, &compare, value))
        xccl_ring(world, rank);
    return compare;
}

/* Acquire load of a word of the own window that a peer signals. */
static inline uint64_t xccl_gas_load(const _Atomic uint64_t *word) {
    return atomic_load_explicit(word, memory_order_acquire);
}

/* A word that a peer wrote, read exactly once: what is checked is then what is used, even if the word changes. What
 * makes it visible (an acquire load) comes before. */
static inline uint64_t xccl_gas_read(const void *word) {
    return *(const volatile uint64_t *)word;
}

/* True if [offset, offset+bytes) lies in a window. For what peers say of where their data is. */
static inline bool xccl_gas_in_window(const xccl_world_t *world, uint64_t offset, uint64_t bytes) {
    return bytes <= world->stride && offset <= world->stride - bytes;
}

/* True and *out_offset if [address, address+bytes) lies in one live block of the own window: such a buffer can
 * be read by peers in place. */
bool xccl_gas_is_symmetric(const xccl_world_t *world, const void *address, uint64_t bytes, uint64_t *out_offset);

#endif
