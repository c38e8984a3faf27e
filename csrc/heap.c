#define _GNU_SOURCE
#include "heap.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "comm.h"
#include "gas.h"
#include "racecheck.h"
#include "status.h"

static const char *const AREAS[XCCL_AREAS] = {"metadata", "managed data", "app data"};

static uint64_t page_round(uint64_t bytes) {
    return (bytes + XCCL_PAGE - 1) / XCCL_PAGE * XCCL_PAGE;
}

/* ---- the tables ---- */

static xccl_heap_table_t *table_of(const xccl_world_t *world, int rank, xccl_area_t area) {
    return xccl_gas_at(world, rank, (uint64_t)area * page_round(sizeof(xccl_heap_table_t)));
}

/* Tables are shared memory: a damaged count must not lead out of the table. Read once by whoever uses it. */
static uint64_t count_of(const xccl_heap_table_t *table) {
    uint64_t count = xccl_gas_read(&table->count);
    return count < XCCL_HEAP_MAX_BLOCKS ? count : XCCL_HEAP_MAX_BLOCKS;
}

/* Index of the first of `count` blocks that ends after `offset`; `count` if there is none. */
static uint64_t first_after(const xccl_heap_table_t *table, uint64_t count, uint64_t offset) {
    uint64_t low = 0, high = count;
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        if (table->blocks[middle].offset + table->blocks[middle].bytes <= offset)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static int area_of(const xccl_world_t *world, uint64_t offset) {
    for (int area = XCCL_AREAS - 1; area >= 0; area--)
        if (offset >= world->header->area_offset[area])
            return area;
    return -1;
}

const xccl_block_t *xccl_heap_find(const xccl_world_t *world, int rank, uint64_t offset, uint64_t bytes) {
    int area = area_of(world, offset);
    if (area < 0)
        return NULL;
    const xccl_heap_table_t *table = table_of(world, rank, (xccl_area_t)area);
    uint64_t count = count_of(table), i = first_after(table, count, offset);
    if (i == count || table->blocks[i].offset > offset)
        return NULL;
    /* subtractions only: a sum could overflow for a hostile `bytes`. The block may be damaged: nothing leaves the area.
     */
    uint64_t end = world->header->area_offset[area] + world->header->area_bytes[area];
    bool inside =
        offset < end && bytes <= end - offset && bytes <= table->blocks[i].bytes - (offset - table->blocks[i].offset);
    return inside ? &table->blocks[i] : NULL;
}

/* Lowest page-aligned range of `bytes` that is free on every member; 0 if there is none. */
static uint64_t find_room(const xccl_comm_t *comm, xccl_area_t area, uint64_t bytes) {
    const xccl_header_t *header = comm->world->header;
    uint64_t start = header->area_offset[area], end = start + header->area_bytes[area];
    uint64_t candidate = start;
    for (int pe = 0; pe < comm->size;) {
        if (bytes > end - candidate)
            return 0;
        const xccl_heap_table_t *table = table_of(comm->world, comm->ranks[pe], area);
        uint64_t count = count_of(table), i = first_after(table, count, candidate);
        if (i < count && table->blocks[i].offset < candidate + bytes) {
            /* taken on this member: go behind its block and ask all members anew; a damaged one ends the search */
            uint64_t behind = page_round(table->blocks[i].offset + table->blocks[i].bytes);
            if (behind <= candidate || behind > end)
                return 0;
            candidate = behind;
            pe = 0;
            continue;
        }
        pe++;
    }
    return candidate;
}

static int insert_block(const xccl_comm_t *comm, xccl_area_t area, xccl_block_t block) {
    xccl_heap_table_t *table = table_of(comm->world, comm->world->rank, area);
    uint64_t count = count_of(table);
    if (count == XCCL_HEAP_MAX_BLOCKS)
        return xccl_fail(XCCL_ERR_MEMORY,
                         "rank %d has %d live allocations in the %s area, the most that are possible: free some",
                         comm->world->rank, XCCL_HEAP_MAX_BLOCKS, AREAS[area]);
    int status = xccl_heap_commit(comm->world, (uint64_t)((unsigned char *)table - comm->world->own),
                                  offsetof(xccl_heap_table_t, blocks) + (count + 1) * sizeof(xccl_block_t));
    if (status != XCCL_OK)
        return status;
    uint64_t i = first_after(table, count, block.offset);
    memmove(&table->blocks[i + 1], &table->blocks[i], (count - i) * sizeof(xccl_block_t));
    table->blocks[i] = block;
    table->count = count + 1;
    return XCCL_OK;
}

static void remove_block(const xccl_comm_t *comm, xccl_area_t area, uint64_t offset) {
    xccl_heap_table_t *table = table_of(comm->world, comm->world->rank, area);
    uint64_t count = count_of(table), i = first_after(table, count, offset);
    if (i == count || table->blocks[i].offset != offset)
        return;
    memmove(&table->blocks[i], &table->blocks[i + 1], (count - i - 1) * sizeof(xccl_block_t));
    table->count = count - 1;
}

/* ---- pages ---- */

static uint64_t file_offset(const xccl_world_t *world, int rank, uint64_t offset) {
    return (uint64_t)((unsigned char *)xccl_gas_at(world, rank, offset) - world->base);
}

/* Bytes that the file system of the object still has; UINT64_MAX if it has no limit. */
static uint64_t available_bytes(const xccl_world_t *world) {
    struct statvfs disk;
    if (fstatvfs(world->fd, &disk) != 0 || disk.f_blocks == 0)
        return UINT64_MAX;
    return (uint64_t)disk.f_bavail * disk.f_frsize;
}

static int fail_full(const xccl_world_t *world, const char *what, uint64_t needed, uint64_t available) {
    return xccl_fail(XCCL_ERR_MEMORY,
                     "rank %d: %s needs %llu bytes of shared memory, %llu are free: allocate less, or enlarge /dev/shm "
                     "(containers: --shm-size; machines: mount -o remount,size=...), or the tmpfs of XCCL_SHM_DIR",
                     world->rank, what, (unsigned long long)needed, (unsigned long long)available);
}

int xccl_heap_commit_at(xccl_world_t *world, int rank, uint64_t offset, uint64_t bytes) {
    if (bytes == 0)
        return XCCL_OK;
    uint64_t first = offset / XCCL_PAGE * XCCL_PAGE;
    uint64_t length = page_round(offset + bytes) - first;
    int error = xccl_shm_reserve(world->fd, file_offset(world, rank, first), length);
    if (error == 0)
        return XCCL_OK;
    if (error != ENOSPC && error != EFBIG && error != ENOMEM && error != EDQUOT)
        return xccl_fail_errno(error, "cannot reserve %llu bytes of shared memory", (unsigned long long)length);
    int op = atomic_load_explicit(&world->ranks[world->rank].operation, memory_order_relaxed);
    return fail_full(world, xccl_op_name(op), length, available_bytes(world));
}

int xccl_heap_commit(xccl_world_t *world, uint64_t offset, uint64_t bytes) {
    return xccl_heap_commit_at(world, world->rank, offset, bytes);
}

/* Gives pages back; they read as zero when they are reserved again. */
static void release_pages(xccl_world_t *world, uint64_t offset, uint64_t bytes) {
    xccl_race_forget(world, offset, bytes);
    /* a file system without holes keeps the pages, so fresh blocks would not be zero: clear them by hand */
    if (fallocate(world->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)file_offset(world, world->rank, offset),
                  (off_t)page_round(bytes)) != 0)
        memset(world->own + offset, 0, bytes);
}

uint64_t xccl_heap_used(const xccl_world_t *world, xccl_area_t area) {
    const xccl_heap_table_t *table = table_of(world, world->rank, area);
    uint64_t bytes = 0;
    for (uint64_t i = 0, count = count_of(table); i < count; i++)
        bytes += table->blocks[i].bytes;
    return bytes;
}

/* ---- collective allocation ---- */

typedef struct proposal_t {
    uint64_t kind; /* xccl_op_t: members must not mix allocations and frees */
    uint64_t area;
    uint64_t bytes_or_offset;
    uint64_t flags;
    uint64_t tag;
    int64_t status; /* what the member's local step came to */
} proposal_t;
_Static_assert(sizeof(proposal_t) <= XCCL_AGREE_BYTES, "a proposal fits an agreement slot");

/* Exchanges proposals and fails, alike on all members, if one differs from the first member's. */
static int agree_on(xccl_comm_t *comm, const proposal_t *mine, int64_t deadline) {
    unsigned char record[XCCL_AGREE_BYTES] = {0};
    memcpy(record, mine, sizeof *mine);
    unsigned char all[(size_t)comm->size * XCCL_AGREE_BYTES];
    int status = xccl_comm_agree(comm, record, all, deadline);
    if (status != XCCL_OK)
        return status;
    proposal_t first, other;
    memcpy(&first, all, sizeof first);
    for (int pe = 1; pe < comm->size; pe++) {
        memcpy(&other, all + (size_t)pe * XCCL_AGREE_BYTES, sizeof other);
        if (other.kind != first.kind)
            return xccl_fail(
                XCCL_ERR_USAGE,
                "rank %d calls %s while rank 0 calls %s: collective calls must come in the same order on all ranks", pe,
                xccl_op_name((int)other.kind), xccl_op_name((int)first.kind));
        if (other.bytes_or_offset != first.bytes_or_offset || other.area != first.area || other.flags != first.flags)
            return xccl_fail(
                XCCL_ERR_USAGE,
                "%s: rank %d asks for %llu (%s), rank 0 for %llu: symmetric memory needs the same on all ranks",
                xccl_op_name((int)first.kind), pe, (unsigned long long)other.bytes_or_offset,
                first.kind == XCCL_OP_ALLOC ? "bytes" : "offset", (unsigned long long)first.bytes_or_offset);
        if (other.tag != first.tag)
            return xccl_fail(XCCL_ERR_USAGE,
                             "%s: rank %d asks for another shape or dtype of the same %llu bytes than rank 0",
                             xccl_op_name((int)first.kind), pe, (unsigned long long)first.bytes_or_offset);
    }
    return XCCL_OK;
}

/* Tells all members how the local step went. Fails alike on all if it failed anywhere. */
static int agree_on_outcome(xccl_comm_t *comm, int local, int64_t deadline) {
    unsigned char record[XCCL_AGREE_BYTES] = {0};
    unsigned char all[(size_t)comm->size * XCCL_AGREE_BYTES];
    memcpy(record, &local, sizeof local);
    int status = xccl_comm_agree(comm, record, all, deadline);
    if (status != XCCL_OK)
        return status;
    if (local != XCCL_OK)
        return local; /* the message of the local failure stands */
    for (int pe = 0; pe < comm->size; pe++) {
        int theirs;
        memcpy(&theirs, all + (size_t)pe * XCCL_AGREE_BYTES, sizeof theirs);
        if (theirs != XCCL_OK)
            return xccl_fail(theirs, "the allocation failed on rank %d, which has the details (%s)", pe,
                             theirs == XCCL_ERR_MEMORY ? "out of shared memory" : "system error");
    }
    return XCCL_OK;
}

/* `available` is what was free before any member took its part. */
static int place_block(xccl_comm_t *comm, xccl_area_t area, uint64_t bytes, int flags, uint64_t offset,
                       uint64_t available) {
    uint64_t together = page_round(bytes) * (uint64_t)comm->size;
    if (!(flags & XCCL_HEAP_ADDRESS_ONLY) && together > available) {
        char what[96];
        snprintf(what, sizeof what, "allocation of %llu bytes on each of %d ranks", (unsigned long long)bytes,
                 comm->size);
        return fail_full(comm->world, what, together, available);
    }
    int status = insert_block(comm, area, (xccl_block_t){offset, bytes, (uint64_t)comm->context});
    if (status == XCCL_OK && !(flags & XCCL_HEAP_ADDRESS_ONLY)) {
        status = xccl_heap_commit(comm->world, offset, bytes);
        if (status == XCCL_OK)
            status = xccl_race_reserve(comm->world, offset, bytes);
        if (status != XCCL_OK) {
            remove_block(comm, area, offset);
            release_pages(comm->world, offset, bytes);
        }
    }
    return status;
}

static int allocate(xccl_comm_t *comm, xccl_area_t area, uint64_t bytes, int flags, uint64_t tag, int64_t deadline,
                    uint64_t *out_offset) {
    proposal_t mine = {
        .kind = XCCL_OP_ALLOC, .area = area, .bytes_or_offset = bytes, .flags = (uint64_t)flags, .tag = tag};
    int status = agree_on(comm, &mine, deadline);
    if (status != XCCL_OK)
        return status;
    /* Between the two syncs no member changes its tables, so all compute the same offset. */
    uint64_t offset = find_room(comm, area, bytes);
    uint64_t available = available_bytes(comm->world);
    status = xccl_comm_sync(comm, deadline);
    if (status != XCCL_OK)
        return status;
    if (offset == 0)
        return xccl_fail(
            XCCL_ERR_MEMORY,
            "no %llu bytes of address space are free in the %s area of %llu bytes: set XCCL_HEAP_SIZE higher",
            (unsigned long long)bytes, AREAS[area], (unsigned long long)comm->world->header->area_bytes[area]);
    int local = place_block(comm, area, bytes, flags, offset, available);
    status = agree_on_outcome(comm, local, deadline);
    if (status != XCCL_OK) {
        if (local == XCCL_OK) {
            remove_block(comm, area, offset);
            release_pages(comm->world, offset, bytes);
        }
        return status;
    }
    *out_offset = offset;
    return XCCL_OK;
}

int xccl_heap_alloc(xccl_comm_t *comm, xccl_area_t area, uint64_t bytes, int flags, uint64_t tag, int64_t timeout_ns,
                    uint64_t *out_offset) {
    int status = xccl_comm_check(comm);
    if (status != XCCL_OK)
        return status;
    status = xccl_op_begin(comm->world, XCCL_OP_ALLOC);
    if (status != XCCL_OK)
        return status;
    /* an empty array still gets an address of its own */
    return xccl_comm_settle(
        comm, allocate(comm, area, bytes ? bytes : 1, flags, tag, xccl_deadline(comm->world, timeout_ns), out_offset));
}

int xccl_heap_free(xccl_comm_t *comm, xccl_area_t area, uint64_t offset, int64_t timeout_ns) {
    int status = xccl_comm_check(comm);
    if (status != XCCL_OK)
        return status;
    xccl_world_t *world = comm->world;
    const xccl_block_t *block = xccl_heap_find(world, world->rank, offset, 1);
    if (!block || block->offset != offset || block->context != (uint64_t)comm->context)
        return xccl_fail(XCCL_ERR_USAGE,
                         "rank %d: free of memory that this communicator did not allocate, or that is freed already",
                         world->rank);
    status = xccl_op_begin(world, XCCL_OP_FREE);
    if (status != XCCL_OK)
        return status;
    uint64_t end = world->header->area_offset[area] + world->header->area_bytes[area];
    uint64_t bytes = xccl_gas_read(&block->bytes);
    bytes = bytes <= end - offset ? bytes : end - offset;
    proposal_t mine = {.kind = XCCL_OP_FREE, .area = area, .bytes_or_offset = offset};
    /* The agreement is a barrier: when it returns, all members have finished what they did with the block (bug class
     * 11). */
    status = agree_on(comm, &mine, xccl_deadline(world, timeout_ns));
    if (status != XCCL_OK)
        return xccl_comm_settle(comm, status);
    remove_block(comm, area, offset);
    release_pages(world, offset, bytes);
    return XCCL_OK;
}
