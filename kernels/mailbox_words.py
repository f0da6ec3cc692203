"""How messages through memory that two ranks map are written down: words of int64.

Apart from the compiled code, since whoever only lays out memory need not load the compiler.
"""

from __future__ import annotations

from enum import IntEnum

from .records import LINE_BYTES

SLOTS = 256
"""Messages of a box that share one run of slots."""

SLOT_BYTES = 3 * LINE_BYTES
RUN_BYTES = SLOTS * SLOT_BYTES

RUNS = 8192
"""Runs of slots between the oldest and the newest message that may be under way in a box."""

BOX_BYTES = 8 * RUNS
"""A box is a word for each run, modulo RUNS: where the run's slots begin in the sender's memory; 0
before the sender has come to it; -1 - run once it is done with and a later run has its memory."""

ASKED = -(1 << 62)
"""In CONSUMED: the receiver has not got at the bytes, and asks for them."""

GIVEN_UP = ASKED + 1
"""In PRODUCED or CONSUMED: that side has given up a message that the other may have begun with, or
the bytes that it had asked for."""


EXPRESS_WINDOWS, EXPRESS_BYTES = 16, 256 << 10
"""Windows of a box for known messages, and the most bytes of one; memory is taken as it is used."""

EXPRESS_STRIDE = EXPRESS_BYTES + 4096 + LINE_BYTES
"""From one window to the next: their beginnings lie in different sets of a cache."""


class Kind(IntEnum):
    """What lies at a message's place: its bytes, or a note that tells how to come by them.

    PRIVATE: its bytes, in memory that only the sender's own process maps.

    The sender decides. A receiver that hopes for a note takes bytes as well; one that wants bytes,
    and finds a note, or cannot read them, asks for them. They then come as a message of their own:
    see `ANSWERS`.
    """

    BYTES = 0
    NOTE = 1
    PRIVATE = 2


ANSWERS = -1
"""The tag of bytes that were asked for; the ordinal is the note's SEQUENCE."""


class Slot(IntEnum):
    """Words of a slot: two cache lines that the sender writes, and one that the receiver does.

    SEQUENCE: the message's number among all of its box, from 1; written last.
    ORDINAL: its number among those with its tag.
    PLACE: where its bytes, its window of WINDOW bytes, or its note lie in the sender's memory;
    private bytes in its process.
    KIND: of `Kind`. NBYTES are those of the message, also of one that is only noted.
    PRODUCED, CONSUMED: bytes that are there, and that were copied; CONSUMED is -1 - n where the
    receiver refuses the message, since it wants n bytes.
    DONE: SEQUENCE of the last message here that the receiver has finished with. Once it is that of
    every slot of a run, the run's memory serves a later one: sequences in a slot only grow.
    """

    SEQUENCE = 0
    TAG = 1
    ORDINAL = 2
    NBYTES = 3
    PLACE = 4
    WINDOW = 5
    KIND = 6
    PRODUCED = 8
    CONSUMED = 16
    DONE = 17


class Letter(IntEnum):
    """Words of a rank's record of one message.

    SEQUENCE: as in the slot; for a receiver 0 until it has found it.
    BOX: address of the box at the receiver, of the slot at the sender.
    ADDRESS: of the user's bytes.  BASE: where the sender's memory is mapped at the receiver.
    WINDOW_AT: address of the sender's window, 0 where its buffer is read in place.
    PIECE: bytes that it copies at once; WINDOW is a multiple, or as large as the message.
    LOW: address of a word of the receiver's, below which all messages of the box are done.
    FOUND: the bytes that the other side has in mind, where the lengths differ.
    KIND: what is sent, or hoped for.
    READ, PROCESS: address of process_vm_readv, and the sender's process, at the receiver.
    BELL: address of the rank's BellWord record.  PEER_BELL: address of the other's bell,
    0 where it need not be woken.
    """

    STATUS = 0
    LOCK = 1
    SENDS = 2
    BOX = 3
    SEQUENCE = 4
    TAG = 5
    ORDINAL = 6
    NBYTES = 7
    ADDRESS = 8
    PLACE = 9
    WINDOW_AT = 10
    WINDOW = 11
    PIECE = 12
    PUBLISHED = 13
    MOVED = 14
    BASE = 15
    LOW = 16
    FOUND = 17
    YIELD = 18
    SPINS = 19
    YIELDS = 20
    BELL = 21
    PEER_BELL = 22
    KIND = 23
    READ = 24
    PROCESS = 25
    WORDS = 26


class Out(IntEnum):
    """Words of what a sender knows of its slots for one receiver.

    SENT: messages so far.  SLOT: address of the last one's.  SLOTS: of the newest run's.
    WINDOWS: address of the windows for known messages, 0 before there are any.
    TAKEN: which of them the last of these messages took.
    USERS: for each window two words: address of the slot of its last message, and its number.
    """

    SENT = 0
    SLOT = 1
    SLOTS = 2
    WINDOWS = 3
    TAKEN = 4
    USERS = 5
    WORDS = USERS + 2 * EXPRESS_WINDOWS


class Express(IntEnum):
    """Words behind a letter's, in the record of a message that is sent or received again and again.

    OUT: address of the sender's words, see Out.  COUNTER: of the group's counts, see Count.
    TALLY: address of the number of messages like this one: sent to a rank, or received from it.
    RING: address of the rank's ring of operations.  CALLED: what it calls this message.
    """

    OUT = Letter.WORDS
    COUNTER = OUT + 1
    TALLY = COUNTER + 1
    RING = TALLY + 1
    CALLED = RING + 1
    WORDS = CALLED + 1
