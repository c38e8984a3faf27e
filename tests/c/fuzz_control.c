/* Corrupts control words in shared memory and demands that every rank ends, with a result or an error: never with a
 * crash, a report of a sanitizer, or for ever. Arguments: operation or "all", first seed, number of seeds.
 *
 * Each seed is a child process with a world of threads. One rank, the victim, comes late to an operation. What the
 * others have changed in shared memory meanwhile is what it is about to read; some of these words are overwritten, or
 * any other word in use, with numbers at the borders of windows and of integer types. Then the victim comes. Nothing
 * here knows where a protocol keeps what, so it holds for every version of it.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "xccl.h"

enum { RANKS = 3, VICTIM = RANKS - 1, ROUNDS = 3, HIDDEN = 24, TOPK = 2, MOST_TOKENS = 6, EXPERTS = 5 };
enum { MOST_COUNT = 40000, MOST_WORDS = 1 << 17, SECONDS = 20, MOST_ROWS = RANKS * MOST_TOKENS * TOPK };
static const int64_t TIMEOUT = 400 * 1000000ll;
static const int64_t PATIENCE = 10ll * 1000000000;
static const char SESSION[] = "fuzz-control";
static const uint64_t COUNTS[] = {0, 3, 7, 400, 9000, 40000};

typedef struct example_t {
    uint64_t random;
    int fd;
    uint64_t object_bytes, stride;
    uint64_t count;  /* elements of a message */
    uint64_t choice; /* of roles and path */
    int operation, corrupted_round;
    pthread_barrier_t ready, start; /* of a round: all ranks and the corrupter */
    pthread_barrier_t late;         /* the victim and the corrupter */
} example_t;

typedef struct rank_t {
    int rank;
    example_t *example;
    xccl_world_t *world;
    xccl_comm_t *comm;
    int64_t *scratch, *out, *symmetric;
    xccl_moe_t *moe;
    float *pool; /* of the group: outputs there are read in place */
    xccl_ae_t *ae;
    int attention; /* who attends; the others hold the experts */
    bool came;     /* victim: has been late in this round */
} rank_t;

static uint64_t next_random(example_t *e) {
    e->random ^= e->random << 13;
    e->random ^= e->random >> 7;
    e->random ^= e->random << 17;
    return e->random;
}

/* ---- operations: each gives a status ---- */

/* Where the victim is late, once in a round. */
static void come_late(rank_t *r) {
    if (r->rank == VICTIM && !r->came)
        pthread_barrier_wait(&r->example->late);
    r->came = true;
}

static int use_all_to_all(rank_t *r, uint64_t count, int64_t *x) {
    return xccl_coll_all_to_all(r->comm, x, count * 8, XCCL_INT64, TIMEOUT, r->out);
}

static int use_all_reduce(rank_t *r, uint64_t count, int64_t *x) {
    return xccl_coll_all_reduce(r->comm, x, count, XCCL_INT64, XCCL_SUM, TIMEOUT, r->out);
}

static int use_all_gather(rank_t *r, uint64_t count, int64_t *x) {
    return xccl_coll_all_gather(r->comm, x, count * 8, XCCL_INT64, TIMEOUT, r->out);
}

static int use_broadcast(rank_t *r, uint64_t count, int64_t *x) {
    return xccl_coll_broadcast(r->comm, x, count * 8, XCCL_INT64, 0, TIMEOUT, r->out);
}

/* The receiver does not know what it gets, and allocates as much as it is told. */
static int use_all_to_all_v(rank_t *r, uint64_t count, int64_t *x) {
    uint64_t send[RANKS] = {count * 8, count * 8, count * 8}, receive[RANKS], total = 0;
    int status = xccl_coll_all_to_all_v_begin(r->comm, x, send, 8, XCCL_INT64, TIMEOUT, receive);
    if (status < 0)
        return status;
    for (int pe = 0; pe < RANKS; pe++)
        if (receive[pe] % 8 != 0 || __builtin_add_overflow(total, receive[pe], &total))
            abort();
    void *out = malloc(total + 1);
    if (!out) /* more than there is: no fault of the library */
        return XCCL_ERR_MEMORY;
    status = xccl_coll_all_to_all_v_finish(r->comm, TIMEOUT, out);
    free(out);
    return status;
}

static int use_send_receive(rank_t *r, uint64_t count, int64_t *x) {
    int to = (r->rank + 1) % RANKS, from = (r->rank + RANKS - 1) % RANKS;
    xccl_request_t *request;
    xccl_message_t message;
    int status = xccl_p2p_isend(r->comm, x, count * 8, to, 5, count % 2 ? XCCL_SEND_SYNC : XCCL_SEND_DEFAULT, &request);
    if (status < 0)
        return status;
    /* another tag first: what comes is set aside */
    int probed = xccl_p2p_iprobe(r->comm, XCCL_ANY_SOURCE, 6, &message);
    status = probed < 0 ? probed : xccl_p2p_recv(r->comm, r->out, count * 8, from, XCCL_ANY_TAG, TIMEOUT, &message);
    if (status >= 0)
        status = xccl_p2p_request_wait(request, TIMEOUT, &message);
    xccl_p2p_request_free(request);
    return status;
}

static void choose_experts(uint64_t salt, int64_t (*topk)[TOPK]) {
    for (int t = 0; t < MOST_TOKENS; t++)
        for (int slot = 0; slot < TOPK; slot++)
            topk[t][slot] = (int64_t)(salt + (uint64_t)(t * 3 + slot)) % EXPERTS;
}

/* `late_combine`: it is the combine that the victim comes late to. */
static int use_group(rank_t *r, uint64_t count, const int64_t *x, bool late_combine) {
    float rows[MOST_TOKENS][HIDDEN] = {{0}}, sums[MOST_TOKENS][HIDDEN];
    int64_t topk[MOST_TOKENS][TOPK], num_rows;
    int32_t per_expert[EXPERTS];
    choose_experts(count + (uint64_t)r->rank, topk);
    xccl_moe_handle_t *handle = NULL;
    float *y = NULL, *in_place = x == r->symmetric ? r->pool : NULL; /* else combine copies it */
    int32_t *sources = NULL;
    int status = xccl_moe_dispatch_send(r->moe, rows, MOST_TOKENS, &topk[0][0], NULL, TIMEOUT, &handle);
    if (status >= 0)
        status = xccl_moe_dispatch_wait(r->moe, handle, TIMEOUT, &num_rows, per_expert);
    if (status >= 0) {
        if (num_rows < 0 || num_rows > MOST_ROWS) /* more than all members can send */
            abort();
        y = in_place ? in_place : malloc((size_t)num_rows * HIDDEN * sizeof *y + 1);
        sources = malloc((size_t)num_rows * 2 * sizeof *sources + 1);
        status = xccl_moe_dispatch_pull(r->moe, handle, y, NULL, sources, sources + num_rows);
    }
    if (late_combine)
        come_late(r);
    if (status >= 0)
        status = xccl_moe_combine_send(r->moe, handle, y, HIDDEN * sizeof *y, NULL, TIMEOUT);
    if (status >= 0)
        status = xccl_moe_combine_wait(r->moe, handle, sums, TIMEOUT);
    xccl_moe_handle_free(handle);
    free(sources);
    if (y != in_place)
        free(y);
    return status;
}

static int use_moe(rank_t *r, uint64_t count, int64_t *x) {
    return use_group(r, count, x, false);
}

static int use_combine(rank_t *r, uint64_t count, int64_t *x) {
    return use_group(r, count, x, true);
}

static int attend(rank_t *r, uint64_t count) {
    float rows[MOST_TOKENS][HIDDEN] = {{0}}, sums[MOST_TOKENS][HIDDEN];
    int64_t topk[MOST_TOKENS][TOPK];
    uint64_t batch;
    choose_experts(count, topk);
    int status = xccl_ae_a2e(r->ae, rows, MOST_TOKENS, &topk[0][0], NULL, &batch);
    return status < 0 ? status : xccl_ae_e2a(r->ae, batch, sums, TIMEOUT);
}

static int serve(rank_t *r, float *in_place) {
    int64_t num_rows;
    int32_t per_expert[EXPERTS];
    uint64_t batch;
    float *y = NULL;
    int32_t *sources = NULL;
    int status = xccl_ae_recv_begin(r->ae, &batch);
    if (status >= 0)
        status = xccl_ae_recv_wait(r->ae, batch, TIMEOUT, &num_rows, per_expert);
    if (status >= 0) {
        if (num_rows < 0 || num_rows > MOST_ROWS) /* more than the attention rank can send */
            abort();
        y = in_place ? in_place : malloc((size_t)num_rows * HIDDEN * sizeof *y + 1);
        sources = malloc((size_t)num_rows * 2 * sizeof *sources + 1);
        status = xccl_ae_recv_pull(r->ae, batch, y, NULL, sources, sources + num_rows);
    }
    if (status >= 0)
        status = xccl_ae_send_begin(r->ae, batch, y, HIDDEN * sizeof *y);
    if (status >= 0)
        status = xccl_ae_send_finish(r->ae, batch, TIMEOUT);
    free(sources);
    if (y != in_place)
        free(y);
    return status;
}

static int use_ae(rank_t *r, uint64_t count, int64_t *x) {
    return r->rank == r->attention ? attend(r, count) : serve(r, x == r->symmetric ? r->pool : NULL);
}

static int use_heap(rank_t *r, uint64_t count, int64_t *x) {
    uint64_t offset = 0;
    int64_t word = 1;
    (void)x;
    int status = xccl_heap_alloc(r->comm, XCCL_AREA_APP, count * 8 + 8, XCCL_HEAP_COMMIT, 1, TIMEOUT, &offset);
    if (status < 0)
        return status;
    status = xccl_gas_put(r->comm, xccl_gas_local(r->world, offset), &word, 8, (r->rank + 1) % RANKS);
    int freed = xccl_heap_free(r->comm, XCCL_AREA_APP, offset, TIMEOUT);
    return status < 0 ? status : freed;
}

static int use_split(rank_t *r, uint64_t count, int64_t *x) {
    xccl_comm_t *group = NULL;
    int status = xccl_comm_split(r->comm, (int64_t)count % 2 ? r->rank % 2 : 0, r->rank, TIMEOUT, &group);
    if (status < 0)
        return status;
    status = xccl_coll_all_reduce(group, x, 3, XCCL_INT64, XCCL_SUM, TIMEOUT, r->out);
    int closed = xccl_comm_close(group, TIMEOUT);
    return status < 0 ? status : closed;
}

/* Nobody has died, so the survivors are all members. */
static int use_shrink(rank_t *r, uint64_t count, int64_t *x) {
    xccl_comm_t *group = NULL, *survivors = NULL;
    int status = xccl_comm_split(r->comm, 0, (int64_t)count % 2 ? -r->rank : r->rank, TIMEOUT, &group);
    if (status < 0)
        return status;
    come_late(r);
    status = xccl_comm_shrink(group, TIMEOUT, &survivors);
    xccl_comm_discard(group);
    if (status < 0)
        return status;
    status = xccl_coll_all_reduce(survivors, x, 3, XCCL_INT64, XCCL_SUM, TIMEOUT, r->out);
    int closed = xccl_comm_close(survivors, TIMEOUT);
    return status < 0 ? status : closed;
}

static int use_signal(rank_t *r, uint64_t count, int64_t *x) {
    uint64_t *signal = (uint64_t *)(r->symmetric + (uint64_t)RANKS * MOST_COUNT), seen;
    int to = (r->rank + 1) % RANKS;
    int status = xccl_gas_put_signal(r->comm, r->symmetric, x, count * 8, signal, 1, XCCL_SIGNAL_ADD, to);
    return status < 0 ? status : xccl_gas_wait_until(r->comm, signal, XCCL_CMP_GE, 1, TIMEOUT, &seen);
}

static const struct {
    const char *name;
    int (*run)(rank_t *r, uint64_t count, int64_t *x);
    bool late_inside; /* it says itself where the victim is late */
} OPERATIONS[] = {
    {"all_to_all", use_all_to_all, false},
    {"all_reduce", use_all_reduce, false},
    {"all_gather", use_all_gather, false},
    {"broadcast", use_broadcast, false},
    {"all_to_all_v", use_all_to_all_v, false},
    {"send_receive", use_send_receive, false},
    {"moe", use_moe, false},
    {"combine", use_combine, true},
    {"ae", use_ae, false},
    {"heap", use_heap, false},
    {"split", use_split, false},
    {"shrink", use_shrink, true},
    {"signal", use_signal, false},
};
enum { NUM_OPERATIONS = sizeof OPERATIONS / sizeof *OPERATIONS };

/* ---- a rank ---- */

/* Any rank may attend, the victim too; half of the examples go over a trampoline. */
static void open_ae(rank_t *r, const xccl_moe_config_t *layer) {
    static const int32_t owner[EXPERTS] = {0, 1, 1, 0, 1};
    uint64_t choice = r->example->choice;
    int32_t attention = r->attention = (int)(choice % RANKS), experts[RANKS - 1];
    for (int rank = 0, i = 0; rank < RANKS; rank++)
        if (rank != attention)
            experts[i++] = rank;
    xccl_ae_config_t config = {.layer = *layer, .num_attention_ranks = 1, .num_expert_ranks = RANKS - 1};
    config.path = choice / RANKS % 2 ? XCCL_PATH_TRAMPOLINE : XCCL_PATH_DIRECT;
    config.first_trampoline = (int32_t)(choice / RANKS / 2 % (RANKS - 1));
    if (xccl_ae_open(r->comm, &config, &attention, experts, owner, PATIENCE, &r->ae) < 0) {
        fprintf(stderr, "cannot open: %s\n", xccl_error_message());
        _exit(2);
    }
}

static void open_rank(rank_t *r) {
    static const int32_t owner[EXPERTS] = {0, 1, 2, 0, 1};
    const xccl_quant_t quant = r->example->count % 2 ? XCCL_QUANT_INT8 : XCCL_QUANT_NONE;
    const xccl_moe_config_t config = {EXPERTS,      HIDDEN, TOPK,           MOST_TOKENS,
                                      XCCL_FLOAT32, quant,  XCCL_SIMD_AUTO, XCCL_MISSING_RAISE};
    uint64_t offset, bytes = (uint64_t)RANKS * MOST_COUNT * 8;
    r->scratch = calloc(1, bytes);
    r->out = malloc(bytes);
    if (xccl_shm_wait_all_attached(r->world, PATIENCE) < 0 || xccl_comm_open(r->world, &r->comm) < 0 ||
        xccl_heap_alloc(r->comm, XCCL_AREA_APP, bytes + 64, XCCL_HEAP_COMMIT, 1, PATIENCE, &offset) < 0 ||
        xccl_moe_open(r->comm, &config, owner, PATIENCE, &r->moe) < 0) {
        fprintf(stderr, "cannot open: %s\n", xccl_error_message());
        _exit(2);
    }
    r->symmetric = xccl_gas_local(r->world, offset);
    xccl_moe_pool(r->moe, &offset, &bytes);
    if (xccl_heap_commit(r->world, offset, bytes) < 0)
        _exit(2);
    r->pool = xccl_gas_local(r->world, offset);
    open_ae(r, &config);
}

static void *run_rank(void *arg) {
    rank_t *r = arg;
    example_t *e = r->example;
    int status = XCCL_OK;
    open_rank(r);
    for (int round = 0; round < ROUNDS; round++) {
        int64_t *x = round % 2 ? r->symmetric : r->scratch;
        pthread_barrier_wait(&e->ready);
        pthread_barrier_wait(&e->start);
        r->came = false;
        if (!OPERATIONS[e->operation].late_inside)
            come_late(r);
        if (status >= 0)
            status = OPERATIONS[e->operation].run(r, e->count, x);
        come_late(r); /* if it failed before */
        if (status < 0)
            xccl_shm_abort(r->world, xccl_error_message());
    }
    xccl_ae_discard(r->ae);
    xccl_moe_discard(r->moe);
    xccl_comm_discard(r->comm);
    xccl_shm_detach(r->world);
    free(r->scratch);
    free(r->out);
    return NULL;
}

/* ---- the corrupter ---- */

typedef struct words_t {
    uint64_t count;
    uint64_t offset[MOST_WORDS], value[MOST_WORDS];
} words_t;

/* The words in use: those of the object's pages that exist, but for the greater part of user data. */
static void scan(const example_t *e, const unsigned char *base, words_t *words) {
    const off_t control = 128 << 10; /* the beginning of each run of pages */
    words->count = 0;
    for (off_t at = 0, end; (at = lseek(e->fd, at, SEEK_DATA)) >= 0; at = end) {
        end = lseek(e->fd, at, SEEK_HOLE);
        for (off_t word = at; word < end && word < at + control && words->count < MOST_WORDS; word += 8) {
            words->offset[words->count] = (uint64_t)word;
            words->value[words->count++] = *(const volatile uint64_t *)(base + word);
        }
    }
}

static uint64_t bad_value(example_t *e, uint64_t old) {
    const uint64_t values[] = {0,
                               1,
                               UINT64_MAX,
                               1ull << 63,
                               INT64_MAX,
                               UINT32_MAX,
                               1ull << 31,
                               e->stride,
                               e->stride - 8,
                               e->stride - 64,
                               e->stride * RANKS,
                               e->object_bytes,
                               old + 1,
                               old - 1,
                               old * 2,
                               old + 64,
                               old + 4096,
                               ~old,
                               old ^ 1ull << next_random(e) % 64,
                               old ^ 1ull << next_random(e) % 8,
                               old | 0xffffffffull << 32,
                               next_random(e)};
    return values[next_random(e) % (sizeof values / sizeof *values)];
}

enum { MOST_CORRUPTED = 3 };

/* Words that are overwritten, with what they held and what they get. */
typedef struct corrupted_t {
    int count;
    volatile uint64_t *word[MOST_CORRUPTED];
    uint64_t old[MOST_CORRUPTED], bad[MOST_CORRUPTED];
} corrupted_t;

/* Overwrites some words; mostly such as have changed since `before`, or are new. */
static corrupted_t corrupt(example_t *e, unsigned char *base, const words_t *before, const words_t *now) {
    static uint64_t changed[MOST_WORDS], used[MOST_WORDS];
    uint64_t num_changed = 0, num_used = 0, old = 0;
    for (uint64_t i = 0; i < now->count; i++) {
        while (old < before->count && before->offset[old] < now->offset[i])
            old++;
        bool existed = old < before->count && before->offset[old] == now->offset[i];
        if (now->value[i] != 0)
            used[num_used++] = now->offset[i];
        if (now->value[i] != (existed ? before->value[old] : 0))
            changed[num_changed++] = now->offset[i];
    }
    corrupted_t corrupted = {.count = 1 + (int)(next_random(e) % MOST_CORRUPTED)};
    for (int i = 0; i < corrupted.count; i++) {
        bool from_changed = num_changed > 0 && next_random(e) % 4 != 0;
        uint64_t pick = next_random(e);
        uint64_t offset = from_changed ? changed[pick % num_changed] : used[pick % num_used];
        corrupted.word[i] = (volatile uint64_t *)(base + offset);
        corrupted.old[i] = *corrupted.word[i];
        corrupted.bad[i] = bad_value(e, corrupted.old[i]);
        *corrupted.word[i] = corrupted.bad[i];
    }
    return corrupted;
}

/* Lets the words change to and fro while they are read: who checks one and then reads it again is caught. */
static void flicker(const corrupted_t *corrupted) {
    enum { NS = 3000000 };
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    do {
        for (int turn = 0; turn < 1000; turn++)
            for (int i = 0; i < corrupted->count; i++)
                *corrupted->word[i] = turn % 2 ? corrupted->bad[i] : corrupted->old[i];
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - start.tv_sec) * 1000000000ll + now.tv_nsec - start.tv_nsec < NS);
}

static void corrupt_between(example_t *e) {
    static words_t before, now;
    corrupted_t corrupted = {0};
    unsigned char *base = mmap(NULL, e->object_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, e->fd, 0);
    if (base == MAP_FAILED)
        _exit(2);
    for (int round = 0; round < ROUNDS; round++) {
        pthread_barrier_wait(&e->ready);
        if (round == e->corrupted_round)
            scan(e, base, &before);
        pthread_barrier_wait(&e->start);
        if (round == e->corrupted_round) {
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL); /* for the others to come as far as they can */
            scan(e, base, &now);
            corrupted = corrupt(e, base, &before, &now);
        }
        pthread_barrier_wait(&e->late);
        if (round == e->corrupted_round && next_random(e) % 2)
            flicker(&corrupted);
    }
}

/* ---- an example ---- */

static void run_example(uint64_t seed, int operation) {
    static example_t e;
    alarm(SECONDS);
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
    e.random = (seed + 1) * 0x9e3779b97f4a7c15u;
    for (int i = 0; i < 5; i++)
        next_random(&e);
    e.operation = operation >= 0 ? operation : (int)(next_random(&e) % NUM_OPERATIONS);
    e.count = COUNTS[next_random(&e) % (sizeof COUNTS / sizeof *COUNTS)];
    e.choice = next_random(&e);
    e.corrupted_round = (int)(next_random(&e) % ROUNDS);
    xccl_config_t config = {.size = RANKS,
                            .heap_bytes = 16 << 20,
                            .p2p_slot_bytes = 4096,
                            .p2p_slots = 4,
                            .coll_block_bytes = 16384,
                            .spin = 20};
    strcpy(config.session, SESSION);
    e.fd = memfd_create("fuzz-control", MFD_CLOEXEC);
    e.object_bytes = xccl_shm_object_bytes(&config);
    config.size = RANKS - 1;
    e.stride = e.object_bytes - xccl_shm_object_bytes(&config);
    config.size = RANKS;
    if (e.fd < 0 || xccl_shm_format(e.fd, &config) < 0)
        _exit(2);
    pthread_barrier_init(&e.ready, NULL, RANKS + 1);
    pthread_barrier_init(&e.start, NULL, RANKS + 1);
    pthread_barrier_init(&e.late, NULL, 2);
    static rank_t ranks[RANKS];
    pthread_t threads[RANKS];
    for (int rank = 0; rank < RANKS; rank++) {
        ranks[rank] = (rank_t){.rank = rank, .example = &e};
        int status = rank == 0 ? xccl_shm_attach(e.fd, 0, SESSION, &ranks[0].world)
                               : xccl_shm_attach_beside(ranks[0].world, rank, &ranks[rank].world);
        if (status < 0 || pthread_create(&threads[rank], NULL, run_rank, &ranks[rank]) != 0)
            _exit(2);
    }
    corrupt_between(&e);
    for (int rank = 0; rank < RANKS; rank++)
        pthread_join(threads[rank], NULL);
    _exit(0);
}

/* Its index, -1 for any, -2 if there is none of this name. */
static int operation_named(const char *name) {
    for (int i = 0; i < NUM_OPERATIONS; i++)
        if (strcmp(name, OPERATIONS[i].name) == 0)
            return i;
    return strcmp(name, "all") == 0 ? -1 : -2;
}

int main(int argc, char **argv) {
    if (argc != 4)
        return 2;
    uint64_t first = strtoull(argv[2], NULL, 10), count = strtoull(argv[3], NULL, 10), bad = 0;
    int operation = operation_named(argv[1]);
    if (operation < -1)
        return 2;
    for (uint64_t seed = first; seed < first + count; seed++) {
        int status;
        pid_t child = fork();
        if (child == 0)
            run_example(seed, operation);
        if (child < 0 || waitpid(child, &status, 0) != child)
            return 2;
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
            continue;
        bad++;
        if (WIFSIGNALED(status))
            printf("seed %llu: %s\n", (unsigned long long)seed, strsignal(WTERMSIG(status)));
        else
            printf("seed %llu: exit status %d\n", (unsigned long long)seed, WEXITSTATUS(status));
        fflush(stdout);
    }
    printf("%llu executions, %llu bad\n", (unsigned long long)count, (unsigned long long)bad);
    return bad != 0;
}
