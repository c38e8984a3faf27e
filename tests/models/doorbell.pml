/* The doorbell: does a waiter ever sleep although what it waits for has happened?
 *
 * A ringer stores the word and rings; the waiter arms its doorbell, looks once more, and sleeps. The sleep has no time
 * limit here: in the library a lost wake-up costs a slice of 100 ms, in the model it is a deadlock, which spin reports
 * as an invalid end state.
 *
 * Memory is that of x86 (total store order): every process puts its stores into a first-in first-out buffer of its
 * own, reads its own newest store, and the buffer drains to memory at any time. A sequentially consistent fence and
 * an atomic read-modify-write wait until it is empty. The kernel compares the bell and queues the sleeper in one step.
 *
 * Who fences: with SLEEPER_MEMBARRIER=1 the waiter calls membarrier, which makes every registered process fence at some
 * moment during the call; with 0 it fences for itself and says FENCE_YOURSELF from the start. With RINGER_MEMBARRIER=1
 * the ringers are registered and leave out their own fence unless they read that word. Both 0 is the classic doorbell,
 * where each side has a fence. With REFUSED_LATER=1 membarrier works until it is refused to the waiter, at any time: from
 * then on the waiter says FENCE_YOURSELF, and once, for ringers that have left out their fence and looked before it said
 * so, it naps, so long that every store made before the nap is in memory after it.
 *
 * Bounds: VALUES rounds by one ringer of the waited word, and one ring by another process for something else.
 * Mutants (all must fail): NO_WAITER_FENCE, NO_RINGER_FENCE, UNREGISTERED_RINGER, BELL_AFTER_LOOK, BELL_UNCHANGED,
 * WAKE_BEFORE_STORE, NO_NAP (with REFUSED_LATER=1).
 */
#ifndef VALUES
#define VALUES 3
#endif

#ifndef SLEEPER_MEMBARRIER
#define SLEEPER_MEMBARRIER 1
#endif
#ifndef RINGER_MEMBARRIER
#define RINGER_MEMBARRIER 1
#endif
#ifndef REFUSED_LATER
#define REFUSED_LATER 0
#endif

/* values of the word SLEEPING */
#define ASLEEP 1
#define FENCE_YOURSELF 2
#if SLEEPER_MEMBARRIER
#define AWAKE 0
#else
#define AWAKE FENCE_YOURSELF
#endif

#define WORD 0
#define SLEEPING 1
#define OTHER 2
#define MARK 3 /* ends a nap when it comes out of a buffer */
#define WORDS 4

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
#if !defined(NO_RINGER_FENCE) && !defined(UNREGISTERED_RINGER) && !RINGER_MEMBARRIER
    fence(actor);
#endif
    load(actor, SLEEPING, seen);
    if
    :: seen == 0 -> skip
    :: else ->
#ifndef NO_RINGER_FENCE
        fence(actor);
#endif
        load(actor, SLEEPING, seen);
        if
        :: (seen & ASLEEP) == 0 -> skip
        :: else ->
#ifndef BELL_UNCHANGED
            atomic { empty(buffers[actor]) -> bell++ };
#endif
            queued = false /* futex_wake */
        fi
    fi
}

/* Every registered process has fenced at some moment between begin and end of the call. */
inline membarrier() {
    fence(WAITER);
#if RINGER_MEMBARRIER && !defined(UNREGISTERED_RINGER)
    fence(RINGER);
    fence(STRANGER);
#endif
}

/* What is in the buffers reaches memory, whatever comes behind it meanwhile. */
inline nap() {
#ifndef NO_NAP
    atomic {
        nfull(buffers[RINGER]) && nfull(buffers[STRANGER]) ->
        buffers[RINGER]!MARK, 0;
        buffers[STRANGER]!MARK, 0
    };
    !buffers[RINGER]??[MARK, _] && !buffers[STRANGER]??[MARK, _]
#else
    skip
#endif
}

init {
    memory[SLEEPING] = AWAKE;
    atomic { run drain(); run ringer(); run stranger(); run waiter() }
}

proctype drain() {
    byte word, value;
end:
    do
    :: atomic { nempty(buffers[WAITER]) -> buffers[WAITER]?word, value; memory[word] = value }
    :: atomic { nempty(buffers[RINGER]) -> buffers[RINGER]?word, value; memory[word] = value }
    :: atomic { nempty(buffers[STRANGER]) -> buffers[STRANGER]?word, value; memory[word] = value }
    od
}

proctype ringer() {
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
proctype stranger() {
    byte seen;
    store(STRANGER, OTHER, 1);
    ring(STRANGER, seen)
}

proctype waiter() {
    byte wanted = 1, rung, seen, awake = AWAKE;
    do
    :: wanted > VALUES -> break
    :: else ->
#ifndef BELL_AFTER_LOOK
        rung = bell;
#endif
        store(WAITER, SLEEPING, awake | ASLEEP);
#if REFUSED_LATER
        if
        :: awake == 0 -> membarrier()
        :: awake == 0 ->
            awake = FENCE_YOURSELF;
            store(WAITER, SLEEPING, awake | ASLEEP);
            fence(WAITER);
            nap()
        :: else -> fence(WAITER)
        fi;
#elif !defined(NO_WAITER_FENCE) && SLEEPER_MEMBARRIER
        membarrier();
#elif !defined(NO_WAITER_FENCE)
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
        store(WAITER, SLEEPING, awake);
        if
        :: seen >= wanted -> wanted++
        :: else -> skip
        fi
    od
}
