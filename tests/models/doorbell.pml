/* The doorbell of csrc/wait.c: does a waiter ever sleep although what it waits for has happened?
 *
 * A ringer stores the word, rings; the waiter climbs to sleep as `doze` does. The sleep has no time limit here: in the
 * library a lost wake-up costs a slice of 100 ms, in the model it is a deadlock, which spin reports as an invalid end
 * state.
 *
 * Memory is that of x86 (total store order): every process puts its stores into a first-in first-out buffer of its
 * own, reads its own newest store, and the buffer drains to memory at any time. A sequentially consistent fence and
 * an atomic read-modify-write wait until it is empty. The kernel compares the bell and queues the sleeper in one step.
 *
 * Bounds: VALUES rounds by one ringer of the waited word, and one ring by another process for something else.
 * Mutants (all must fail): NO_WAITER_FENCE, NO_RINGER_FENCE, BELL_AFTER_LOOK, BELL_UNCHANGED, WAKE_BEFORE_STORE.
 */
#ifndef VALUES
#define VALUES 3
#endif

#define WORD 0
#define SLEEPING 1
#define OTHER 2
#define WORDS 3

#define WAITER 0
#define RINGER 1
#define STRANGER 2
#define ACTORS 3

#define ROOM 3

byte memory[WORDS];
byte bell;
bool queued; /* the waiter sleeps in the kernel */
chan buffers[ACTORS] = [ROOM] of { byte, byte };

/* What an actor reads: its own newest store of the word, else memory. `store` lets only one store of a word into the
 * buffer, so the newest is the only one. */
byte newest[ACTORS * WORDS];

#define store(actor, word, value)                                                                                      \
    atomic { !buffers[actor]??[word, _] && nfull(buffers[actor]) ->                                                    \
        buffers[actor]!word, value; newest[actor * WORDS + word] = value }
#define load(actor, word, into)                                                                                        \
    atomic { if                                                                                                        \
        :: buffers[actor]??[word, _] -> into = newest[actor * WORDS + word]                                            \
        :: else -> into = memory[word]                                                                                 \
    fi }
#define fence(actor) empty(buffers[actor])

/* xccl_ring. futex_wake wakes who is queued; a ring that comes before the sleeper is queued changes the bell. */
inline ring(actor, seen) {
#ifndef NO_RINGER_FENCE
    fence(actor);
#endif
    load(actor, SLEEPING, seen);
    if
    :: seen == 0 -> skip
    :: else ->
#ifndef BELL_UNCHANGED
        atomic { empty(buffers[actor]) -> bell++ };
#endif
        queued = false /* futex_wake */
    fi
}

active proctype drain() {
    byte word, value;
end:
    do
    :: atomic { nempty(buffers[WAITER]) -> buffers[WAITER]?word, value; memory[word] = value }
    :: atomic { nempty(buffers[RINGER]) -> buffers[RINGER]?word, value; memory[word] = value }
    :: atomic { nempty(buffers[STRANGER]) -> buffers[STRANGER]?word, value; memory[word] = value }
    od
}

active proctype ringer() {
    byte value = 1, seen;
    do
    :: value > VALUES -> break
    :: else ->
#ifdef WAKE_BEFORE_STORE
        ring(RINGER, seen);
        store(RINGER, WORD, value);
#else
        store(RINGER, WORD, value);
        ring(RINGER, seen);
#endif
        value++
    od
}

/* Rings for a word that the waiter does not wait for now. */
active proctype stranger() {
    byte seen;
    store(STRANGER, OTHER, 1);
    ring(STRANGER, seen)
}

active proctype waiter() {
    byte wanted = 1, rung, seen;
    do
    :: wanted > VALUES -> break
    :: else ->
#ifndef BELL_AFTER_LOOK
        rung = bell;
#endif
        store(WAITER, SLEEPING, 1);
#ifndef NO_WAITER_FENCE
        fence(WAITER);
#endif
        load(WAITER, WORD, seen); /* the last look */
        if
        :: seen >= wanted -> skip
        :: else ->
#ifdef BELL_AFTER_LOOK
            rung = bell;
#endif
            atomic { /* futex_wait */
                if
                :: bell == rung -> queued = true
                :: else -> skip
                fi
            }
            !queued
        fi;
        store(WAITER, SLEEPING, 0);
        if
        :: seen >= wanted -> wanted++
        :: else -> skip
        fi
    od
}
