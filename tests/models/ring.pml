/* The send/receive ring of csrc/ring.h: publish, batched release, cached tail, lines and blocks, wrap.
 *
 * The producer sends MESSAGES positions; each uses its line, and its block too or not, as chance will. The consumer
 * checks that it reads what was published for that position, word by word, and a producer or consumer that can never
 * go on is an invalid end state: a stranded ring.
 *
 * Memory is weaker than that of x86: a process's stores wait in a pool and reach memory in any order, except that
 * stores to one word keep theirs, and a release store waits for all that are older. Loads happen in program order
 * (acquire).
 *
 * Bounds: positions are counted modulo POSITIONS = 2 * LINES, so that head, tail and sequences wrap several times.
 * Mutants (all must fail): TAIL_BEFORE_COPY, SEQUENCE_RELAXED, SEQUENCE_UNCHECKED, CAPACITY_TOO_LARGE,
 * BLOCKS_AS_MANY_AS_LINES, BATCH_TOO_LATE.
 */
#ifndef LINES
#define LINES 4
#endif
#ifndef BLOCKS
#define BLOCKS 2
#endif
#ifndef MESSAGES
#define MESSAGES 10
#endif
#define POSITIONS (2 * LINES)

/* words of memory */
#define SEQUENCE(position) ((position) % LINES)
#define CONTENT(position) (LINES + (position) % LINES)
#define BLOCK(position) (2 * LINES + (position) % BLOCKS)
#define TAIL (2 * LINES + BLOCKS)
#define WORDS (TAIL + 1)

/* A message's content and block hold its number + 1; content says besides whether there is a block. */
#define PLAIN 32

byte memory[WORDS];

/* The producer's stores that are not in memory yet, oldest first. The consumer stores only its tail. */
#define POOL 3
byte pool_word[POOL], pool_value[POOL], pooled;
bool pool_release[POOL];

inline store(word, value, release) {
    atomic {
        pooled < POOL ->
        pool_word[pooled] = word;
        pool_value[pooled] = value;
        pool_release[pooled] = release;
        pooled++
    }
}

/* Entry 1 or 2 may go before entry 0 unless it is a release store or of the same word as an older one. */
#define OVERTAKES_1 (pooled > 1 && !pool_release[1] && pool_word[1] != pool_word[0])
#define OVERTAKES_2 (pooled > 2 && !pool_release[2] && pool_word[2] != pool_word[0] && pool_word[2] != pool_word[1])

inline close_up(from) {
    i = from;
    do
    :: i + 1 < pooled ->
        pool_word[i] = pool_word[i + 1];
        pool_value[i] = pool_value[i + 1];
        pool_release[i] = pool_release[i + 1];
        i++
    :: else -> break
    od;
    pooled--;
    pool_word[pooled] = 0;
    pool_value[pooled] = 0;
    pool_release[pooled] = false;
    i = 0
}

active proctype drain() {
    byte i;
end:
    do
    :: atomic { pooled > 0 -> memory[pool_word[0]] = pool_value[0]; close_up(0) }
    :: atomic { OVERTAKES_1 -> memory[pool_word[1]] = pool_value[1]; close_up(1) }
    :: atomic { OVERTAKES_2 -> memory[pool_word[2]] = pool_value[2]; close_up(2) }
    od
}

#define DISTANCE(head, tail) (((head) + POSITIONS - (tail)) % POSITIONS)

#ifdef CAPACITY_TOO_LARGE
#define HAS_ROOM(capacity) (DISTANCE(head, cached_tail) <= (capacity))
#else
#define HAS_ROOM(capacity) (DISTANCE(head, cached_tail) < (capacity))
#endif
#ifdef BLOCKS_AS_MANY_AS_LINES
#define BLOCK_CAPACITY LINES
#else
#define BLOCK_CAPACITY BLOCKS
#endif

active proctype producer() {
    byte sent = 0, head = 0, cached_tail = 0, capacity;
    bool with_block;
    do
    :: sent == MESSAGES -> break
    :: else ->
        if
        :: with_block = false; capacity = LINES
        :: with_block = true; capacity = BLOCK_CAPACITY
        fi;
        /* has_room, again and again; the tail is looked up only when the cached one leaves no room */
        do
        :: HAS_ROOM(capacity) -> break
        :: else -> atomic { memory[TAIL] != cached_tail -> cached_tail = memory[TAIL] }
        od;
        if
        :: with_block -> store(BLOCK(head), sent + 1, false)
        :: else -> skip
        fi;
        store(CONTENT(head), sent + 1 + (with_block -> 0 : PLAIN), false);
#ifdef SEQUENCE_RELAXED
        store(SEQUENCE(head), (head + 1) % POSITIONS, false);
#else
        store(SEQUENCE(head), (head + 1) % POSITIONS, true);
#endif
        head = (head + 1) % POSITIONS;
        sent++
    od
}

#ifdef BATCH_TOO_LATE
#define RELEASE_DUE (DISTANCE(tail, released) > BLOCKS)
#else
#define RELEASE_DUE (DISTANCE(tail, released) * 2 >= BLOCKS)
#endif

active proctype consumer() {
    byte got = 0, tail = 0, released = 0, content, payload;
    do
    :: got == MESSAGES -> break
    :: else ->
#ifndef SEQUENCE_UNCHECKED
        memory[SEQUENCE(tail)] == (tail + 1) % POSITIONS; /* peek */
#else
        memory[SEQUENCE(tail)] != 0;
#endif
#ifdef TAIL_BEFORE_COPY
        memory[TAIL] = (tail + 1) % POSITIONS;
#endif
        content = memory[CONTENT(tail)];
        payload = memory[BLOCK(tail)];
        assert(content % PLAIN == got + 1);
        assert(content >= PLAIN || payload == got + 1);
        content = 0;
        payload = 0;
        tail = (tail + 1) % POSITIONS;
        got++;
        if
        :: RELEASE_DUE -> memory[TAIL] = tail; released = tail
        :: else -> skip
        fi
    od
}
