/* The data area of the send/receive ring, divided into pieces of any length (csrc/ring.h, "Dividing the data").
 *
 * Two questions. Does a piece ever overlap one that is not copied out yet: the consumer checks each cell that it reads.
 * And is the producer ever stranded, waiting for room although all is consumed: an invalid end state.
 *
 * Each position has no piece or one of 1 to LIMIT / 4 cells, as chance will. A cell stands for a line of 64 bytes. Stores
 * happen in program order here: what release and acquire are needed for is checked in ring.pml.
 *
 * Bounds: LINES, LIMIT cells, MESSAGES positions. Counts of cells do not wrap.
 * Mutants (all must fail): HALVES (pieces and the distance of hand-backs are up to half the area), HAND_BACK_NEVER,
 * PASSED_OVER_UNCOUNTED (the cells left at the end of the area), TAIL_BEFORE_COPY, ENDS_OF_NEXT (data is free up to the
 * end of the position that is not consumed yet).
 */
#ifndef LINES
#define LINES 4
#endif
#ifndef LIMIT
#define LIMIT 8
#endif
#ifndef MESSAGES
#define MESSAGES 9
#endif
#ifdef HALVES
#define LONGEST (LIMIT / 2)
#else
#define LONGEST (LIMIT / 4)
#endif

byte cells[LIMIT];
byte sequence[LINES], piece[LINES], cells_of[LINES];
bool hand_back[LINES];
byte tail_word;

#define PASSED_OVER(n) ((n) > LIMIT - offset -> LIMIT - offset : 0)
#ifdef PASSED_OVER_UNCOUNTED
#define END_OF(n) (taken + (n))
#else
#define END_OF(n) (taken + PASSED_OVER(n) + (n))
#endif
#define FITS(n) (head - cached_tail < LINES && ((n) == 0 || END_OF(n) - data_tail <= LIMIT))
#ifdef ENDS_OF_NEXT
#define LAST_END ends[cached_tail % LINES]
#else
#define LAST_END ends[(cached_tail + LINES - 1) % LINES]
#endif

active proctype producer() {
    byte head, cached_tail, offset, taken, data_tail, asked, n, i, at;
    byte ends[LINES];
    do
    :: head == MESSAGES -> break
    :: else ->
        select(n : 0 .. LONGEST);
        do
        :: FITS(n) -> break
        :: else -> atomic { tail_word != cached_tail -> cached_tail = tail_word; data_tail = LAST_END }
        od;
        if
        :: n > 0 ->
            at = (n > LIMIT - offset -> 0 : offset);
            taken = END_OF(n);
            offset = at + n;
            atomic {
                i = 0;
                do
                :: i < n -> cells[at + i] = head + 1; i++
                :: else -> break
                od
            }
        :: else -> skip
        fi;
        atomic {
            piece[head % LINES] = at;
            cells_of[head % LINES] = n;
#ifdef HAND_BACK_NEVER
            hand_back[head % LINES] = false;
#elif defined(HALVES)
            hand_back[head % LINES] = n > 0 && (taken - asked) * 2 >= LIMIT;
#else
            hand_back[head % LINES] = n > 0 && (taken - asked) * 4 >= LIMIT;
#endif
            if
            :: hand_back[head % LINES] -> asked = taken
            :: else -> skip
            fi;
            ends[head % LINES] = taken;
            at = 0; i = 0; n = 0
        }
        sequence[head % LINES] = head + 1;
        head++
    od
}

active proctype consumer() {
    byte tail, released, i;
    bool asked_back;
    do
    :: tail == MESSAGES -> break
    :: else ->
        sequence[tail % LINES] == tail + 1;
#ifdef TAIL_BEFORE_COPY
        tail_word = tail + 1;
#endif
        atomic {
            i = 0;
            do
            :: i < cells_of[tail % LINES] -> assert(cells[piece[tail % LINES] + i] == tail + 1); i++
            :: else -> break
            od;
            i = 0;
            asked_back = hand_back[tail % LINES]
        }
        tail++;
        if
        :: asked_back || (tail - released) * 2 >= LINES -> tail_word = tail; released = tail
        :: else -> skip
        fi
    od
}
