/* coll_check.c - what peers say of where their messages lie, checked before it is followed.
 *
 * Any rank may overwrite shared memory by mistake. So a header is read once, and no word of it becomes an address or a
 * length unless a member can have written it: then all that is read lies in the staging ring, or in the window. */
#include "coll.h"
#include "reduce.h"

static bool note_damage(xccl_coll_t *coll, int pe, const char *field, uint64_t got, uint64_t least, uint64_t most) {
    coll->differs = pe;
    coll->damage = (xccl_coll_damage_t){field, got, least, most};
    return false;
}

/* One of least, least + step, ..., most; notes it if not. */
static bool is_within(xccl_coll_t *coll, int pe, const char *field, uint64_t got, uint64_t least, uint64_t most,
                      uint64_t step) {
    return (got >= least && got <= most && (got - least) % step == 0) || note_damage(coll, pe, field, got, least, most);
}

/* A lot of the ring begins there. */
static bool is_lot(xccl_coll_t *coll, int pe, const char *field, uint64_t place, uint64_t lot_bytes) {
    return is_within(coll, pe, field, place, 0, xccl_coll_lap(coll, lot_bytes) - lot_bytes, lot_bytes);
}

static bool lots_are_sound(xccl_coll_t *coll, int pe, const xccl_coll_words_t *header) {
    uint64_t chunk = header->chunk, lot = header->lot_bytes;
    /* the rounds of a reduction are the own chunks: all members cut alike */
    uint64_t least = coll->reduces ? coll->chunk_bytes : XCCL_LINE;
    uint64_t most = coll->reduces ? coll->chunk_bytes : coll->block_bytes;
    return is_within(coll, pe, "chunk", chunk, least, most, XCCL_LINE) &&
           is_within(coll, pe, "lot_bytes", lot, chunk, coll->block_bytes, chunk);
}

static bool staging_is_sound(xccl_coll_t *coll, int pe, const xccl_coll_words_t *header) {
    return is_within(coll, pe, "place", header->place, 0, header->lot_bytes - header->chunk, header->chunk) &&
           is_lot(coll, pe, "offset", header->offset, header->lot_bytes);
}

/* [offset, offset+bytes) lies in the window, and its elements are aligned if they are used where they lie. */
static bool place_is_sound(xccl_coll_t *coll, int pe, const char *field, uint64_t offset, uint64_t bytes) {
    uint64_t stride = coll->world->stride;
    uint64_t step = coll->reduces ? xccl_reduce_itemsize(xccl_coll_dtype_of(coll->signature)) : 1;
    return is_within(coll, pe, "bytes", bytes, 0, stride, 1) &&
           is_within(coll, pe, field, offset, 0, stride - bytes, step);
}

static bool fetched_is_sound(xccl_coll_t *coll, int pe, const xccl_coll_words_t *header, int mode) {
    const bool staged = mode & XCCL_COLL_STAGED, all_reduce = coll->reduces && coll->shared;
    const bool result_staged = all_reduce && !(mode & XCCL_COLL_RESULT_IN_PLACE);
    if (mode & XCCL_COLL_CMA) /* the kernel checks an address in the sender's process */
        return (!staged && !coll->reduces) ||
               note_damage(coll, pe, "mode", (uint64_t)mode, XCCL_COLL_STAGED, XCCL_COLL_IN_PLACE);
    if ((staged || result_staged) && !lots_are_sound(coll, pe, header))
        return false;
    if (!(staged ? staging_is_sound(coll, pe, header)
                 : place_is_sound(coll, pe, "offset", header->offset, header->bytes)))
        return false;
    if (!all_reduce)
        return true;
    return result_staged ? is_lot(coll, pe, "result", header->result, header->lot_bytes)
                         : place_is_sound(coll, pe, "result", header->result, header->bytes);
}

bool xccl_coll_is_sound(xccl_coll_t *coll, int pe, const xccl_coll_words_t *header) {
    int mode = header->signature & XCCL_COLL_MODE_MASK;
    int way = mode & (XCCL_COLL_STAGED | XCCL_COLL_IN_PLACE);
    if (header->bytes <= coll->inline_bytes)
        return way == XCCL_COLL_INLINE ||
               note_damage(coll, pe, "mode of a short message", (uint64_t)way, XCCL_COLL_INLINE, XCCL_COLL_INLINE);
    if (way != XCCL_COLL_STAGED && way != XCCL_COLL_IN_PLACE)
        return note_damage(coll, pe, "mode of a long message", (uint64_t)way, XCCL_COLL_STAGED, XCCL_COLL_IN_PLACE);
    /* all sizes together are a number of bytes that memory can have; they are equal to the own ones unless any_size */
    return is_within(coll, pe, "bytes", header->bytes, 0, INT64_MAX / (uint64_t)coll->size, 1) &&
           fetched_is_sound(coll, pe, header, mode);
}

bool xccl_coll_is_ahead(xccl_coll_t *coll, int pe, int channel) {
    uint64_t taken = coll->peers[pe].taken[channel], most = taken + xccl_coll_most_units(coll);
    uint64_t published = xccl_coll_units_published(coll, pe, channel);
    return published > most && !note_damage(coll, pe, "count of chunks", published, 0, most);
}

int xccl_coll_fail_damaged(const xccl_coll_t *coll) {
    const xccl_coll_damage_t *damage = &coll->damage;
    return xccl_comm_fail_damaged(coll->comm, coll->differs, damage->field, damage->got, damage->least, damage->most);
}
