/* chaos.c - the stream of decisions, and pauses. */
#define _GNU_SOURCE
#include "chaos.h"

#include <sched.h>
#include <stdlib.h>
#include <time.h>

#include "chaos_state.h"
#include "status.h"

/* ---- decisions ---- */

/* The finaliser of splitmix64: every bit of the input changes half of the output's. */
static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

uint64_t xccl_chaos_draw(xccl_chaos_t *chaos, xccl_chaos_point_t point) {
    xccl_status_name_seed(chaos->seed);
    return mix(chaos->key ^ mix(chaos->passed[point]++ * XCCL_CHAOS_POINTS + point));
}

/* ---- pauses ---- */

/* Of 256 pauses so many end before the next kind begins. A rank has one mood for a seed, as in a real machine one rank
 * is slow for long, and a short pause in the wrong place needs others that are quiet. */
typedef struct mood_t {
    unsigned none, spin, yield, nap; /* the rest: sleeps */
} mood_t;

static const mood_t MOODS[] = {
    {180, 226, 248, 255}, /* calm */
    {80, 170, 246, 256},  /* nervous: many short ones */
    {150, 180, 206, 248}, /* slow */
};
enum { NUM_MOODS = sizeof MOODS / sizeof *MOODS };

enum {
    SPIN_MOST = 4000,
    YIELDS_MOST = 4,
    NAP_MOST_NS = 250 * 1000,
    SLEEP_MOST_NS = 2500 * 1000,
    STALL_MOST_NS = 600 * 1000
};

static void sleep_ns(uint64_t ns) {
    nanosleep(&(struct timespec){.tv_nsec = (long)ns}, NULL);
}

static void pause_by(const xccl_chaos_t *chaos, uint64_t bits) {
    const mood_t *mood = &MOODS[chaos->mood];
    unsigned dice = bits % 256;
    uint64_t length = bits >> 8;
    if (dice < mood->none)
        return;
    if (dice < mood->spin) {
        for (volatile uint64_t left = length % SPIN_MOST; left > 0; left--)
            ;
    } else if (dice < mood->yield) {
        for (uint64_t left = 1 + length % YIELDS_MOST; left > 0; left--)
            sched_yield();
    } else {
        sleep_ns(length % (dice < mood->nap ? NAP_MOST_NS : SLEEP_MOST_NS));
    }
}

void xccl_chaos_pause_slow(xccl_world_t *world, xccl_chaos_point_t point) {
    pause_by(world->chaos, xccl_chaos_draw(world->chaos, point));
}

void xccl_chaos_stall_slow(xccl_world_t *world) {
    uint64_t bits = xccl_chaos_draw(world->chaos, XCCL_CHAOS_STALL);
    if (xccl_chaos_holds_any(world->chaos) && bits % 4 != 0)
        sleep_ns((bits >> 8) % STALL_MOST_NS);
    xccl_chaos_apply(world, XCCL_CHAOS_ALL);
}

bool xccl_chaos_skips_slow(xccl_world_t *world) {
    return xccl_chaos_draw(world->chaos, XCCL_CHAOS_RUNG) % 4 == 0;
}

void xccl_chaos_order_slow(xccl_world_t *world, int rank, memory_order order) {
    xccl_chaos_pause_slow(world, XCCL_CHAOS_ORDER);
    if (order == memory_order_release || order == memory_order_acq_rel || order == memory_order_seq_cst)
        xccl_chaos_apply(world, rank);
}

/* ---- opening ---- */

static void set_seed(xccl_world_t *world, uint64_t seed) {
    xccl_chaos_t *chaos = world->chaos;
    chaos->seed = seed;
    chaos->key = mix(mix(seed) + (uint64_t)world->rank);
    chaos->mood = (unsigned)(mix(chaos->key) % NUM_MOODS);
    for (int point = 0; point < XCCL_CHAOS_POINTS; point++)
        chaos->passed[point] = 0;
    xccl_status_name_seed(seed);
}

int xccl_chaos_open(xccl_world_t *world) {
    uint64_t seed = world->header->config.chaos;
    if (seed == 0)
        return XCCL_OK;
    world->chaos = calloc(1, sizeof *world->chaos);
    if (!world->chaos)
        return xccl_fail(XCCL_ERR_MEMORY, "out of memory for chaos");
    set_seed(world, seed);
    return XCCL_OK;
}

void xccl_chaos_close(xccl_world_t *world) {
    if (!world->chaos)
        return;
    for (int i = 0; i < XCCL_CHAOS_HELD; i++)
        free(world->chaos->held[i].data);
    free(world->chaos);
    world->chaos = NULL;
    xccl_status_name_seed(0);
}

uint64_t xccl_chaos_seed(const xccl_world_t *world) {
    return world->chaos ? world->chaos->seed : world->header->config.chaos;
}

int xccl_chaos_reseed(xccl_world_t *world, uint64_t seed) {
    if (!world->chaos || seed == 0)
        return xccl_fail(XCCL_ERR_USAGE, "rank %d: a seed is a number > 0, for a world that was made with one",
                         world->rank);
    xccl_chaos_apply(world, XCCL_CHAOS_ALL);
    set_seed(world, seed);
    return XCCL_OK;
}
