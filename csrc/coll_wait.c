/* coll_wait.c - everything that a collective waits for. */
#include "coll.h"

#include "status.h"

const xccl_coll_header_t *xccl_coll_header(const xccl_coll_t *coll, int pe) {
    uint64_t offset = xccl_coll_slot_offset(coll, pe, coll->peers[pe].received & 1);
    return xccl_gas_at(coll->world, coll->world->rank, offset);
}

uint64_t xccl_coll_counter_offset(const xccl_coll_t *coll, xccl_coll_counter_t counter, int channel, int peer) {
    uint64_t line = ((uint64_t)channel * XCCL_COLL_COUNTERS + counter) * coll->size + peer;
    return coll->counters + line * sizeof(xccl_signal_line_t);
}

static uint64_t counter(const xccl_coll_t *coll, xccl_coll_counter_t which, int channel, int pe) {
    const xccl_signal_line_t *line =
        xccl_gas_at(coll->world, coll->world->rank, xccl_coll_counter_offset(coll, which, channel, pe));
    /* acquire pairs with the release of the peer's signal: READY shows the chunk; TAKEN shows that its reads are over
     */
    return xccl_gas_load(&line->value);
}

/* A header that has come and has not been received; the acquire shows its whole slot. */
static bool has_come(const xccl_coll_t *coll, int pe) {
    const xccl_coll_peer_t *peer = &coll->peers[pe];
    return xccl_gas_load(&xccl_coll_header(coll, pe)->epoch) != peer->seen_epoch[peer->received & 1];
}

/* The header, which has come. */
static xccl_coll_words_t read_header(const xccl_coll_t *coll, int pe) {
    const xccl_coll_header_t *header = xccl_coll_header(coll, pe);
    xccl_coll_words_t words = {
        .epoch = atomic_load_explicit(&header->epoch, memory_order_relaxed),
        .signature = xccl_gas_read(&header->signature),
        .bytes = xccl_gas_read(&header->bytes),
    };
    if ((words.signature & (XCCL_COLL_STAGED | XCCL_COLL_IN_PLACE)) == 0)
        return words;
    words.offset = xccl_gas_read(&header->offset);
    words.place = xccl_gas_read(&header->place);
    words.chunk = xccl_gas_read(&header->chunk);
    words.lot_bytes = xccl_gas_read(&header->lot_bytes);
    words.result = xccl_gas_read(&header->result);
    return words;
}

static bool note_difference(xccl_coll_t *coll, int pe, const xccl_coll_words_t *header) {
    coll->differs = pe;
    coll->different = *header;
    return true;
}

/* Notes if `pe`, from which nothing more than progress is expected, gave the operation up, or cannot be believed. */
static bool gave_up(xccl_coll_t *coll, int pe) {
    for (int channel = 0; channel < XCCL_COLL_CHANNELS; channel++)
        if (xccl_coll_is_ahead(coll, pe, channel))
            return true;
    if (!has_come(coll, pe))
        return false;
    const xccl_coll_words_t header = read_header(coll, pe);
    return (header.signature & XCCL_COLL_MODE_MASK) == XCCL_COLL_REFUSED && note_difference(coll, pe, &header);
}

/* Waits; then turns a member that differs, or a damaged word, into an error on all of them. */
static int wait_for(xccl_coll_t *coll, const xccl_wait_t *wait) {
    int status = xccl_wait(coll->world, wait, coll->deadline);
    if (status < 0 || coll->differs < 0)
        return status;
    status = coll->damage.field != NULL ? xccl_coll_fail_damaged(coll) : xccl_coll_fail_mismatch(coll);
    xccl_coll_refuse(coll);
    return status;
}

/* ---- headers ---- */

typedef struct headers_t {
    xccl_coll_t *coll;
    const int *members;
    int count;
    int next; /* all before it have come, agree, and are accepted */
} headers_t;

/* A member that sends in this operation, though no message is expected from it: it has another root. */
static bool finds_second_root(xccl_coll_t *coll, int root) {
    for (int i = 0; i < coll->size - 1; i++) {
        int pe = coll->order[i];
        if (pe == root || !has_come(coll, pe) || xccl_gas_load(&xccl_coll_header(coll, pe)->epoch) != coll->epoch)
            continue;
        const xccl_coll_words_t header = read_header(coll, pe);
        return note_difference(coll, pe, &header);
    }
    return false;
}

static void accept(xccl_coll_t *coll, int pe, const xccl_coll_words_t *header) {
    xccl_coll_peer_t *peer = &coll->peers[pe];
    peer->in_mode = header->signature & XCCL_COLL_MODE_MASK;
    peer->in_bytes = header->bytes;
    peer->in_done = 0;
    peer->in_offset = header->offset;
    peer->in_place = header->place;
    peer->in_chunk = header->chunk;
    peer->in_lot_bytes = header->lot_bytes;
    peer->in_result = header->result;
    peer->seen_epoch[peer->received & 1] = coll->epoch;
    peer->received++;
    peer->heard = coll->epoch;
}

static bool headers_ready(void *arg) {
    headers_t *wait = arg;
    for (; wait->next < wait->count; wait->next++) {
        int pe = wait->members[wait->next];
        if (!has_come(wait->coll, pe))
            return wait->count < wait->coll->size - 1 && finds_second_root(wait->coll, pe);
        const xccl_coll_words_t header = read_header(wait->coll, pe);
        if (!xccl_coll_agrees(wait->coll, pe, &header))
            return note_difference(wait->coll, pe, &header);
        if (!xccl_coll_is_sound(wait->coll, pe, &header))
            return true;
        accept(wait->coll, pe, &header);
    }
    return true;
}

static bool headers_awaited(void *arg, int index, xccl_awaited_t *out) {
    const headers_t *wait = arg;
    const xccl_coll_t *coll = wait->coll;
    for (int i = wait->next; i < wait->count; i++) {
        int pe = wait->members[i];
        if (has_come(coll, pe) || index-- > 0)
            continue;
        uint64_t seen = coll->peers[pe].seen_epoch[coll->peers[pe].received & 1];
        *out = (xccl_awaited_t){coll->comm->ranks[pe], coll->epoch, seen, "message of the collective"};
        return true;
    }
    return false;
}

int xccl_coll_receive_headers(xccl_coll_t *coll, const int *members, int count) {
    headers_t wait = {coll, members, count, 0};
    return wait_for(coll, &(xccl_wait_t){headers_ready, headers_awaited, &wait});
}

/* ---- units: what the peers have published ---- */

uint64_t xccl_coll_units_published(const xccl_coll_t *coll, int pe, int channel) {
    return counter(coll, XCCL_COLL_READY, channel, pe);
}

bool xccl_coll_unit_ready(const xccl_coll_t *coll, int pe, int channel) {
    /* modulo 2^64: none is ready if the count is behind, and none can be if it is too far ahead */
    uint64_t ready = xccl_coll_units_published(coll, pe, channel) - coll->peers[pe].taken[channel];
    return ready - 1 < xccl_coll_most_units(coll);
}

typedef struct units_t {
    xccl_coll_t *coll;
    int channel;
    int next;
} units_t;

static bool unit_missing(const xccl_coll_t *coll, int pe, int channel) {
    bool once = channel == 0 && (coll->peers[pe].in_mode & XCCL_COLL_STAGED) == 0;
    return !once && !xccl_coll_unit_ready(coll, pe, channel);
}

static bool units_ready(void *arg) {
    units_t *wait = arg;
    for (; wait->next < wait->coll->size - 1; wait->next++) {
        int pe = wait->coll->order[wait->next];
        if (unit_missing(wait->coll, pe, wait->channel))
            return gave_up(wait->coll, pe);
    }
    return true;
}

static bool units_awaited(void *arg, int index, xccl_awaited_t *out) {
    const units_t *wait = arg;
    const xccl_coll_t *coll = wait->coll;
    for (int i = wait->next; i < coll->size - 1; i++) {
        int pe = coll->order[i];
        if (!unit_missing(coll, pe, wait->channel) || index-- > 0)
            continue;
        uint64_t taken = coll->peers[pe].taken[wait->channel];
        *out = (xccl_awaited_t){coll->comm->ranks[pe], taken + 1, taken,
                                wait->channel == 0 ? "chunk of the message" : "part of the result"};
        return true;
    }
    return false;
}

int xccl_coll_await_units(xccl_coll_t *coll, int channel) {
    units_t wait = {coll, channel, 0};
    return wait_for(coll, &(xccl_wait_t){units_ready, units_awaited, &wait});
}

/* ---- taken: what the peers have read ---- */

uint64_t xccl_coll_units_taken(const xccl_coll_t *coll, int pe, int channel) {
    return counter(coll, XCCL_COLL_TAKEN, channel, pe);
}

/* Waits until each member has taken as much as is needed. */
typedef struct taken_t {
    xccl_coll_t *coll;
    int only;       /* the one member that matters, -1: all units of all members */
    uint64_t units; /* one more than these */
} taken_t;

static uint64_t units_needed(const taken_t *wait, int pe, int channel) {
    if (wait->only < 0)
        return wait->coll->peers[pe].units[channel];
    return pe == wait->only && channel == 0 ? wait->units + 1 : 0;
}

static bool all_taken(const taken_t *wait, int pe) {
    for (int channel = 0; channel < XCCL_COLL_CHANNELS; channel++)
        if (xccl_coll_units_taken(wait->coll, pe, channel) < units_needed(wait, pe, channel))
            return false;
    return true;
}

static bool taken_ready(void *arg) {
    taken_t *wait = arg;
    for (int i = 0; i < wait->coll->size - 1; i++)
        if (!all_taken(wait, wait->coll->order[i]))
            return gave_up(wait->coll, wait->coll->order[i]);
    return true;
}

static bool taken_awaited(void *arg, int index, xccl_awaited_t *out) {
    const taken_t *wait = arg;
    const xccl_coll_t *coll = wait->coll;
    for (int i = 0; i < coll->size - 1; i++) {
        int pe = coll->order[i];
        for (int channel = 0; channel < XCCL_COLL_CHANNELS; channel++) {
            uint64_t needed = units_needed(wait, pe, channel);
            uint64_t seen = xccl_coll_units_taken(coll, pe, channel);
            if (seen >= needed || index-- > 0)
                continue;
            *out = (xccl_awaited_t){coll->comm->ranks[pe], needed, seen, "acknowledged chunks"};
            return true;
        }
    }
    return false;
}

static int await_taken(taken_t wait) {
    return wait_for(wait.coll, &(xccl_wait_t){taken_ready, taken_awaited, &wait});
}

int xccl_coll_await_taken(xccl_coll_t *coll) {
    return await_taken((taken_t){coll, -1, 0});
}

int xccl_coll_await_slot(xccl_coll_t *coll, int pe, uint64_t units) {
    return await_taken((taken_t){coll, pe, units});
}

/* ---- lots: room in the staging ring ---- */

/* Members that have the oldest lot still to take: the ones that a lot waits for. */
static bool lot_ready(void *arg) {
    xccl_coll_t *coll = arg;
    if (xccl_coll_lot_free(coll))
        return true;
    for (int i = 0; i < coll->size - 1; i++)
        if (!xccl_coll_lot_taken(coll, coll->oldest, coll->order[i]) && gave_up(coll, coll->order[i]))
            return true;
    return false;
}

static bool lot_awaited(void *arg, int index, xccl_awaited_t *out) {
    const xccl_coll_t *coll = arg;
    for (int i = 0; i < coll->size - 1; i++) {
        int pe = coll->order[i];
        if (xccl_coll_lot_taken(coll, coll->oldest, pe) || index-- > 0)
            continue;
        *out = (xccl_awaited_t){coll->comm->ranks[pe], coll->peers[pe].units[0], xccl_coll_units_taken(coll, pe, 0),
                                "acknowledged chunks"};
        return true;
    }
    return false;
}

int xccl_coll_await_lot(xccl_coll_t *coll) {
    return wait_for(coll, &(xccl_wait_t){lot_ready, lot_awaited, coll});
}

/* ---- movable: something to copy, in or out ---- */

typedef struct movable_t {
    xccl_coll_t *coll;
    bool chunks_left;
} movable_t;

bool xccl_coll_can_take(const xccl_coll_t *coll, int pe) {
    const xccl_coll_peer_t *peer = &coll->peers[pe];
    if (peer->in_done == peer->in_bytes)
        return false;
    return peer->in_done == 0 || xccl_coll_unit_ready(coll, pe, 0);
}

static bool movable_ready(void *arg) {
    const movable_t *wait = arg;
    if (wait->chunks_left && xccl_coll_lot_free(wait->coll))
        return true;
    for (int i = 0; i < wait->coll->size - 1; i++)
        if (xccl_coll_can_take(wait->coll, wait->coll->order[i]))
            return true;
    for (int i = 0; i < wait->coll->size - 1; i++)
        if (gave_up(wait->coll, wait->coll->order[i]))
            return true;
    return false;
}

static bool movable_awaited(void *arg, int index, xccl_awaited_t *out) {
    const movable_t *wait = arg;
    xccl_coll_t *coll = wait->coll;
    for (int i = 0; i < coll->size - 1; i++) {
        int pe = coll->order[i];
        const xccl_coll_peer_t *peer = &coll->peers[pe];
        if (peer->in_done == peer->in_bytes || index-- > 0)
            continue;
        *out = (xccl_awaited_t){coll->comm->ranks[pe], peer->in_bytes, peer->in_done, "bytes of the message"};
        return true;
    }
    return wait->chunks_left && lot_awaited(coll, index, out);
}

int xccl_coll_await_movable(xccl_coll_t *coll, bool chunks_left) {
    movable_t wait = {coll, chunks_left};
    return wait_for(coll, &(xccl_wait_t){movable_ready, movable_awaited, &wait});
}
