/* The send/receive ring of csrc/ring.h: publishing, releasing in batches, the cached tail, wrap.
 *
 * The producer sends MESSAGES positions; each uses its line, and a piece of the data area or not, as chance will. The
 * consumer checks that it reads what was published for that position, line and piece, and a producer or consumer that
 * can never go on is an invalid end state: a stranded ring.
 *
 * Memory is weaker than that of x86: the producer's stores wait in a pool and reach memory in any order, except that
 * stores to one word keep theirs, and a release store waits for all that are older. Loads happen in program order
 * (acquire), and the consumer's store of its tail after its loads (release).
 *
 * All pieces are one cell, a quarter of the area at most, so that nothing is passed over at its end: pieces of other
 * lengths are in pieces.pml, where memory is in order.
 *
 * Bounds: LINES, LIMIT cells, MESSAGES. Positions are counted modulo 2 * LINES and cells modulo 2 * LIMIT, so that head,
 * tail, sequences and counts of data wrap several times.
 * Mutants (all must fail): TAIL_BEFORE_COPY, SEQUENCE_RELAXED, SEQUENCE_UNCHECKED, CAPACITY_TOO_LARGE, DATA_UNCOUNTED
 * (room is a matter of lines only), HAND_BACK_IGNORED (the consumer releases by halves of the lines only),
 * RELEASE_TOO_LATE (it keeps back more than it may).
 */
#ifndef LINES
#define LINES 4
#endif
#ifndef LIMIT
#define LIMIT 4
#endif
#ifndef MESSAGES
#define MESSAGES 10
#endif
#define POSITIONS (2 * LINES)
#define COUNTS (2 * LIMIT)

/* words of memory */
#define SEQUENCE(position) ((position) % LINES)
#define CONTENT(position) (LINES + (position) % LINES)
#define CELL(place) (2 * LINES + (place))
#define WORDS (2 * LINES + LIMIT)

/* A cell holds the number of its message + 1. The content of a line holds that, too, and where the piece is. */
#define NUMBER(content) ((content) % 32)
#define PLACE(content) ((content) / 32 % 16)
#define PIECE 512
#define HAND_BACK 1024

short memory[WORDS];
byte tail_word; /* the consumer's one store */

/* The producer's stores that are not in memory yet, oldest first. */
#define POOL 3
byte pool_word[POOL], pooled;
short pool_value[POOL];
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

#define DISTANCE(from, to, modulus) (((to) + (modulus) - (from)) % (modulus))
#define UNRELEASED DISTANCE(cached_tail, head, POSITIONS)
#ifdef CAPACITY_TOO_LARGE
#define HAS_LINE (UNRELEASED <= LINES)
#else
#define HAS_LINE (UNRELEASED < LINES)
#endif
#ifdef DATA_UNCOUNTED
#define HAS_PIECE true
#else
#define HAS_PIECE (DISTANCE(data_tail, taken + 1, COUNTS) <= LIMIT)
#endif

active proctype producer() {
    byte sent, head, cached_tail, offset, place, taken, data_tail, asked;
    byte ends[LINES];
    short content;
    bool with_piece;
    do
    :: sent == MESSAGES -> break
    :: else ->
        if
        :: with_piece = false
        :: with_piece = true
        fi;
        /* has_line or has_piece, again and again; the tail is read only when the cached one leaves no room */
        do
        :: HAS_LINE && (!with_piece || HAS_PIECE) -> break
        :: else -> atomic {
            tail_word != cached_tail ->
            cached_tail = tail_word;
            data_tail = ends[(cached_tail + LINES - 1) % LINES]
        }
        od;
        content = sent + 1;
        if
        :: with_piece -> atomic {
            place = (offset == LIMIT -> 0 : offset);
            taken = (taken + 1) % COUNTS;
            offset = place + 1;
            content = content + PIECE + place * 32;
            if
            :: DISTANCE(asked, taken, COUNTS) * 4 >= LIMIT -> content = content + HAND_BACK; asked = taken
            :: else -> skip
            fi
        };
            store(CELL(place), sent + 1, false)
        :: else -> skip
        fi;
        store(CONTENT(head), content, false);
        ends[head % LINES] = taken;
#ifdef SEQUENCE_RELAXED
        store(SEQUENCE(head), (head + 1) % POSITIONS, false);
#else
        store(SEQUENCE(head), (head + 1) % POSITIONS, true);
#endif
        atomic {
            head = (head + 1) % POSITIONS;
            sent++;
            content = 0;
            place = 0
        }
    od
}

#define KEPT_BACK DISTANCE(released, tail, POSITIONS)
#ifdef RELEASE_TOO_LATE
#define RELEASE_DUE (KEPT_BACK > LINES)
#elif defined(HAND_BACK_IGNORED)
#define RELEASE_DUE (KEPT_BACK * 2 >= LINES)
#else
#define RELEASE_DUE (content >= HAND_BACK || KEPT_BACK * 2 >= LINES)
#endif

active proctype consumer() {
    byte got, tail, released;
    short content;
    do
    :: got == MESSAGES -> break
    :: else ->
#ifndef SEQUENCE_UNCHECKED
        memory[SEQUENCE(tail)] == (tail + 1) % POSITIONS; /* peek */
#else
        memory[SEQUENCE(tail)] != 0;
#endif
#ifdef TAIL_BEFORE_COPY
        tail_word = (tail + 1) % POSITIONS;
#endif
        content = memory[CONTENT(tail)];
        assert(NUMBER(content) == got + 1);
        if
        :: content >= PIECE -> assert(memory[CELL(PLACE(content))] == got + 1)
        :: else -> skip
        fi;
        atomic {
            tail = (tail + 1) % POSITIONS;
            got++
        }
        if
        :: RELEASE_DUE -> tail_word = tail; released = tail
        :: else -> skip
        fi;
        content = 0
    od
}
