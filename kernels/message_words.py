"""How a rank's program over messages is written down for compiled code: words of int64."""

from __future__ import annotations

from enum import IntEnum


class Op(IntEnum):
    """What a row of a program does with `count` elements at `offset`.

    SEND and RECV move them; RECV_REDUCE adds what arrives to them. WIDEN copies a rank's own
    half-width elements into the float32 accumulator, NARROW rounds the accumulator back.
    """

    SEND = 0
    RECV = 1
    RECV_REDUCE = 2
    WIDEN = 3
    NARROW = 4


class Word(IntEnum):
    """Words of the record of one program.

    Addresses are of this process; offsets and counts in rows are in elements.
    ISEND, IRECV, TEST, GET_COUNT: MPI's C functions; COMM and BYTE: handles of its.
    YIELD: address of sched_yield.
    TOTAL: what received elements are added to, TOTAL_BYTES of one of its elements.
    SCRATCH: where they arrive, SLOT_BYTES for each slot.
    ADD, WIDEN, NARROW: functions of `kernels.pieces`, and their divisors as float64 bits.
    SEGMENT: elements of the largest message.  WINDOW: how many slots there are.
    ADDING: how many of them have scratch.  LIMIT: how many may be in flight in this round.
    SLOTS: address of their records.  STATUS_AT: room for an MPI_Status.
    TAG: of this run.
    FIRST, END: rows of the current round.  SEND_ROW, SEND_LOW, RECV_ROW, RECV_LOW: what is next.
    HEAD, TAIL: slots started and finished, over all rounds.
    RING: address of the ring where runs are noted, 0 for none; CALLED: what it calls them.
    SEQUENCE: of the group's collectives.  ENTRY: the number of the run's entry there, 0 for none.
    FLAG: where MPI writes an int.  PIECE: the record of the arithmetic.
    FAILED_PEER, FAILED_CODE, FAILED_WANTED, FAILED_GOT: what ended the program; see Status.
    """

    ISEND = 0
    IRECV = 1
    TEST = 2
    GET_COUNT = 3
    YIELD = 4
    COMM = 5
    BYTE = 6
    ROWS = 7
    NUM_ROWS = 8
    SOURCE = 9
    TARGET = 10
    ITEM_BYTES = 11
    TOTAL = 12
    TOTAL_BYTES = 13
    SCRATCH = 14
    SLOT_BYTES = 15
    ADD = 16
    WIDEN = 17
    NARROW = 18
    BEFORE = 19
    AFTER = 20
    SEGMENT = 21
    WINDOW = 22
    SLOTS = 23
    STATUS_AT = 24
    TAG = 25
    FIRST = 26
    END = 27
    SEND_ROW = 28
    SEND_LOW = 29
    RECV_ROW = 30
    RECV_LOW = 31
    HEAD = 32
    TAIL = 33
    FAILED_PEER = 34
    FAILED_CODE = 35
    FAILED_WANTED = 36
    FAILED_GOT = 37
    ADDING = 38
    LIMIT = 39
    RING = 40
    CALLED = 41
    SEQUENCE = 42
    ENTRY = 43
    FLAG = 44
    PIECE = 45
    WORDS = PIECE + 4


class Slot(IntEnum):
    """Words of one segment's record: one message out and one in, or either.

    SEND, RECV: MPI's request, in the first bytes of the word.
    SENDING, RECEIVING: 1 while MPI holds the buffer.
    ARRIVES, COUNT: address and elements of what comes in.  INTO: where it is added, 0 for nowhere.
    """

    SEND = 0
    RECV = 1
    SENDING = 2
    RECEIVING = 3
    DST = 4
    SRC = 5
    ARRIVES = 6
    COUNT = 7
    INTO = 8
    WORDS = 9


class Status(IntEnum):
    """How far a program is.

    WRONG_SIZE: FAILED_PEER sent FAILED_GOT bytes instead of FAILED_WANTED.
    REFUSED: an MPI function returned FAILED_CODE for a message with FAILED_PEER; FAILED_WANTED
        bytes were expected from it, -1 for a message to it.
    """

    RUNNING = 0
    DONE = 1
    WRONG_SIZE = 2
    REFUSED = 3


PIECE_WORDS = 4
"""target address, incoming address, count of elements, divisor as float64 bits."""
