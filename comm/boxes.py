"""The boxes through which a rank exchanges messages with others of its node, and what is put there.

Sender and receiver each describe a message in a record of words. They are filled in here, and
compiled code goes on with them, see `kernels.mailbox`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ..kernels.mailbox_words import BOX_BYTES, EXPRESS_BYTES, Express, Kind, Letter, Slot
from .buffer import address_of
from .cma import access
from .express import Record
from .lending import SendPool
from .letters import Message, Words
from .memory import Block, Returned
from .node_memory import NodeMemory, yielding
from .outbox import Outbox

if TYPE_CHECKING:
    from ..kernels.compiled import Kernel
    from .communicator import Communicator

BUFFERED_BYTES = 8 << 20
"""Messages up to here are copied at once, so that their sender can go on. Nobody is woken for them,
which would cost more than the copy: the receiver takes them when it waits or looks."""

IN_PLACE_BYTES = 1 << 20
"""Above, registered memory is read where it is, and its sender goes on when it has been."""

WINDOW_BYTES = 1 << 19
PIECE_BYTES = 1 << 17
"""Larger private messages pass through a window, piece by piece, where no rank may read another's
process."""

NOTE_BYTES = 512
"""Room for a note of where a message's bytes lie, and for the receiver's reply."""

_SENDS, _BOX, _SEQUENCE, _TAG = map(int, (Letter.SENDS, Letter.BOX, Letter.SEQUENCE, Letter.TAG))
_ORDINAL, _NBYTES, _ADDRESS = map(int, (Letter.ORDINAL, Letter.NBYTES, Letter.ADDRESS))
_PLACE, _KIND, _PEER_BELL = map(int, (Letter.PLACE, Letter.KIND, Letter.PEER_BELL))
_WINDOW_AT, _WINDOW, _PIECE = map(int, (Letter.WINDOW_AT, Letter.WINDOW, Letter.PIECE))
_MOVED = int(Letter.MOVED)
_BASE, _LOW, _PROCESS = int(Letter.BASE), int(Letter.LOW), int(Letter.PROCESS)
_S_DONE = 8 * Slot.DONE


class Bytes(NamedTuple):
    """A message's bytes on this side; address 0 where they lie elsewhere.

    keeps: what must stay alive until the message has ended.
    """

    address: int
    nbytes: int
    keeps: object


class There(NamedTuple):
    """Where the receiver reads a message's bytes itself: see `Kind`."""

    kind: int
    place: int


@dataclass
class Box:
    """The messages of one ordered pair of ranks, as one of them sees it.

    address: of the words that tell where slots lie.  base: where the sender's memory begins, in
        this process.
    bell: address of the other side's bell.
    process: the other side's, 0 where the ranks have no access to each other's own memory.
    low: a word below which a receiver has finished with every message; low_at: its address.
    """

    address: int
    base: int
    bell: int
    process: int

    def __post_init__(self) -> None:
        self.low = np.ones(1, np.int64)
        self.low_at = address_of(self.low)


class Boxes:
    """The boxes between this rank and those of its group that share its memory."""

    def __init__(
        self, rank: int, members: npt.NDArray[np.int64], nodes: NodeMemory, block: Block
    ) -> None:
        """members: a row per rank: (node token, node rank, offset of its boxes)."""
        assert nodes.memory is not None
        self.rank = rank
        self.num_neighbours = len(nodes.addresses)
        self._memory = nodes.memory
        self._nodes = nodes
        self._block = block
        self._pool = SendPool(nodes.memory)
        self._inboxes: dict[int, Box] = {}
        self._outboxes: dict[int, Box] = {}
        self._slots: dict[int, Outbox] = {}
        own_base = nodes.addresses[nodes.rank]
        for peer, (token, node_rank, offset) in enumerate(members.tolist()):
            if token == nodes.token:
                base = nodes.addresses[node_rank]
                slots = base + offset + rank * BOX_BYTES
                bell = nodes.bell_of(node_rank)
                process = 0 if nodes.processes is None else int(nodes.processes[node_rank])
                self._inboxes[peer] = Box(slots, base, bell, process)
                slots = own_base + block.offset + peer * BOX_BYTES
                self._outboxes[peer] = Box(slots, own_base, bell, process)
                self._slots[peer] = Outbox(slots, nodes.memory)
        self._blank = np.zeros(Letter.WORDS, np.int64)
        self._blank[Letter.YIELD], self._blank[Letter.BELL] = yielding(), address_of(nodes.bell)
        self._blank[Letter.READ] = access()[0]

    @classmethod
    def open(cls, comm: Communicator, nodes: NodeMemory) -> Boxes | None:
        """Open the boxes of a group; collective. None where this rank shares no memory."""
        row = np.zeros(3, np.int64)
        block = None
        if nodes.token and nodes.memory is not None:
            block = nodes.memory.allocate(comm.size * BOX_BYTES)
            row[:] = nodes.token, nodes.rank, block.offset
        members = comm.allgather(row)
        return None if block is None else cls(comm.rank, members, nodes, block)

    def __contains__(self, peer: int) -> bool:
        return peer in self._inboxes

    def close(self) -> None:
        """Give the memory back, which no rank of the group may use any more."""
        self._pool.forget()
        for slots in self._slots.values():
            slots.close()
        self._memory.release(self._block)

    def where(self, bytes_: Bytes, dst: int) -> tuple[There | None, str]:
        """Tell where a receiver is to read bytes itself, None where they are copied, and why."""
        place = self._memory.place(bytes_.address, bytes_.nbytes)
        if place is not None and bytes_.nbytes > IN_PLACE_BYTES:
            return There(Kind.BYTES, place), "the receiver reads the buffer"
        if bytes_.nbytes <= BUFFERED_BYTES:
            return None, "copied for the receiver"
        if self._outboxes[dst].process:
            return There(Kind.PRIVATE, bytes_.address), "the receiver reads it in this process"
        return None, "passes through shared memory"

    def note(self) -> npt.NDArray[np.uint8]:
        """Return memory for notes, which both sides of a message can write."""
        return self._memory.lend(NOTE_BYTES)

    def keep(self, message: Message) -> None:
        """Keep a note, to which its receiver may still write; bytes in place it refuses to read."""
        if message.is_note:
            self._memory.keep([(message.returned, message)])

    def take_back(self, dst: int) -> None:
        """Uncount the last message to a rank, unless that may have seen it."""
        self._slots[dst].take_back()

    def given_up(self, dst: int, number: int) -> bool:
        """Tell whether a rank has given a message up, whose bytes it may have asked for."""
        return self._slots[dst].given_up(number)

    # -- records of messages -----------------------------------------------------------------

    def incoming(self, bytes_: Bytes, src: int, tag: int, ordinal: int) -> Message:
        """Return a message to be received."""
        box = self._inboxes[src]
        words = self._words(box, False, tag, bytes_, ordinal)
        words[_BASE], words[_LOW], words[_PROCESS] = box.base, box.low_at, box.process
        return self._message(words, src, tag, (bytes_, box))

    def outgoing_note(
        self, note: npt.NDArray[np.uint8], nbytes: int, dst: int, tag: int, ordinal: int
    ) -> Message:
        """Return a note of nbytes that lie elsewhere, to be sent."""
        words, box = self._addressed(Bytes(0, nbytes, note), dst, tag, ordinal)
        words[_KIND], words[_PLACE] = Kind.NOTE, address_of(note) - box.base
        words[_PEER_BELL] = box.bell
        return self._message(words, dst, tag, note)

    def outgoing(
        self, bytes_: Bytes, dst: int, tag: int, there: There | None, ordinal: int
    ) -> Message:
        """Return a message to be sent; where its bytes are not read there, it takes a window."""
        words, box = self._addressed(bytes_, dst, tag, ordinal)
        slots, nbytes = self._slots[dst], bytes_.nbytes
        if there is not None:
            words[_KIND], words[_PLACE], words[_WINDOW] = *there, nbytes
            return self._message(words, dst, tag, bytes_)
        at_once = nbytes <= BUFFERED_BYTES and not self._pool.full
        if at_once:
            words[_PEER_BELL] = 0
        room = nbytes if at_once else min(nbytes, WINDOW_BYTES)
        if not at_once and nbytes <= WINDOW_BYTES:
            room = min(PIECE_BYTES, nbytes)
        window = self._pool.take(room)
        address = address_of(window)
        words[_PLACE], words[_WINDOW] = address - box.base, max(room, 1)
        if room == nbytes and slots.far_ahead:
            # As if the receiver read it in place: it can, and the sender waits until it has.
            ctypes.memmove(address, bytes_.address, nbytes)
            words[_MOVED] = nbytes
        else:
            words[_WINDOW_AT], words[_PIECE] = address, min(PIECE_BYTES, max(room, 1))
        self._pool.lend(window, _returned(slots))
        return self._message(words, dst, tag, (bytes_, window))

    def express(self, bytes_: Bytes, peer: int, sends: bool) -> Record | None:
        """Return an Express record for messages like this one, None of larger ones."""
        if bytes_.nbytes > EXPRESS_BYTES:
            return None
        box = (self._outboxes if sends else self._inboxes)[peer]
        words = np.zeros(Express.WORDS, np.int64)
        words[: Letter.WORDS] = self._words(box, sends, 0, bytes_, 0)
        words[_BASE], words[_LOW] = box.base, box.low_at
        if sends:
            self._slots[peer].open_windows()
            words[Express.OUT] = self._slots[peer].address
        return words

    def _addressed(self, bytes_: Bytes, dst: int, tag: int, ordinal: int) -> tuple[Words, Box]:
        box, slots = self._outboxes[dst], self._slots[dst]
        slots.take()
        words = self._words(box, True, tag, bytes_, ordinal)
        words[_BOX], words[_SEQUENCE] = slots.slot, slots.sent
        return words, box

    def _words(self, box: Box, sends: bool, tag: int, bytes_: Bytes, ordinal: int) -> Words:
        words = self._blank.copy().data
        words[_SENDS], words[_BOX] = sends, box.address
        words[_TAG] = tag
        words[_ORDINAL] = ordinal
        words[_NBYTES], words[_ADDRESS] = bytes_.nbytes, bytes_.address
        if bytes_.nbytes > IN_PLACE_BYTES:
            words[_PEER_BELL] = box.bell
        return words

    def _message(self, words: Words, peer: int, tag: int, keeps: object) -> Message:
        """Return a message; the background may still look at it after its group has closed."""
        return Message(words, self.rank, peer, tag, (keeps, self._nodes), self._advance)

    @cached_property
    def _advance(self) -> Kernel:
        from ..kernels.mailbox import advance_letter_kernel

        return advance_letter_kernel()


def _returned(slots: Outbox) -> Returned:
    sequence, done = slots.sent, ctypes.c_int64.from_address(slots.slot + _S_DONE)
    return lambda: done.value >= sequence
