/* chaos_puts.c - puts that are held back, and the order in which they become visible.
 *
 * What the memory model orders for one rank's puts is kept: those to a rank before a fence come before those behind it,
 * and puts to one place keep the order of the program. */
#include <stdlib.h>
#include <string.h>

#include "chaos_state.h"

/* ---- making visible ---- */

static bool overlap(const void *a, uint64_t a_bytes, const void *b, uint64_t b_bytes) {
    return (uintptr_t)a - (uintptr_t)b < b_bytes || (uintptr_t)b - (uintptr_t)a < a_bytes;
}

/* A piece that must not become visible before `held`. */
static bool comes_first(const xccl_chaos_held_t *earlier, const xccl_chaos_held_t *held) {
    if (!earlier->data || earlier->rank != held->rank || earlier->number >= held->number)
        return false;
    return earlier->fences < held->fences || overlap(earlier->to, earlier->bytes, held->to, held->bytes);
}

static void apply(xccl_chaos_t *chaos, xccl_chaos_held_t *held);

static void clear_way(xccl_chaos_t *chaos, const xccl_chaos_held_t *held) {
    for (int i = 0; i < XCCL_CHAOS_HELD; i++)
        if (comes_first(&chaos->held[i], held))
            apply(chaos, &chaos->held[i]);
}

/* Recurses at most once a piece: what comes first has a lower number. */
static void apply(xccl_chaos_t *chaos, xccl_chaos_held_t *held) {
    clear_way(chaos, held);
    memcpy(held->to, held->data, held->bytes);
    free(held->data);
    held->data = NULL;
}

/* One of the pieces for `rank`, any of them equally likely; NULL if there is none. */
static xccl_chaos_held_t *choose(xccl_chaos_t *chaos, int rank) {
    int candidates[XCCL_CHAOS_HELD], count = 0;
    for (int i = 0; i < XCCL_CHAOS_HELD; i++)
        if (chaos->held[i].data && (rank == XCCL_CHAOS_ALL || chaos->held[i].rank == rank))
            candidates[count++] = i;
    if (count == 0)
        return NULL;
    return &chaos->held[candidates[xccl_chaos_draw(chaos, XCCL_CHAOS_APPLY) % (uint64_t)count]];
}

bool xccl_chaos_holds_any(const xccl_chaos_t *chaos) {
    for (int i = 0; i < XCCL_CHAOS_HELD; i++)
        if (chaos->held[i].data)
            return true;
    return false;
}

void xccl_chaos_apply(xccl_world_t *world, int rank) {
    for (xccl_chaos_held_t *held; (held = choose(world->chaos, rank)) != NULL;) {
        apply(world->chaos, held);
        xccl_chaos_pause_slow(world, XCCL_CHAOS_APPLY); /* others see some, and not yet the rest */
    }
}

/* Now and then one becomes visible by itself. */
static void apply_one(xccl_chaos_t *chaos, uint64_t bits) {
    xccl_chaos_held_t *held = bits % 8 == 0 ? choose(chaos, XCCL_CHAOS_ALL) : NULL;
    if (held)
        apply(chaos, held);
}

/* Also for a program that polls: what others wait for must not stay behind for ever. */
void xccl_chaos_call_slow(xccl_world_t *world) {
    xccl_chaos_pause_slow(world, XCCL_CHAOS_CALL);
    apply_one(world->chaos, xccl_chaos_draw(world->chaos, XCCL_CHAOS_CALL));
}

void xccl_chaos_fence_slow(xccl_world_t *world) {
    xccl_chaos_t *chaos = world->chaos;
    xccl_chaos_pause_slow(world, XCCL_CHAOS_ORDER);
    chaos->fences++;
    /* what the program stores behind the fence through a pointer comes after the puts before it */
    if (chaos->num_exposed > XCCL_CHAOS_EXPOSED)
        xccl_chaos_apply(world, XCCL_CHAOS_ALL);
    for (int i = 0; i < chaos->num_exposed && i < XCCL_CHAOS_EXPOSED; i++)
        xccl_chaos_apply(world, chaos->exposed[i].rank);
}

void xccl_chaos_read_slow(xccl_world_t *world, int rank, const void *from, uint64_t bytes) {
    xccl_chaos_t *chaos = world->chaos;
    for (int i = 0; i < XCCL_CHAOS_HELD; i++) {
        xccl_chaos_held_t *held = &chaos->held[i];
        if (held->data && held->rank == rank && overlap(held->to, held->bytes, from, bytes))
            apply(chaos, held);
    }
}

/* ---- memory that the program has pointers to ---- */

static bool is_exposed(const xccl_chaos_t *chaos, const void *address, uint64_t bytes) {
    if (chaos->num_exposed > XCCL_CHAOS_EXPOSED)
        return true;
    for (int i = 0; i < chaos->num_exposed; i++) {
        const xccl_chaos_range_t *range = &chaos->exposed[i];
        if (overlap((const void *)range->from, range->to - range->from, address, bytes))
            return true;
    }
    return false;
}

void xccl_chaos_expose_slow(xccl_world_t *world, int rank, const void *address, uint64_t bytes) {
    xccl_chaos_t *chaos = world->chaos;
    if (rank == world->rank || chaos->num_exposed > XCCL_CHAOS_EXPOSED)
        return;
    xccl_chaos_read_slow(world, rank, address, bytes);
    uintptr_t from = (uintptr_t)address, to = from + bytes;
    for (int i = 0; i < chaos->num_exposed; i++)
        if (chaos->exposed[i].from <= from && to <= chaos->exposed[i].to)
            return;
    if (chaos->num_exposed < XCCL_CHAOS_EXPOSED)
        chaos->exposed[chaos->num_exposed] = (xccl_chaos_range_t){from, to, rank};
    chaos->num_exposed++;
}

/* ---- holding back ---- */

static xccl_chaos_held_t *free_place(xccl_chaos_t *chaos) {
    for (int i = 0; i < XCCL_CHAOS_HELD; i++)
        if (!chaos->held[i].data)
            return &chaos->held[i];
    xccl_chaos_held_t *held = choose(chaos, XCCL_CHAOS_ALL);
    apply(chaos, held);
    return held;
}

/* Holds the piece back, or makes it visible. */
static void take_piece(xccl_chaos_t *chaos, xccl_chaos_held_t piece, const void *from, bool holds) {
    piece.data = holds && piece.bytes <= XCCL_CHAOS_PIECE ? malloc(piece.bytes) : NULL;
    if (!piece.data) {
        clear_way(chaos, &piece);
        memcpy(piece.to, from, piece.bytes);
        return;
    }
    memcpy(piece.data, from, piece.bytes);
    *free_place(chaos) = piece;
}

/* The end of the piece that begins at `at`: a quarter to all of the put, cut between lines of the target, so that an
 * aligned word is never torn. */
static uint64_t end_of_piece(const unsigned char *to, uint64_t at, uint64_t bytes, uint64_t bits) {
    uintptr_t end = (uintptr_t)to + at + bytes / 4 + bits % (bytes / 2 + 1);
    end = (end + XCCL_LINE - 1) / XCCL_LINE * XCCL_LINE;
    return end - (uintptr_t)to < bytes ? end - (uintptr_t)to : bytes;
}

bool xccl_chaos_holds_slow(xccl_world_t *world, int rank, void *to, const void *from, uint64_t bytes) {
    xccl_chaos_t *chaos = world->chaos;
    uint64_t bits = xccl_chaos_draw(chaos, XCCL_CHAOS_PUT);
    apply_one(chaos, bits);
    bool in_pieces = bits >> 8 & 1, at_once = (bits >> 9) % 4 == 0;
    bits >>= 16;
    /* a rank sees its own memory without a call */
    if (rank == world->rank || bytes == 0 || overlap(to, bytes, from, bytes) || is_exposed(chaos, to, bytes))
        at_once = true;
    xccl_chaos_held_t piece = {.to = to, .bytes = bytes, .rank = rank, .fences = chaos->fences};
    piece.number = ++chaos->puts;
    if (at_once) {
        clear_way(chaos, &piece);
        return false;
    }
    for (uint64_t at = 0, end; at < bytes; at = end, bits = bits >> 9 | bits << 55) {
        end = in_pieces ? end_of_piece(to, at, bytes, bits) : bytes;
        piece.to = (unsigned char *)to + at;
        piece.bytes = end - at;
        take_piece(chaos, piece, (const unsigned char *)from + at, !in_pieces || bits % 4 != 0);
    }
    return true;
}
