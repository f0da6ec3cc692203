"""How compiled programs over shared memory are written down: words of int64 records.

Records are how Python tells compiled code what to do without a conversion at every call.
"""

from __future__ import annotations

from enum import IntEnum

FOLD_BLOCK = 1024
"""Elements folded at once where more than two buffers meet: an accumulator stays in cache."""

SCRATCH_BYTES = FOLD_BLOCK * 8


class Row(IntEnum):
    """What a program's row of eight words does.

    MEET: arrive, and go on when every rank has.
    COPY: (target list, index, offset, source list, index, offset, bytes).
    FOLD: the same with a count of elements last; the sources are all entries of their list, the
    target is one entry of its list, all of them with index ALL, or the first two with index PAIR.
    POINT: the same as COPY, but the entry itself becomes the address of the source.
    READ: the same as COPY, from the memory of another process: the index is its rank.
    WRITE: the same as COPY, to the memory of another process.
    PAUSE: go on with another program.
    Offsets are in bytes.
    """

    MEET = 0
    COPY = 1
    FOLD = 2
    POINT = 3
    READ = 4
    WRITE = 5
    PAUSE = 6


ALL = -1
PAIR = -2
ROW_WORDS = 8


class BoardWord(IntEnum):
    """Words of a rank's record of the group it belongs to.

    FLAGS: address of a cache line per rank, its first word the meetings that the rank arrived at.
    NOTES: address of two blocks of NOTE_BYTES per rank, used by turns; see Note.
    BASES: address of a table, where each rank's memory is mapped here.
    TICKET, TURN: works started, and ended; they run one after the other.
    YIELD: address of sched_yield.
    SPINS, YIELDS: how often a waiting rank looks before it yields its core, and then before it
    returns.
    BROKEN: not 0 where a work was given up halfway, or the group is being closed.
    RING: address of the rank's ring of operations.
    COUNTER: address of what the rank counts of the group; see Count.
    BELL: address of the rank's BellWord record.
    BELLS: address of a table of the addresses of all ranks' bells.
    READ, WRITE: addresses of process_vm_readv and process_vm_writev, 0 where the ranks have no
    access to each other's memory.
    PROCESSES: address of a table of all ranks' processes.
    """

    FLAGS = 0
    NOTES = 1
    BASES = 2
    RANK = 3
    SIZE = 4
    ARRIVED = 5
    TICKET = 6
    TURN = 7
    YIELD = 8
    SPINS = 9
    YIELDS = 10
    BROKEN = 11
    RING = 12
    COUNTER = 13
    BELL = 14
    BELLS = 15
    READ = 16
    WRITE = 17
    PROCESSES = 18
    WORDS = 19


class BellWord(IntEnum):
    """Words of a rank's record of how it sleeps and wakes others.

    OWN: address of the rank's own bell, an int64 that is not 0 while a thread sleeps.
    SYSTEM_CALL, FUTEX: address of syscall(2) of the C library, and its number of futex(2).
    SECONDS, NANOSECONDS: that a sleep lasts at most.
    """

    OWN = 0
    SYSTEM_CALL = 1
    FUTEX = 2
    SECONDS = 3
    NANOSECONDS = 4
    WORDS = 5


class Count(IntEnum):
    """Words of what a rank counts of a group.

    COLLECTIVES, MESSAGES: how many it has begun.
    HISTORY: of the collectives by messages since it last came to a board; see `comm.fingerprint`.
    """

    COLLECTIVES = 0
    MESSAGES = 1
    HISTORY = 2
    WORDS = 3


class Note(IntEnum):
    """What a rank tells the others at the first meeting of a work.

    PLACE: where its buffer lies in its memory, or one of the values of Place.
    The words from CALL to HISTORY must be the same on every rank.
    HISTORY: of what it has called by messages since the last meeting.
    ADDRESS: of its buffer, in its own process.
    """

    PLACE = 0
    CALL = 1
    COUNT = 2
    ROOT = 3
    HISTORY = 4
    ADDRESS = 5
    WORDS = 8


class Place(IntEnum):
    """A PLACE that is no offset: a buffer in memory of the rank's own, or none that matters."""

    PRIVATE = -1
    UNUSED = -2


LINE_BYTES = 64
NOTE_BYTES = 8 * Note.WORDS


class Where(IntEnum):
    """The lists of addresses that rows name: an entry per rank, in OWN per buffer.

    EAGER stands for two lists, used by turns. SOURCES and TARGETS are set by rows of the program.
    PEERS are the ranks' buffers as BUFFERS, but where each rank's own process has them.
    """

    BUFFERS = 0
    OWN = 1
    STAGE_0 = 2
    STAGE_1 = 3
    RESULT_0 = 4
    RESULT_1 = 5
    EAGER = 6
    SOURCES = 8
    TARGETS = 9
    PEERS = 10
    LENGTH = 11


class FoldWord(IntEnum):
    """Words of the record of one fold, see `fold.fold_callback`.

    SOURCES: address of a table of source addresses.
    FROM: bytes from each source to the piece.
    TARGETS: address of a table of target addresses; a target may be one of the sources.
    INTO: bytes from each target to the piece.
    COUNT: elements of the piece.
    SCRATCH: address of SCRATCH_BYTES.
    BEFORE, AFTER: divisors of each element before, and of each result after the fold, as float64
    bits; used by the op "mean".
    """

    SOURCES = 0
    NUM_SOURCES = 1
    FROM = 2
    TARGETS = 3
    NUM_TARGETS = 4
    INTO = 5
    COUNT = 6
    SCRATCH = 7
    BEFORE = 8
    AFTER = 9
    WORDS = 10


class WorkWord(IntEnum):
    """Words of the record of one work.

    FOLD: address of the compiled fold, and FOLD_RECORD the FoldWord record that it takes.
    FLYING: not 0 from its start to its end.
    LOCK: not 0 while a thread goes on with it.
    CALLED: what the ring of operations calls it.
    ENTRY: the number of its entry there.
    """

    BOARD = 0
    STATUS = 1
    TICKET = 2
    ROW = 3
    ARRIVED_AT = 4
    NOTED = 5
    ROWS = 6
    NUM_ROWS = 7
    LISTS = 8
    LIST_BYTES = 9
    FOLD = 10
    FOLD_RECORD = 11
    NOTE = FOLD_RECORD + FoldWord.WORDS
    WAITING_FOR = NOTE + Note.WORDS
    FLYING = WAITING_FOR + 1
    LOCK = FLYING + 1
    CALLED = LOCK + 1
    ENTRY = CALLED + 1
    WORDS = ENTRY + 1


class Status(IntEnum):
    """How far a work is.

    MISMATCH: the ranks' calls differ; it has ended, on every rank.
    OTHERWISE: it must go on with another program: some ranks' buffers are shared and others
    private, as every rank sees, or a PAUSE has come.
    REFUSED: it was not started, as the board is broken, or this very work still runs.
    NOTE: of a message, the receiver has found a note, and has not finished with the message.
    BYTES: of a message, whoever hoped to do with a note has to do with bytes.
    """

    RUNNING = 0
    DONE = 1
    MISMATCH = 2
    OTHERWISE = 3
    REFUSED = 4
    NOTE = 5
    BYTES = 6


RING_ENTRIES = 256
"""Operations that a ring keeps; a power of two."""

RING_CALLS = 1024
"""Different calls that entries of a ring can refer to."""


class RingWord(IntEnum):
    """Words at the head of a rank's ring of operations; the entries follow.

    NEXT: operations begun so far.
    CLOCK, STARTS, ENDS: address of clock_gettime, and the clocks that it is asked for when an
        operation starts and ends.
    """

    NEXT = 0
    CLOCK = 1
    STARTS = 2
    ENDS = 3
    WORDS = 8


class EntryWord(IntEnum):
    """Words of one operation in the ring.

    NUMBER: of the rank's operations, from 1; entry n lies at n modulo RING_ENTRIES.
    CALL: the number of its call in the table beside the ring.
    SEQUENCE: of the group's collectives, from 1.
    START, END: nanoseconds.  OUTCOME: see Outcome.
    """

    NUMBER = 0
    CALL = 1
    SEQUENCE = 2
    START = 3
    END = 4
    OUTCOME = 5
    WORDS = 8


RING_BYTES = 8 * (RingWord.WORDS + RING_ENTRIES * EntryWord.WORDS)


class Outcome(IntEnum):
    """How an operation ended; FAILED also where it was given up."""

    RUNNING = 0
    DONE = 1
    FAILED = 2
