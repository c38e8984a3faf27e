#define _GNU_SOURCE
#include "faults.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "racecheck.h"
#include "status.h"

typedef struct rule_t {
    xccl_fault_t fault;
    uint64_t hits; /* how often the rank has been at its point */
} rule_t;

struct xccl_faults_t {
    bool damages;  /* the next word published is to be damaged, */
    int32_t word;  /* at this place of its line, */
    uint64_t bits; /* by flipping these */
    int count;
    rule_t rules[];
};

/* ---- names ---- */

enum { LAST_ONE_SIDED = XCCL_RACE_OP_ATOMIC, NUM_ONE_SIDED = LAST_ONE_SIDED - XCCL_RACE_OP_PUT + 1 };

/* Number inside the core of the index-th operation that faults may name. */
static int op_of(int operation) {
    return operation < XCCL_OP_COUNT - 1 ? operation + 1 : XCCL_RACE_OP_PUT + operation - (XCCL_OP_COUNT - 1);
}

const char *xccl_fault_operation(int operation) {
    if (operation < 0 || operation >= XCCL_OP_COUNT - 1 + NUM_ONE_SIDED)
        return NULL;
    return xccl_race_op_name(op_of(operation));
}

/* ---- the plan ---- */

static int check_fault(const xccl_world_t *world, int index, const xccl_fault_t *fault) {
    const char *what = NULL;
    if (fault->operation != XCCL_FAULT_ANY_OPERATION && xccl_fault_operation(fault->operation) == NULL)
        what = "the operation is unknown";
    else if (fault->phase < XCCL_FAULT_WAITS)
        what = "a phase is a number >= 0, or that of waiting";
    else if (fault->action < XCCL_FAULT_KILL || fault->action > XCCL_FAULT_CORRUPT)
        what = "the action is unknown";
    else if (fault->ns < 0)
        what = "a time is >= 0";
    else if (fault->word < 0 || fault->word >= XCCL_LINE / 8)
        what = "a control line has the words 0 to 7";
    else if (fault->action <= XCCL_FAULT_STOP && atomic_load(&world->mapping->users) > 1)
        what = "a rank that is a thread cannot be killed or stopped: use ranks that are processes";
    return what ? xccl_fail(XCCL_ERR_USAGE, "rank %d, fault %d of the plan: %s", world->rank, index, what) : XCCL_OK;
}

int xccl_fault_inject(xccl_world_t *world, const xccl_fault_t *faults, int count) {
    for (int i = 0; i < count; i++) {
        int status = check_fault(world, i, &faults[i]);
        if (status != XCCL_OK)
            return status;
    }
    struct xccl_faults_t *plan = NULL;
    if (count > 0) {
        plan = calloc(1, sizeof *plan + (size_t)count * sizeof *plan->rules);
        if (!plan)
            return xccl_fail(XCCL_ERR_MEMORY, "out of memory for a plan of %d faults", count);
        plan->count = count;
        for (int i = 0; i < count; i++)
            plan->rules[i].fault = faults[i];
    }
    xccl_faults_close(world);
    world->faults = plan;
    return XCCL_OK;
}

void xccl_faults_close(xccl_world_t *world) {
    free(world->faults);
    world->faults = NULL;
}

/* ---- actions ---- */

static struct timespec time_of(int64_t ns) {
    return (struct timespec){.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
}

static void delay(int64_t ns) {
    struct timespec left = time_of(ns);
    while (nanosleep(&left, &left) != 0 && errno == EINTR)
        ;
}

/* A timer goes on while its process is stopped, and SIGCONT wakes it. It is sent again and again: the first one may
 * come before the process has stopped. */
static void stop(int64_t ns) {
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGCONT};
    bool wakes = ns > 0 && timer_create(CLOCK_MONOTONIC, &event, &timer) == 0;
    if (wakes)
        timer_settime(timer, 0, &(struct itimerspec){.it_interval = time_of(ns), .it_value = time_of(ns)}, NULL);
    raise(SIGSTOP);
    if (wakes)
        timer_delete(timer);
}

static void describe_phase(int phase, char *out, size_t bytes) {
    if (phase == XCCL_FAULT_WAITS)
        snprintf(out, bytes, "as it comes to wait");
    else if (phase == 0)
        snprintf(out, bytes, "as it begins");
    else
        snprintf(out, bytes, "in phase %d", phase);
}

static int act(xccl_world_t *world, int index, int op, int phase) {
    char when[32];
    struct xccl_faults_t *plan = world->faults;
    const xccl_fault_t *fault = &plan->rules[index].fault;
    switch (fault->action) {
    case XCCL_FAULT_KILL:
        raise(SIGKILL);
        break;
    case XCCL_FAULT_STOP:
        stop(fault->ns);
        break;
    case XCCL_FAULT_DELAY:
        delay(fault->ns);
        break;
    case XCCL_FAULT_RAISE:
        describe_phase(phase, when, sizeof when);
        return xccl_fail_about(XCCL_ERR_INJECTED, world->rank,
                               "rank %d: %s fails as planned, %s (fault %d of the plan)", world->rank,
                               xccl_race_op_name(op), when, index);
    case XCCL_FAULT_CORRUPT:
        plan->damages = true;
        plan->word = fault->word;
        plan->bits = fault->bits;
        break;
    }
    return XCCL_OK;
}

int xccl_fault_strike(xccl_world_t *world, int op, int phase) {
    struct xccl_faults_t *plan = world->faults;
    int status = XCCL_OK;
    for (int i = 0; i < plan->count; i++) { /* to the end: each rule counts its visits */
        rule_t *rule = &plan->rules[i];
        const xccl_fault_t *fault = &rule->fault;
        if (fault->phase != phase || (fault->operation != XCCL_FAULT_ANY_OPERATION && op_of(fault->operation) != op))
            continue;
        rule->hits++;
        if (fault->nth != 0 && fault->nth != rule->hits)
            continue;
        int outcome = act(world, i, op, phase);
        if (outcome != XCCL_OK)
            status = outcome;
    }
    return status;
}

/* ---- corruption ---- */

uint64_t xccl_fault_damage(xccl_world_t *world, void *word, bool alone) {
    struct xccl_faults_t *plan = world->faults;
    if (!plan->damages || (alone && plan->word != 0))
        return 0;
    plan->damages = false;
    if (plan->word == 0)
        return plan->bits;
    /* the line is this rank's to write until the word is published */
    uint64_t *line = (uint64_t *)((uintptr_t)word / XCCL_LINE * XCCL_LINE);
    line[plan->word] ^= plan->bits;
    return 0;
}
