/* A world whose ranks are threads of this process, over the C API: for the sanitizers, which then see every access of
 * every rank. Each round uses every layer and checks the results. Arguments: ranks, rounds, seed.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "xccl.h"

enum { HIDDEN = 48, TOPK = 3, MOST_TOKENS = 12, MOST_RANKS = 16 };
static const int64_t TIMEOUT = 120ll * 1000000000;
static const char SESSION[] = "threads-world";
/* Inline, staged in several chunks, and, from symmetric memory, in place or zero-copy. */
static const uint64_t COUNTS[] = {0, 3, 5, 300, 9000, 60000};
enum { SIZES = sizeof COUNTS / sizeof *COUNTS, MOST_COUNT = 60000 };

typedef struct rank_t {
    int rank, size;
    uint64_t rounds, random;
    xccl_world_t *world;
    xccl_comm_t *comm;
    int64_t *symmetric, *counters; /* [MOST_RANKS * MOST_COUNT], [MOST_RANKS] */
    uint64_t *signal;
    xccl_moe_t *moe;
    xccl_ae_t *ae[2]; /* direct, over trampolines; none if there is one rank */
} rank_t;

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        if ((call) < 0) {                                                                                              \
            fprintf(stderr, "line %d: %s\n", __LINE__, xccl_error_message());                                          \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)
#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "line %d, rank %d: %s is false\n", __LINE__, r->rank, #condition);                         \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

static uint64_t next_random(rank_t *r) {
    r->random ^= r->random << 13;
    r->random ^= r->random >> 7;
    r->random ^= r->random << 17;
    return r->random;
}

/* Now and then a rank comes late. */
static void dawdle(rank_t *r) {
    if (next_random(r) % 8 == 0)
        nanosleep(&(struct timespec){.tv_nsec = (long)(next_random(r) % 300000)}, NULL);
}

static void fill(int64_t *words, uint64_t count, int64_t value) {
    for (uint64_t i = 0; i < count; i++)
        words[i] = value + (int64_t)i;
}

static int is_filled(const int64_t *words, uint64_t count, int64_t value) {
    for (uint64_t i = 0; i < count; i++)
        if (words[i] != value + (int64_t)i)
            return 0;
    return 1;
}

static int64_t value_of(int rank, uint64_t round) {
    return rank * 1000000000ll + (int64_t)round * 1000000;
}

/* ---- one round of each layer ---- */

static void use_signals(rank_t *r, uint64_t round) {
    int to = (r->rank + 1) % r->size, from = (r->rank + r->size - 1) % r->size;
    int64_t words[40];
    uint64_t seen, old;
    fill(words, 40, value_of(r->rank, round));
    /* two halves of the array and of the values: the peer is done with a half after the next barrier */
    int64_t *half = r->symmetric + (round % 2) * 40;
    CHECK(xccl_gas_put_signal(r->comm, half, words, sizeof words, r->signal, round, XCCL_SIGNAL_SET, to));
    CHECK(xccl_gas_wait_until(r->comm, r->signal, XCCL_CMP_GE, round, TIMEOUT, &seen));
    REQUIRE(is_filled(half, 40, value_of(from, round)));
    CHECK(xccl_gas_atomic(r->comm, r->counters, 8, XCCL_ATOMIC_FETCH_ADD, 1, 0, to, &old));
    CHECK(xccl_coll_barrier(r->comm, TIMEOUT));
    CHECK(xccl_gas_atomic(r->comm, r->counters, 8, XCCL_ATOMIC_FETCH, 0, 0, r->rank, &old));
    REQUIRE(old == round);
    CHECK(xccl_gas_get(r->comm, words, half, sizeof words, to));
    REQUIRE(is_filled(words, 40, value_of(r->rank, round)));
    CHECK(xccl_coll_barrier(r->comm, TIMEOUT));
}

static void use_send_receive(rank_t *r, uint64_t round, int64_t *scratch) {
    int to = (r->rank + 1) % r->size, from = (r->rank + r->size - 1) % r->size;
    uint64_t count = COUNTS[round % SIZES];
    int64_t *out = round % 3 ? scratch : r->symmetric;
    int64_t *in = scratch + MOST_COUNT;
    xccl_send_mode_t mode = round % 2 ? XCCL_SEND_SYNC : XCCL_SEND_DEFAULT;
    xccl_request_t *request;
    xccl_message_t message;
    fill(out, count, value_of(r->rank, round));
    dawdle(r);
    CHECK(xccl_p2p_isend(r->comm, out, count * 8, to, 7, mode, &request));
    CHECK(xccl_p2p_recv(r->comm, in, count * 8, round % 4 ? from : XCCL_ANY_SOURCE, XCCL_ANY_TAG, TIMEOUT, &message));
    REQUIRE(message.source == from && message.tag == 7 && is_filled(in, count, value_of(from, round)));
    CHECK(xccl_p2p_request_wait(request, TIMEOUT, &message));
    xccl_p2p_request_free(request);
    /* a burst that fills the ring, with the last tag first */
    for (int64_t tag = 0; tag < 20; tag++) {
        CHECK(xccl_p2p_isend(r->comm, &scratch[tag], 8, to, tag, XCCL_SEND_DEFAULT, &request));
        xccl_p2p_request_free(request);
    }
    for (int64_t tag = 19; tag >= 0; tag--) {
        CHECK(xccl_p2p_recv(r->comm, in, 8, from, tag, TIMEOUT, &message));
        REQUIRE(message.tag == tag);
    }
}

static void use_collectives(rank_t *r, uint64_t round, int64_t *scratch) {
    uint64_t count = COUNTS[(round + r->size) % SIZES], most = (uint64_t)r->size * MOST_COUNT;
    int64_t *x = round % 2 ? r->symmetric : scratch, *out = scratch + most;
    for (int pe = 0; pe < r->size; pe++)
        fill(x + (uint64_t)pe * count, count, value_of(r->rank, round) + pe);
    dawdle(r);
    CHECK(xccl_coll_all_to_all(r->comm, x, count * 8, XCCL_INT64, TIMEOUT, out));
    for (int pe = 0; pe < r->size; pe++)
        REQUIRE(is_filled(out + (uint64_t)pe * count, count, value_of(pe, round) + r->rank));
    CHECK(xccl_coll_all_gather(r->comm, x, count * 8, XCCL_INT64, TIMEOUT, out));
    for (int pe = 0; pe < r->size; pe++)
        REQUIRE(is_filled(out + (uint64_t)pe * count, count, value_of(pe, round)));
    dawdle(r);
    CHECK(xccl_coll_all_reduce(r->comm, x, count, XCCL_INT64, XCCL_MAX, TIMEOUT, out));
    REQUIRE(is_filled(out, count, value_of(r->size - 1, round)));
    CHECK(xccl_coll_reduce_scatter(r->comm, x, count, XCCL_INT64, XCCL_MIN, TIMEOUT, out));
    REQUIRE(is_filled(out, count, value_of(0, round) + r->rank));
    int root = (int)(round % (uint64_t)r->size);
    CHECK(xccl_coll_broadcast(r->comm, x, count * 8, XCCL_INT64, root, TIMEOUT, out));
    REQUIRE(is_filled(out, count, value_of(root, round)));
}

/* Everybody sends `rank + pe` rows of 24 bytes to pe. */
static void use_all_to_all_v(rank_t *r, uint64_t round, int64_t *scratch) {
    uint64_t send[MOST_RANKS], receive[MOST_RANKS], at = 0;
    int64_t *out = scratch + 3 * MOST_RANKS * MOST_RANKS * 2;
    for (int pe = 0; pe < r->size; pe++) {
        send[pe] = (uint64_t)(r->rank + pe) * 24;
        fill(scratch + at, send[pe] / 8, value_of(r->rank, round) + pe);
        at += send[pe] / 8;
    }
    CHECK(xccl_coll_all_to_all_v_begin(r->comm, scratch, send, 24, XCCL_BYTES, TIMEOUT, receive));
    CHECK(xccl_coll_all_to_all_v_finish(r->comm, TIMEOUT, out));
    for (int pe = 0; pe < r->size; out += receive[pe++] / 8) {
        REQUIRE(receive[pe] == send[pe]);
        REQUIRE(is_filled(out, receive[pe] / 8, value_of(pe, round) + r->rank));
    }
}

/* A group of every second rank, and memory that comes and goes. */
static void use_groups(rank_t *r, uint64_t round) {
    xccl_comm_t *group;
    uint64_t offset;
    int64_t mine = r->rank, sum, expected = 0;
    CHECK(xccl_comm_split(r->comm, r->rank % 2, -r->rank, TIMEOUT, &group));
    CHECK(xccl_heap_alloc(group, XCCL_AREA_APP, 4096 + round * 64, XCCL_HEAP_COMMIT, 1, TIMEOUT, &offset));
    int64_t *memory = xccl_gas_local(r->world, offset);
    REQUIRE(memory[511] == 0); /* [0] may have come already */
    int size = xccl_comm_size(group);
    CHECK(xccl_gas_put(group, memory, &mine, 8, (xccl_comm_rank(group) + 1) % size));
    CHECK(xccl_coll_all_reduce(group, &mine, 1, XCCL_INT64, XCCL_SUM, TIMEOUT, &sum));
    for (int rank = r->rank % 2; rank < r->size; rank += 2)
        expected += rank;
    REQUIRE(sum == expected);
    REQUIRE(memory[0] == xccl_comm_world_rank(group, (xccl_comm_rank(group) + size - 1) % size));
    CHECK(xccl_heap_free(group, XCCL_AREA_APP, offset, TIMEOUT));
    CHECK(xccl_comm_close(group, TIMEOUT));
}

/* ---- dispatch and combine ---- */

typedef struct batch_t {
    int64_t tokens;
    float x[MOST_TOKENS][HIDDEN], out[MOST_TOKENS][HIDDEN];
    int64_t topk[MOST_TOKENS][TOPK];
    unsigned char alive[MOST_RANKS]; /* when it was dispatched */
    xccl_moe_handle_t *handle;
    float *y;
    int32_t *src_rank, *src_token, *per_expert;
} batch_t;

static void choose_tokens(rank_t *r, batch_t *batch, int64_t num_experts) {
    batch->tokens = (int64_t)(next_random(r) % (MOST_TOKENS + 1));
    for (int64_t t = 0; t < batch->tokens; t++) {
        for (int h = 0; h < HIDDEN; h++)
            batch->x[t][h] = (float)(r->rank * 100 + t);
        for (int slot = 0; slot < TOPK; slot++)
            batch->topk[t][slot] = (int64_t)(next_random(r) % (uint64_t)(num_experts + 1)) - 1;
    }
    dawdle(r);
}

static void dispatch(rank_t *r, batch_t *batch, int64_t num_experts) {
    choose_tokens(r, batch, num_experts);
    CHECK(xccl_moe_dispatch_send(r->moe, batch->x, batch->tokens, &batch->topk[0][0], NULL, TIMEOUT, &batch->handle));
}

static void pull(rank_t *r, batch_t *batch) {
    int64_t rows;
    CHECK(xccl_moe_dispatch_wait(r->moe, batch->handle, TIMEOUT, &rows, batch->per_expert));
    CHECK(xccl_moe_dispatch_pull(r->moe, batch->handle, batch->y, NULL, batch->src_rank, batch->src_token));
    for (int64_t row = 0; row < rows; row++)
        REQUIRE(batch->y[row * HIDDEN] == (float)(batch->src_rank[row] * 100 + batch->src_token[row]));
}

static void combine(rank_t *r, batch_t *batch) {
    CHECK(xccl_moe_combine_send(r->moe, batch->handle, batch->y, HIDDEN * sizeof(float), NULL, TIMEOUT));
    CHECK(xccl_moe_combine_wait(r->moe, batch->handle, batch->out, TIMEOUT));
    xccl_moe_handle_free(batch->handle);
    for (int64_t t = 0; t < batch->tokens; t++) {
        int experts = 0;
        for (int slot = 0; slot < TOPK; slot++)
            experts += batch->topk[t][slot] >= 0 && batch->alive[batch->topk[t][slot] % r->size];
        REQUIRE(batch->out[t][HIDDEN - 1] == (float)experts * (float)(r->rank * 100 + t));
    }
}

/* All agree that one member, or none, is to be left out. */
static void leave_out(rank_t *r, uint64_t member, batch_t *batch) {
    for (int rank = 0; rank < r->size; rank++)
        batch->alive[rank] = (uint64_t)rank != member;
    CHECK(xccl_moe_set_alive(r->moe, batch->alive, TIMEOUT));
}

/* Two dispatches in flight; their outputs are read in the pool, and, every other time, copied. */
static void use_moe(rank_t *r, uint64_t round, batch_t *batches) {
    int64_t num_experts = 2 * r->size + 1;
    leave_out(r, round % (uint64_t)(r->size + 1), &batches[0]);
    dispatch(r, &batches[0], num_experts);
    leave_out(r, round / 2 % (uint64_t)(r->size + 1), &batches[1]);
    dispatch(r, &batches[1], num_experts);
    pull(r, &batches[0]);
    pull(r, &batches[1]);
    combine(r, &batches[round % 2]);
    combine(r, &batches[(round + 1) % 2]);
}

static void open_moe(rank_t *r, batch_t *batches) {
    int32_t owner[2 * MOST_RANKS + 1];
    int64_t rows = (int64_t)r->size * MOST_TOKENS * TOPK, num_experts = 2 * r->size + 1;
    for (int64_t e = 0; e < num_experts; e++)
        owner[e] = (int32_t)(e % r->size);
    xccl_moe_config_t config = {num_experts,  HIDDEN,          TOPK,           MOST_TOKENS,
                                XCCL_FLOAT32, XCCL_QUANT_NONE, XCCL_SIMD_AUTO, XCCL_MISSING_ZERO};
    uint64_t offset, bytes;
    CHECK(xccl_moe_open(r->comm, &config, owner, TIMEOUT, &r->moe));
    xccl_moe_pool(r->moe, &offset, &bytes);
    uint64_t y_bytes = (uint64_t)rows * HIDDEN * sizeof(float);
    REQUIRE(y_bytes <= bytes);
    CHECK(xccl_heap_commit(r->world, offset, y_bytes));
    batches[0].y = xccl_gas_local(r->world, offset);
    batches[1].y = malloc(y_bytes);
    for (int i = 0; i < 2; i++) {
        batches[i].src_rank = malloc((size_t)rows * 4);
        batches[i].src_token = malloc((size_t)rows * 4);
        batches[i].per_expert = malloc((size_t)num_experts * 4);
    }
}

static void close_moe(rank_t *r, batch_t *batches) {
    CHECK(xccl_moe_close(r->moe, 0, TIMEOUT));
    free(batches[1].y);
    for (int i = 0; i < 2; i++) {
        free(batches[i].src_rank);
        free(batches[i].src_token);
        free(batches[i].per_expert);
    }
}

/* ---- A2E and E2A ---- */

/* The first ranks attend, the others hold the experts. */
static int num_attention(const rank_t *r) {
    return r->size > 2 ? (r->size + 1) / 3 : 1;
}

static void attend(rank_t *r, xccl_ae_t *ae, uint64_t round, batch_t *batches) {
    uint64_t number[2];
    for (int i = 0; i < 2; i++) {
        choose_tokens(r, &batches[i], 2 * r->size + 1);
        CHECK(xccl_ae_a2e(ae, batches[i].x, batches[i].tokens, &batches[i].topk[0][0], NULL, &number[i]));
    }
    for (int turn = 0; turn < 2; turn++) {
        batch_t *batch = &batches[(round + turn) % 2];
        CHECK(xccl_ae_e2a(ae, number[(round + turn) % 2], batch->out, TIMEOUT));
        for (int64_t t = 0; t < batch->tokens; t++) {
            int experts = 0;
            for (int slot = 0; slot < TOPK; slot++)
                experts += batch->topk[t][slot] >= 0;
            REQUIRE(batch->out[t][HIDDEN - 1] == (float)experts * (float)(r->rank * 100 + t));
        }
    }
}

/* Outputs of the first are read in place, those of the second are copied. */
static void serve(rank_t *r, xccl_ae_t *ae, uint64_t round, batch_t *batches) {
    uint64_t number[2];
    for (int i = 0; i < 2; i++)
        CHECK(xccl_ae_recv_begin(ae, &number[i]));
    for (int turn = 0; turn < 2; turn++) {
        int i = (int)((round + turn) % 2);
        batch_t *batch = &batches[i];
        int64_t rows;
        dawdle(r);
        CHECK(xccl_ae_recv_wait(ae, number[i], TIMEOUT, &rows, batch->per_expert));
        CHECK(xccl_ae_recv_pull(ae, number[i], batch->y, NULL, batch->src_rank, batch->src_token));
        for (int64_t row = 0; row < rows; row++)
            REQUIRE(batch->y[row * HIDDEN] == (float)(batch->src_rank[row] * 100 + batch->src_token[row]));
        CHECK(xccl_ae_send_begin(ae, number[i], batch->y, HIDDEN * sizeof(float)));
    }
    for (int i = 0; i < 2; i++)
        CHECK(xccl_ae_send_finish(ae, number[i], TIMEOUT));
}

static void use_ae(rank_t *r, uint64_t round, batch_t *batches) {
    for (int path = 0; path < 2 && r->size > 1; path++)
        if (r->rank < num_attention(r))
            attend(r, r->ae[path], round, batches);
        else
            serve(r, r->ae[path], round, batches);
}

static void open_ae(rank_t *r) {
    int32_t ranks[MOST_RANKS], owner[2 * MOST_RANKS + 1];
    int32_t attention = num_attention(r), experts = r->size - attention;
    xccl_ae_config_t config = {.num_attention_ranks = attention, .num_expert_ranks = experts};
    config.layer = (xccl_moe_config_t){.num_experts = 2 * r->size + 1,
                                       .hidden = HIDDEN,
                                       .num_topk = TOPK,
                                       .num_max_tokens = MOST_TOKENS,
                                       .dtype = XCCL_FLOAT32};
    for (int rank = 0; rank < r->size; rank++)
        ranks[rank] = rank;
    for (int e = 0; e < config.layer.num_experts; e++)
        owner[e] = experts ? e % experts : 0;
    for (int path = 0; path < 2 && r->size > 1; path++) {
        config.path = path ? XCCL_PATH_TRAMPOLINE : XCCL_PATH_DIRECT;
        CHECK(xccl_ae_open(r->comm, &config, ranks, ranks + attention, owner, TIMEOUT, &r->ae[path]));
    }
}

static void close_ae(rank_t *r) {
    for (int path = 0; path < 2 && r->size > 1; path++)
        CHECK(xccl_ae_close(r->ae[path], 0, TIMEOUT));
}

/* ---- a rank ---- */

static void open_rank(rank_t *r) {
    uint64_t offset, bytes = (uint64_t)r->size * MOST_COUNT * 8;
    CHECK(xccl_shm_wait_all_attached(r->world, TIMEOUT));
    CHECK(xccl_comm_open(r->world, &r->comm));
    CHECK(xccl_heap_alloc(r->comm, XCCL_AREA_APP, bytes, XCCL_HEAP_COMMIT, 1, TIMEOUT, &offset));
    r->symmetric = xccl_gas_local(r->world, offset);
    CHECK(xccl_heap_alloc(r->comm, XCCL_AREA_APP, 4096, XCCL_HEAP_COMMIT, 2, TIMEOUT, &offset));
    r->signal = xccl_gas_local(r->world, offset);
    r->counters = xccl_gas_local(r->world, offset + 64);
}

static void *run_rank(void *arg) {
    rank_t *r = arg;
    batch_t *batches = calloc(2, sizeof *batches);
    int64_t *scratch = malloc(2 * (size_t)r->size * MOST_COUNT * 8 + 65536);
    open_rank(r);
    open_moe(r, batches);
    open_ae(r);
    for (uint64_t round = 1; round <= r->rounds; round++) {
        use_signals(r, round);
        use_send_receive(r, round, scratch);
        use_collectives(r, round, scratch);
        use_all_to_all_v(r, round, scratch);
        use_groups(r, round);
        use_moe(r, round, batches);
        use_ae(r, round, batches);
    }
    close_ae(r);
    close_moe(r, batches);
    CHECK(xccl_coll_barrier(r->comm, TIMEOUT));
    CHECK(xccl_comm_close(r->comm, TIMEOUT));
    xccl_shm_detach(r->world);
    xccl_shm_unmap(r->world);
    free(scratch);
    free(batches);
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 4)
        return 2;
    int size = atoi(argv[1]), fd = memfd_create("threads-world", MFD_CLOEXEC);
    xccl_config_t config = {.size = size,
                            .heap_bytes = 256 << 20,
                            .p2p_slot_bytes = 4096,
                            .p2p_slots = 4,
                            .coll_block_bytes = 16384,
                            .spin = 20};
    strcpy(config.session, SESSION);
    if (size < 1 || size > MOST_RANKS || fd < 0)
        return 2;
    CHECK(xccl_shm_format(fd, &config));
    rank_t ranks[MOST_RANKS] = {0};
    pthread_t threads[MOST_RANKS];
    for (int rank = 0; rank < size; rank++) {
        rank_t *r = &ranks[rank];
        *r = (rank_t){.rank = rank, .size = size, .rounds = strtoull(argv[2], NULL, 10)};
        r->random = (strtoull(argv[3], NULL, 10) + 1) * 0x9e3779b97f4a7c15u + (uint64_t)rank;
        if (rank == 0)
            CHECK(xccl_shm_attach(fd, 0, SESSION, &r->world));
        else
            CHECK(xccl_shm_attach_beside(ranks[0].world, rank, &r->world));
    }
    close(fd);
    for (int rank = 0; rank < size; rank++)
        if (pthread_create(&threads[rank], NULL, run_rank, &ranks[rank]) != 0)
            return 2;
    for (int rank = 0; rank < size; rank++)
        pthread_join(threads[rank], NULL);
    return 0;
}
