"""Messages between ranks of one node, through memory that they map of each other."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..kernels.mailbox_words import ANSWERS, BOX_BYTES, Kind, Letter, Slot
from ..kernels.records import Status
from .buffer import Buffer, address_of
from .cma import access
from .lending import Pool
from .letters import Message, Words
from .memory import Block, Returned
from .node_memory import NodeMemory, patience, yielding
from .ordinals import Ordinals
from .outbox import Outbox
from .posts import Torn
from .trace import Signature
from .transport.base import Request
from .work import Prepared, Receipt, Steps

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
_PROCESS = int(Letter.PROCESS)
_WINDOW_AT, _WINDOW, _PIECE = map(int, (Letter.WINDOW_AT, Letter.WINDOW, Letter.PIECE))
_BASE, _LOW, _S_DONE = int(Letter.BASE), int(Letter.LOW), 8 * Slot.DONE


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


class Mailboxes:
    """Send and receive between this rank and those of its group that share its memory."""

    def __init__(
        self, rank: int, members: npt.NDArray[np.int64], nodes: NodeMemory, block: Block
    ) -> None:
        """members: a row per rank: (node token, node rank, offset of its boxes)."""
        assert nodes.memory is not None
        self.rank = rank
        self._memory = nodes.memory
        self._nodes = nodes
        self._block = block
        self._pool = Pool(nodes.memory)
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
        self._bell = nodes.bell
        self._ordinals: defaultdict[tuple[bool, int], Ordinals] = defaultdict(Ordinals)
        self._torn = Torn(rank)
        self._blank = np.zeros(Letter.WORDS, np.int64)
        self._blank[Letter.YIELD], self._blank[Letter.BELL] = yielding(), address_of(nodes.bell)
        self._blank[Letter.READ] = access()[0]
        self._patience = patience(len(nodes.addresses))

    @classmethod
    def open(cls, comm: Communicator, nodes: NodeMemory) -> Mailboxes | None:
        """Open the boxes of a group; collective. None where this rank shares no memory."""
        row = np.zeros(3, np.int64)
        block = None
        if nodes.token and nodes.memory is not None:
            block = nodes.memory.allocate(comm.size * BOX_BYTES)
            row[:] = nodes.token, nodes.rank, block.offset
        members = comm.allgather(row)
        return None if block is None else cls(comm.rank, members, nodes, block)

    def reaches(self, peer: int) -> bool:
        """Tell whether this rank and the peer share memory; both see it alike."""
        return peer in self._inboxes

    def close(self) -> None:
        """Give the memory back, which no rank of the group may use any more."""
        self._pool.forget()
        for slots in self._slots.values():
            slots.close()
        self._memory.release(self._block)

    def send(self, buffer: Buffer, dst: int, tag: int) -> Prepared:
        """Prepare a message to a rank that this one reaches."""
        address, nbytes = address_of(buffer.flat), buffer.flat.nbytes
        place = None if buffer.staged else self._memory.place(address, nbytes)
        there: _There | None = None
        if place is not None and nbytes > IN_PLACE_BYTES:
            there, reason = _There(Kind.BYTES, place), "the receiver reads the buffer"
        elif nbytes <= BUFFERED_BYTES:
            reason = "copied for the receiver"
        elif self._outboxes[dst].process:
            there, reason = _There(Kind.PRIVATE, address), "the receiver reads it in this process"
        else:
            reason = "passes through shared memory"

        def carry(keeps: Any, tag: int) -> Steps:
            bytes_ = _Bytes(address, nbytes, keeps)
            post = partial(self._post, bytes_, dst, tag, there)
            asked = yield from self._deliver(post, dst, tag)
            if asked:
                yield from self._answer(bytes_, dst, asked)
            return keeps

        def run(_: int) -> Steps:
            buffer.stage()
            yield from carry(buffer, tag)
            return buffer.owner

        receipt = Receipt("send", "message", "shared", 1, nbytes, reason)
        signature, again = _signature("send", buffer, dst), None if buffer.staged else carry
        return Prepared(receipt, None, run, signature, carry=again)

    def recv(self, buffer: Buffer, src: int, tag: int) -> Prepared:
        """Prepare to receive a message from a rank that this one reaches."""
        nbytes, address = buffer.flat.nbytes, address_of(buffer.flat)

        def carry(keeps: Any, tag: int) -> Steps:
            yield from self._accept(_Bytes(address, nbytes, keeps), src, tag)
            return keeps

        def run(_: int) -> Steps:
            buffer.stage()
            yield from carry(buffer, tag)
            buffer.commit()
            return buffer.owner

        receipt = Receipt("recv", "message", "shared", 1, nbytes)
        large = nbytes > IN_PLACE_BYTES
        signature, again = _signature("recv", buffer, src), None if buffer.staged else carry
        return Prepared(receipt, None, run, signature, background=large, carry=again)

    # -- messages whose bytes lie elsewhere ---------------------------------------------------

    def note(self) -> npt.NDArray[np.uint8]:
        """Return memory for notes, which both sides of a message can write."""
        return self._memory.lend(NOTE_BYTES)

    def send_note(
        self, note: npt.NDArray[np.uint8], nbytes: int, dst: int, tag: int
    ) -> Generator[list[Request], bool | None, int]:
        """Send what tells how to come by nbytes; end when the receiver has done with it.

        Nothing else may be written to the note meanwhile. Returns: 0, or what to answer with the
        bytes themselves, which the receiver asks for.
        """

        def post(ordinal: int) -> Message:
            words, box = self._addressed(_Bytes(0, nbytes, note), dst, tag, ordinal)
            words[_KIND], words[_PLACE] = Kind.NOTE, address_of(note) - box.base
            words[_PEER_BELL] = box.bell
            return self._message(words, dst, tag, note)

        return (yield from self._deliver(post, dst, tag))

    def answer(self, part: npt.NDArray[np.uint8], dst: int, number: int) -> Steps:
        """Send the bytes that were asked for: `number` is what `send_note` has returned."""
        yield from self._answer(_bytes_of(part), dst, number)

    def hope(
        self, nbytes: int, src: int, tag: int
    ) -> Generator[list[Request], bool | None, Message]:
        """Wait for a message that may be a note; see what it is by its `note`."""
        return (yield from self._accept(_Bytes(0, nbytes, None), src, tag, notes=True))

    def take(self, message: Message, part: npt.NDArray[np.uint8], src: int) -> Steps:
        """Receive the bytes of what `hope` has found: those that came, or that it asks for."""
        if message.note:
            message.settle(served=False)
        else:
            message.put_at(part)
            status = message.check((yield from message.steps(self._patience)))
            if status != Status.BYTES:
                return
        yield from self._ask(message, _bytes_of(part), src)

    # -- parts of them -----------------------------------------------------------------------

    def _deliver(
        self, post: Callable[[int], Message], dst: int, tag: int, number: int | None = None
    ) -> Generator[list[Request], bool | None, int]:
        """Post a message, given its ordinal, and go on until it has ended, or break it off.

        number: of an answer, in place of an ordinal.
        Returns: 0, or its number where the receiver asks for the bytes of a note.
        """
        message, ordinal = None, 0
        try:
            # Here, so that what a signal's handler raises from now on takes it back.
            ordinal = self._ordinals[True, dst].next(tag) if number is None else number
            message = post(ordinal)
            status = yield from message.steps(self._patience)
        except BaseException:
            self._break_off_send(message, dst, tag, ordinal)
            raise
        return message.sequence if message.check(status) == Status.BYTES else 0

    def _answer(self, bytes_: _Bytes, dst: int, number: int) -> Steps:
        post = partial(self._post, bytes_, dst, ANSWERS, None)
        yield from self._deliver(post, dst, ANSWERS, number)

    def _accept(
        self, bytes_: _Bytes, src: int, tag: int, *, notes: bool = False
    ) -> Generator[list[Request], bool | None, Message]:
        """Take the next message, or break it off.

        notes: take a note as one; bytes that have come instead are left to who takes them.
        """
        ordinal, message = self._next(src, tag), None
        try:
            message = self._await(bytes_, src, tag, ordinal)
            if notes:
                message.hope()
            # A copy that takes long is left to whoever waits, or to the background.
            later = not notes and bytes_.nbytes > IN_PLACE_BYTES
            status = yield from message.steps(self._patience, later)
            if status == Status.BYTES and not notes:
                yield from self._ask(message, bytes_, src)
        except BaseException:
            self.break_off(message, src, tag, ordinal)
            raise
        message.check(status)
        return message

    def _ask(self, message: Message, bytes_: _Bytes, src: int) -> Steps:
        """Receive the bytes that a message's sender was asked for."""
        answer = self._await(bytes_, src, ANSWERS, message.sequence)
        try:
            status = yield from answer.steps(self._patience)
        except BaseException:
            answer.abandon()
            raise
        answer.check(status)

    def _next(self, src: int, tag: int) -> int:
        """Return the ordinal of the next message to receive."""
        self._torn.check(src, tag)
        return self._ordinals[False, src].next(tag)

    def break_off(self, message: Message | None, src: int, tag: int, ordinal: int) -> None:
        """Leave a message to the next receive, or refuse these where it cannot be left."""
        begun = message is not None and message.abandon()
        if begun or not self._ordinals[False, src].take_back(tag, ordinal):
            self._torn.add(src, tag)

    def _break_off_send(self, message: Message | None, dst: int, tag: int, ordinal: int) -> None:
        """Keep what the receiver may still read, or count a message that it cannot see no more."""
        if message is not None and message.abandon():
            self._memory.keep([(message.returned, message)])
            return
        self._slots[dst].take_back()
        if tag != ANSWERS:
            self._ordinals[True, dst].take_back(tag, ordinal)

    def _await(self, bytes_: _Bytes, src: int, tag: int, ordinal: int) -> Message:
        box = self._inboxes[src]
        words = self._words(box, False, src, tag, bytes_, ordinal)
        words[_BASE], words[_LOW], words[_PROCESS] = box.base, box.low_at, box.process
        return self._message(words, src, tag, (bytes_, box))

    def _addressed(self, bytes_: _Bytes, dst: int, tag: int, ordinal: int) -> tuple[Words, Box]:
        box, slots = self._outboxes[dst], self._slots[dst]
        slots.take()
        words = self._words(box, True, dst, tag, bytes_, ordinal)
        words[_BOX], words[_SEQUENCE] = slots.slot, slots.sent
        return words, box

    def _post(
        self, bytes_: _Bytes, dst: int, tag: int, there: _There | None, ordinal: int
    ) -> Message:
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
        else:
            words[_WINDOW_AT], words[_PIECE] = address, min(PIECE_BYTES, max(room, 1))
        self._pool.lend(window, _returned(slots))
        return self._message(words, dst, tag, (bytes_, window))

    def _message(self, words: Words, peer: int, tag: int, keeps: object) -> Message:
        """Return a message; the background may still look at it after its group has closed."""
        return Message(words, self.rank, peer, tag, (keeps, self._nodes), self._advance)

    @cached_property
    def _advance(self) -> Kernel:
        from ..kernels.mailbox import advance_letter_kernel

        return advance_letter_kernel()

    def _words(
        self, box: Box, sends: bool, peer: int, tag: int, bytes_: _Bytes, ordinal: int
    ) -> Words:
        words = self._blank.copy().data
        words[_SENDS], words[_BOX] = sends, box.address
        words[_TAG] = tag
        words[_ORDINAL] = ordinal
        words[_NBYTES], words[_ADDRESS] = bytes_.nbytes, bytes_.address
        if bytes_.nbytes > IN_PLACE_BYTES:
            words[_PEER_BELL] = box.bell
        return words


class _Bytes(NamedTuple):
    """A message's bytes on this side; address 0 where they lie elsewhere.

    keeps: what must stay alive until the message has ended.
    """

    address: int
    nbytes: int
    keeps: object


class _There(NamedTuple):
    """Where the receiver reads a message's bytes itself: see `Kind`."""

    kind: int
    place: int


def _bytes_of(part: npt.NDArray[np.uint8]) -> _Bytes:
    return _Bytes(address_of(part), part.nbytes, part)


def _signature(name: str, buffer: Buffer, peer: int) -> Signature:
    return Signature(name, "", buffer.dtype.name, buffer.flat.size, peer)


def _returned(slots: Outbox) -> Returned:
    sequence, done = slots.sent, ctypes.c_int64.from_address(slots.slot + _S_DONE)
    return lambda: done.value >= sequence
