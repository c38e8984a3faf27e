#define _GNU_SOURCE
#include "shm.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "chaos.h"
#include "cma.h"
#include "comm.h"
#include "copy.h"
#include "faults.h"
#include "heap.h"
#include "process.h"
#include "racecheck.h"
#include "status.h"

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

static const uint64_t MAGIC = 0x6c63637830303031; /* changes with nothing: the ABI number does */
static const uint32_t ABI = 4;
static const uint64_t HUGE_PAGE = 2ull << 20;
static const uint64_t META_BYTES = 4ull << 30;

static uint64_t round_up(uint64_t value, uint64_t unit) {
    return (value + unit - 1) / unit * unit;
}

/* ---- forks: a child shares the parent's rank and must not use it ---- */

static _Atomic unsigned fork_generation;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

static void note_fork(void) {
    atomic_fetch_add_explicit(&fork_generation, 1, memory_order_relaxed);
}

static void watch_forks(void) {
    pthread_atfork(NULL, NULL, note_fork);
}

/* ---- creation ---- */

static uint64_t second_level_cache(void) {
    long cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return cache < (256 << 10) || cache > (8 << 20) ? 1 << 20 : (uint64_t)cache;
}

/* A block is written by its owner and read by peers soon after: it fits the owner's second-level cache, so that neither
 * way goes through memory. All blocks together do not: see coll_stage.c. */
static uint64_t staging_block_bytes(void) {
    return second_level_cache() / 2;
}

/* The rings of send/receive: twice the second-level cache (see ring.h), but together not more than 128 MiB unless that
 * leaves less than half a cache for each. */
static uint64_t ring_slots(const xccl_config_t *config) {
    enum { ALL = 128 << 20 };
    uint64_t cache = second_level_cache(), rings = (uint64_t)config->size * (uint64_t)config->size;
    uint64_t slots = 4;
    while (slots * config->p2p_slot_bytes < 2 * cache &&
           (2 * slots * config->p2p_slot_bytes <= cache / 2 || 2 * slots * config->p2p_slot_bytes * rings <= ALL))
        slots *= 2;
    return slots;
}

static xccl_config_t with_defaults(const xccl_config_t *config) {
    xccl_config_t c = *config;
    if (!c.heap_bytes)
        c.heap_bytes = 64ull << 30;
    if (!c.p2p_slot_bytes)
        c.p2p_slot_bytes = 64 << 10;
    if (!c.p2p_slots)
        c.p2p_slots = ring_slots(&c);
    if (!c.coll_block_bytes)
        c.coll_block_bytes = staging_block_bytes();
    if (!c.cores)
        c.cores = (int32_t)sysconf(_SC_NPROCESSORS_ONLN);
    if (!c.timeout_ns)
        c.timeout_ns = 300ll * 1000000000;
    if (!c.init_timeout_ns)
        c.init_timeout_ns = 600ll * 1000000000;
    c.heap_bytes = round_up(c.heap_bytes, HUGE_PAGE);
    return c;
}

static uint64_t control_bytes(int size) {
    return round_up(XCCL_PAGE + XCCL_ABORT_TEXT_BYTES + (uint64_t)size * sizeof(xccl_rank_entry_t), XCCL_PAGE);
}

static uint64_t boot_bytes(void) {
    return round_up(XCCL_AREAS * round_up(sizeof(xccl_heap_table_t), XCCL_PAGE) +
                        (uint64_t)XCCL_MAX_CONTEXTS * XCCL_PAGE,
                    HUGE_PAGE);
}

static void lay_out(xccl_header_t *header) {
    const uint64_t bytes[XCCL_AREAS] = {META_BYTES, header->config.heap_bytes, header->config.heap_bytes};
    uint64_t offset = boot_bytes();
    for (int area = 0; area < XCCL_AREAS; area++) {
        header->area_offset[area] = offset;
        header->area_bytes[area] = bytes[area];
        offset += bytes[area];
    }
    header->race_offset = offset;
    header->stride = round_up(offset + xccl_race_window_bytes(&header->config), HUGE_PAGE);
    header->control_bytes = round_up(control_bytes(header->config.size), HUGE_PAGE);
}

uint64_t xccl_shm_object_bytes(const xccl_config_t *config) {
    xccl_header_t header = {.config = with_defaults(config)};
    lay_out(&header);
    return header.control_bytes + (uint64_t)header.config.size * header.stride;
}

int xccl_shm_reserve(int fd, uint64_t offset, uint64_t bytes) {
    int status;
    do
        status = fallocate(fd, 0, (off_t)offset, (off_t)bytes);
    while (status != 0 && errno == EINTR);
    return status == 0 ? 0 : errno;
}

/* Says what is wrong with a configuration whose defaults are filled in; NULL: nothing. */
static const char *fault_of(const xccl_config_t *config) {
    const uint64_t most = 1ull << 40;
    if (config->size < 1 || config->size > XCCL_MAX_RANKS)
        return "size";
    if (config->p2p_slots & (config->p2p_slots - 1) || config->p2p_slots == 0 || config->p2p_slots > most / XCCL_PAGE)
        return "p2p_slots";
    if (config->p2p_slot_bytes == 0 || config->p2p_slot_bytes > most)
        return "p2p_slot_bytes";
    if (config->coll_block_bytes == 0 || config->coll_block_bytes > most)
        return "coll_block_bytes";
    if (config->heap_bytes > UINT64_MAX / 16 / XCCL_MAX_RANKS)
        return "heap_bytes";
    if (config->cores < 1)
        return "cores";
    if (config->timeout_ns < 0 || config->init_timeout_ns < 0)
        return "timeout";
    return NULL;
}

int xccl_shm_format(int fd, const xccl_config_t *config) {
    if (config->size < 1 || config->size > XCCL_MAX_RANKS)
        return xccl_fail(XCCL_ERR_USAGE, "a world has 1 to %d ranks, got %d", XCCL_MAX_RANKS, config->size);
    if (config->p2p_slots & (config->p2p_slots - 1))
        return xccl_fail(XCCL_ERR_USAGE, "p2p_slots must be a power of two, got %llu",
                         (unsigned long long)config->p2p_slots);
    const xccl_config_t complete = with_defaults(config);
    const char *fault = fault_of(&complete);
    if (fault)
        return xccl_fail(XCCL_ERR_USAGE, "the %s of the world is out of range", fault);
    xccl_header_t header = {
        .magic = MAGIC,
        .abi = ABI,
        .uid = geteuid(),
        .config = complete,
        .created_ns = xccl_now_ns(),
        .creator_pid = (int32_t)getpid(),
    };
    lay_out(&header);
    uint64_t total = xccl_shm_object_bytes(config);
    if (ftruncate(fd, (off_t)total) != 0)
        return xccl_fail_errno(errno,
                               "cannot size the shared object to %llu bytes of address space (lower XCCL_HEAP_SIZE?)",
                               (unsigned long long)total);
    int error = xccl_shm_reserve(fd, 0, control_bytes(header.config.size));
    if (error == ENOSPC)
        return xccl_fail(XCCL_ERR_MEMORY,
                         "the control page needs %llu bytes of shared memory, fewer are free: enlarge /dev/shm "
                         "(containers: --shm-size), or the tmpfs of XCCL_SHM_DIR",
                         (unsigned long long)control_bytes(header.config.size));
    if (error)
        return xccl_fail_errno(error, "cannot reserve the control page; is the shared memory on a tmpfs?");
    if (pwrite(fd, &header, sizeof header, 0) != (ssize_t)sizeof header)
        return xccl_fail_errno(errno, "cannot write the control page");
    return XCCL_OK;
}

/* ---- the creator ---- */

int xccl_shm_hold(int fd) {
    if (!xccl_process_hold(fd, XCCL_CREATOR_BYTE))
        return xccl_fail_errno(errno, "cannot lock the shared object");
    const int32_t held = 1;
    if (pwrite(fd, &held, sizeof held, offsetof(xccl_header_t, held)) != (ssize_t)sizeof held)
        return xccl_fail_errno(errno, "cannot write the control page");
    return XCCL_OK;
}

int xccl_shm_is_held(int fd) {
    uint64_t magic = 0;
    if (pread(fd, &magic, sizeof magic, 0) != (ssize_t)sizeof magic || magic != MAGIC)
        return xccl_fail(XCCL_ERR_USAGE, "descriptor %d is not an xccl object", fd);
    return xccl_process_is_held(fd, XCCL_CREATOR_BYTE);
}

static void *end_after_creator(void *arg) {
    int fd = (int)(intptr_t)arg;
    if (xccl_process_await_release(fd, XCCL_CREATOR_BYTE))
        kill(getpid(), SIGKILL); /* as the parent-death signal does: the rank may be anywhere */
    return NULL;
}

int xccl_shm_die_with_creator(xccl_world_t *world) {
    if (!world->header->held)
        return XCCL_OK;
    /* an open file description of its own, kept to the end: the lock that the thread gets must be nobody else's */
    int fd = xccl_process_reopen(world->fd);
    if (fd < 0)
        return xccl_fail_errno(errno, "cannot open the shared object anew");
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all); /* signals are for the program's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&thread, NULL, end_after_creator, (void *)(intptr_t)fd);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        close(fd);
        return xccl_fail_errno(error, "cannot start the thread that watches the launcher");
    }
    pthread_detach(thread);
    return XCCL_OK;
}

/* ---- attaching ---- */

/* The header's numbers are those that its configuration leads to, so that no offset leaves the object. */
static bool is_laid_out(const xccl_header_t *header) {
    xccl_header_t right = {.config = header->config};
    if (fault_of(&header->config))
        return false;
    lay_out(&right);
    return header->control_bytes == right.control_bytes && header->stride == right.stride &&
           header->race_offset == right.race_offset &&
           memcmp(header->area_offset, right.area_offset, sizeof right.area_offset) == 0 &&
           memcmp(header->area_bytes, right.area_bytes, sizeof right.area_bytes) == 0;
}

static int read_header(int fd, const char *session, xccl_header_t *header) {
    struct stat stat;
    if (fstat(fd, &stat) != 0 || pread(fd, header, sizeof *header, 0) != (ssize_t)sizeof *header)
        return xccl_fail_errno(errno, "descriptor %d is not a readable xccl object", fd);
    if (header->magic != MAGIC)
        return xccl_fail(XCCL_ERR_USAGE, "descriptor %d is not an xccl object (magic %#llx, expected %#llx)", fd,
                         (unsigned long long)header->magic, (unsigned long long)MAGIC);
    if (header->abi != ABI)
        return xccl_fail(XCCL_ERR_USAGE,
                         "the world was made by another xccl (ABI %u, this one is %u): use one version for all ranks",
                         header->abi, ABI);
    if (header->uid != geteuid())
        return xccl_fail(XCCL_ERR_USAGE, "the world belongs to uid %u, this process has uid %u", header->uid,
                         geteuid());
    if (session && strncmp(session, header->config.session, XCCL_SESSION_BYTES) != 0)
        return xccl_fail(XCCL_ERR_USAGE, "the object is of session %.32s, expected %.32s", header->config.session,
                         session);
    if (!is_laid_out(header))
        return xccl_fail(XCCL_ERR_USAGE, "the control page of session %.32s is damaged", header->config.session);
    uint64_t expected = header->control_bytes + (uint64_t)header->config.size * header->stride;
    if ((uint64_t)stat.st_size != expected)
        return xccl_fail(XCCL_ERR_USAGE, "the object has %llu bytes, its header says %llu",
                         (unsigned long long)stat.st_size, (unsigned long long)expected);
    return XCCL_OK;
}

static bool is_read_only(int fd) {
    return (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY;
}

static unsigned char *map_at(void *hint, int flags, uint64_t bytes, int fd) {
    int access = is_read_only(fd) ? PROT_READ : PROT_READ | PROT_WRITE;
    void *p = mmap(hint, bytes, access, MAP_SHARED | MAP_NORESERVE | flags, fd, 0);
    return p == MAP_FAILED ? NULL : p;
}

/* Moves the mapping to where the first rank has it, if that address is free here. */
static void move_to_hint(xccl_mapping_t *mapping, const xccl_world_t *world) {
    uint64_t first = 0;
    _Atomic uint64_t *hint = &((xccl_header_t *)mapping->base)->base_hint;
    /* relaxed: only the number matters, nothing is read through it */
    if (atomic_compare_exchange_strong_explicit(hint, &first, (uint64_t)(uintptr_t)mapping->base, memory_order_relaxed,
                                                memory_order_relaxed) ||
        first == (uint64_t)(uintptr_t)mapping->base)
        return;
    unsigned char *same = map_at((void *)(uintptr_t)first, MAP_FIXED_NOREPLACE, mapping->bytes, world->fd);
    if (same == (void *)(uintptr_t)first) {
        munmap(mapping->base, mapping->bytes);
        mapping->base = same;
    } else if (same) { /* a kernel that took the address for a mere hint */
        munmap(same, mapping->bytes);
    }
}

static int map_object(xccl_world_t *world, uint64_t bytes) {
    xccl_mapping_t *mapping = calloc(1, sizeof *mapping);
    if (!mapping)
        return xccl_fail(XCCL_ERR_MEMORY, "out of memory");
    mapping->base = map_at(NULL, 0, bytes, world->fd);
    if (!mapping->base) {
        free(mapping);
        return xccl_fail_errno(errno, "cannot map %llu bytes of address space (ulimit -v? lower XCCL_HEAP_SIZE)",
                               (unsigned long long)bytes);
    }
    mapping->bytes = bytes;
    mapping->users = 1;
    if (world->rank >= 0) /* an observer's mapping is no guide for ranks */
        move_to_hint(mapping, world);
    world->mapping = mapping;
    return XCCL_OK;
}

static void leave_mapping(xccl_mapping_t *mapping) {
    /* acquire and release: what other ranks of this process did with the mapping comes before its end */
    if (atomic_fetch_sub_explicit(&mapping->users, 1, memory_order_acq_rel) > 1)
        return;
    munmap(mapping->base, mapping->bytes);
    free(mapping);
}

static void bind_views(xccl_world_t *world) {
    world->base = world->mapping->base;
    world->control = (xccl_header_t *)world->base;
    world->abort_text = (char *)world->base + XCCL_PAGE;
    world->ranks = (xccl_rank_entry_t *)(world->base + XCCL_PAGE + XCCL_ABORT_TEXT_BYTES);
    world->size = world->header->config.size;
    world->stride = world->header->stride;
    world->windows = world->base + world->header->control_bytes;
    world->own = world->rank < 0 ? NULL : world->windows + (uint64_t)world->rank * world->stride;
    world->timeout_ns = world->header->config.timeout_ns;
    world->streaming_bytes = xccl_copy_streaming_bytes(world->size);
}

static int claim_rank(xccl_world_t *world) {
    xccl_rank_entry_t *entry = &world->ranks[world->rank];
    int32_t nobody = 0;
    if (!atomic_compare_exchange_strong(&entry->pid, &nobody, (int32_t)getpid()))
        return xccl_fail(
            XCCL_ERR_USAGE,
            "rank %d of this world is taken by pid %d: a rank attaches once, and a child process of a rank "
            "cannot be that rank (remove the XCCL_* variables from its environment)",
            world->rank, nobody);
    xccl_process_t self = {0};
    if (world->pid_namespace && xccl_process_read(getpid(), &self))
        atomic_store(&entry->pid_namespace, world->pid_namespace);
    atomic_store(&entry->start_time, self.start_time);
    atomic_store(&entry->locked, xccl_process_hold(world->fd, (uint64_t)world->rank));
    atomic_store(&entry->waits_for, -1);
    /* the first page of each heap table and the context page of the world: all that exists before any allocation */
    uint64_t table = round_up(sizeof(xccl_heap_table_t), XCCL_PAGE);
    for (int area = 0; area < XCCL_AREAS; area++) {
        int status = xccl_heap_commit(world, (uint64_t)area * table, XCCL_PAGE);
        if (status != XCCL_OK)
            return status;
    }
    int status = xccl_heap_commit(world, XCCL_AREAS * table, XCCL_PAGE);
    if (status != XCCL_OK)
        return status;
    status = xccl_race_open(world);
    if (status == XCCL_OK)
        status = xccl_chaos_open(world);
    if (status != XCCL_OK)
        return status;
    xccl_wait_open(world);
    xccl_cma_open(world);
    /* release: who sees ATTACHED sees pid, start time and the zeroed boot pages */
    atomic_store_explicit(&entry->state, XCCL_RANK_ATTACHED, memory_order_release);
    return XCCL_OK;
}

static void ring_all(xccl_world_t *world) {
    for (int rank = 0; rank < world->size; rank++)
        if (rank != world->rank)
            xccl_ring(world, rank);
}

/* `beside`: a rank of this process whose mapping the new one shares; NULL: none. */
static int open_world(int fd, int rank, const char *session, const xccl_world_t *beside, xccl_world_t **out) {
    xccl_header_t header;
    int status = read_header(fd, session, &header);
    if (status != XCCL_OK)
        return status;
    if (rank >= header.config.size)
        return xccl_fail(XCCL_ERR_USAGE, "rank %d of a world of %d ranks", rank, header.config.size);
    if (rank >= 0 && is_read_only(fd))
        return xccl_fail(XCCL_ERR_USAGE, "rank %d: descriptor %d is open for reading only", rank, fd);
    xccl_world_t *world = calloc(1, sizeof *world);
    xccl_header_t *copy = aligned_alloc(XCCL_LINE, round_up(sizeof *copy, XCCL_LINE));
    if (!world || !copy) {
        free(copy);
        free(world);
        return xccl_fail(XCCL_ERR_MEMORY, "out of memory");
    }
    memcpy(copy, &header, sizeof *copy);
    world->header = copy;
    world->rank = rank;
    world->fd = xccl_process_reopen(fd);
    if (world->fd < 0) {
        status = xccl_fail_errno(errno, "cannot open the shared object of descriptor %d anew (is /proc mounted?)", fd);
        free(copy);
        free(world);
        return status;
    }
    pthread_once(&fork_once, watch_forks);
    world->fork_generation = atomic_load_explicit(&fork_generation, memory_order_relaxed);
    world->pid_namespace = xccl_process_namespace();
    world->read_only = is_read_only(world->fd);
    if (beside) {
        world->mapping = beside->mapping;
        /* relaxed: the mapping lives as long as `beside`, which the caller holds */
        atomic_fetch_add_explicit(&world->mapping->users, 1, memory_order_relaxed);
    } else {
        /* an observer needs only the control page */
        uint64_t windows = rank < 0 ? 0 : (uint64_t)header.config.size * header.stride;
        status = map_object(world, header.control_bytes + windows);
    }
    if (status != XCCL_OK) {
        close(world->fd);
        free(copy);
        free(world);
        return status;
    }
    bind_views(world);
    *out = world;
    return XCCL_OK;
}

static int attach(int fd, int rank, const char *session, const xccl_world_t *beside, xccl_world_t **out) {
    if (rank < 0)
        return xccl_fail(XCCL_ERR_USAGE, "rank %d is negative", rank);
    xccl_world_t *world = NULL;
    int status = open_world(fd, rank, session, beside, &world);
    if (status != XCCL_OK)
        return status;
    status = claim_rank(world);
    if (status != XCCL_OK) {
        xccl_shm_unmap(world);
        return status;
    }
    ring_all(world);
    *out = world;
    return xccl_op_begin(world, XCCL_OP_INIT);
}

int xccl_shm_attach(int fd, int rank, const char *session, xccl_world_t **out) {
    return attach(fd, rank, session, NULL, out);
}

int xccl_shm_attach_beside(const xccl_world_t *beside, int rank, xccl_world_t **out) {
    if (beside->rank < 0)
        return xccl_fail(XCCL_ERR_USAGE, "an observer maps no windows: ranks cannot attach beside it");
    return attach(beside->fd, rank, beside->header->config.session, beside, out);
}

int xccl_shm_observe(int fd, xccl_world_t **out) {
    return open_world(fd, -1, NULL, NULL, out);
}

void xccl_shm_session_info(const xccl_world_t *world, xccl_session_info_t *out) {
    const xccl_header_t *header = world->header;
    *out = (xccl_session_info_t){
        .size = world->size,
        .creator_pid = header->creator_pid,
        .created_ns = header->created_ns,
        .aborted = xccl_shm_is_aborted(world, NULL, NULL, 0),
    };
    snprintf(out->session, sizeof out->session, "%.31s", header->config.session);
}

static bool all_attached(void *arg) {
    xccl_world_t *world = arg;
    for (int rank = 0; rank < world->size; rank++)
        if (atomic_load_explicit(&world->ranks[rank].state, memory_order_acquire) == XCCL_RANK_ABSENT)
            return false;
    return true;
}

static bool absent_rank(void *arg, int index, xccl_awaited_t *out) {
    xccl_world_t *world = arg;
    for (int rank = 0; rank < world->size; rank++)
        if (atomic_load_explicit(&world->ranks[rank].state, memory_order_acquire) == XCCL_RANK_ABSENT && index-- == 0) {
            *out = (xccl_awaited_t){.peer = rank, .expected = 1, .seen = 0, .what = "attach"};
            return true;
        }
    return false;
}

int xccl_shm_wait_all_attached(xccl_world_t *world, int64_t timeout_ns) {
    if (timeout_ns == XCCL_TIMEOUT_DEFAULT)
        timeout_ns = world->header->config.init_timeout_ns;
    xccl_wait_t wait = {.ready = all_attached, .awaited = absent_rank, .arg = world};
    return xccl_wait(world, &wait, xccl_deadline(world, timeout_ns));
}

void xccl_shm_detach(xccl_world_t *world) {
    if (world->detached || world->rank < 0)
        return;
    world->detached = true;
    if (world->fork_generation != atomic_load_explicit(&fork_generation, memory_order_relaxed))
        return; /* a forked child: the rank is still its parent's */
    /* release: all that this rank wrote is visible to who sees that it left */
    XCCL_PUBLISH(world, &world->ranks[world->rank].state, XCCL_RANK_CLOSED, memory_order_release);
    ring_all(world);
}

void xccl_shm_unmap(xccl_world_t *world) {
    if (!world)
        return;
    xccl_race_close(world);
    xccl_faults_close(world);
    xccl_chaos_close(world);
    leave_mapping(world->mapping);
    free(world->header);
    close(world->fd);
    free(world);
}

void xccl_shm_set_timeout(xccl_world_t *world, int64_t timeout_ns) {
    world->timeout_ns = timeout_ns;
}

int xccl_shm_rank(const xccl_world_t *world) {
    return world->rank;
}

int xccl_shm_size(const xccl_world_t *world) {
    return world->size;
}

void xccl_shm_set_interrupt(xccl_world_t *world, xccl_interrupt_fn interrupted) {
    world->interrupted = interrupted;
}

int xccl_shm_die_with_parent(int parent_pid) {
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
        return xccl_fail_errno(errno, "cannot ask for a signal at the parent's death");
    if (getppid() != parent_pid)
        return xccl_fail(XCCL_ERR_PEER_LOST, "the parent process %d has ended already", parent_pid);
    return XCCL_OK;
}

/* ---- abort ---- */

void xccl_shm_abort(xccl_world_t *world, const char *text) {
    int32_t none = 0;
    if (world->read_only || !atomic_compare_exchange_strong(&world->control->abort_state, &none, 1))
        return;
    snprintf(world->abort_text, XCCL_ABORT_TEXT_BYTES, "%s", text ? text : "");
    atomic_store(&world->control->abort_rank, world->rank);
    /* release: who sees 2 sees rank and text */
    atomic_store_explicit(&world->control->abort_state, 2, memory_order_release);
    ring_all(world);
}

int xccl_shm_is_aborted(const xccl_world_t *world, int *out_rank, char *text, size_t text_bytes) {
    /* acquire pairs with the release in xccl_shm_abort */
    if (atomic_load_explicit(&world->control->abort_state, memory_order_acquire) != 2)
        return 0;
    if (text && text_bytes)
        snprintf(text, text_bytes, "%.*s", XCCL_ABORT_TEXT_BYTES, world->abort_text);
    if (out_rank)
        *out_rank = atomic_load(&world->control->abort_rank);
    return 1;
}

static int fail_aborted(const xccl_world_t *world) {
    int rank = atomic_load(&world->control->abort_rank);
    if (rank < 0)
        return xccl_fail(XCCL_ERR_ABORTED, "the launcher ended the world: %.*s", XCCL_ABORT_TEXT_BYTES,
                         world->abort_text);
    return xccl_fail_about(XCCL_ERR_ABORTED, rank, "rank %d ended the world:\n%.*s", rank, XCCL_ABORT_TEXT_BYTES,
                           world->abort_text);
}

int xccl_check_usable(const xccl_world_t *world) {
    if (world->fork_generation != atomic_load_explicit(&fork_generation, memory_order_relaxed))
        return xccl_fail(XCCL_ERR_USAGE,
                         "this process was forked from rank %d after xccl.init(): only the parent is the "
                         "rank. Fork before init, or start ranks with xccl.run",
                         world->rank);
    if (world->detached)
        return xccl_fail(XCCL_ERR_USAGE, "rank %d has closed its communicator", world->rank);
    return xccl_shm_is_aborted(world, NULL, NULL, 0) ? fail_aborted(world) : XCCL_OK;
}
