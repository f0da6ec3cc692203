"""Two ranks of one process, with messages or a board between them; a test takes each step."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from ringfold.comm.board import Board, _area_bytes
from ringfold.comm.boxes import Boxes, Bytes
from ringfold.comm.buffer import address_of, wrap
from ringfold.comm.letters import Message
from ringfold.comm.meeting import Meeting
from ringfold.comm.meetings import Meetings
from ringfold.comm.memory import BELL_AT, Memory
from ringfold.comm.node_memory import _equip
from ringfold.comm.ordinals import Ordinals
from ringfold.comm.trace import Ring, Signature
from ringfold.kernels.mailbox import advance_letter_kernel
from ringfold.kernels.mailbox_words import BOX_BYTES
from ringfold.kernels.records import LINE_BYTES, NOTE_BYTES, BellWord, BoardWord, Count, Status

COPY = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t,
    *(ctypes.c_int, ctypes.POINTER(ctypes.c_int64), ctypes.c_ulong),
    *(ctypes.POINTER(ctypes.c_int64), ctypes.c_ulong, ctypes.c_ulong),
)
"""process_vm_readv, of which one vector is asked at a time."""


def accessing(access: Callable[[int, int, int], int]) -> tuple[int, object]:
    """Return the address of a C function like process_vm_readv, and what keeps it.

    access: (own address, remote address, bytes) -> how many were copied, or -1.
    """

    def copy(_: int, own: Any, __: int, remote: Any, ___: int, ____: int) -> int:
        return access(own[0], remote[0], own[1])

    function = COPY(copy)
    return ctypes.cast(function, ctypes.c_void_p).value or 0, function


class Node:
    """The memories of two ranks.

    reads: whether they have access to each other's own.
    bells: a word of each rank, which is not 0 while it sleeps.
    """

    def __init__(self, reads: bool) -> None:
        self.memories = [Memory(rank, 2) for rank in range(2)]
        addresses = [memory.address for memory in self.memories]
        self.bells = [ctypes.c_int64.from_address(at + BELL_AT) for at in addresses]
        self.seen: list[Any] = []
        """As each rank sees it, in place of a `NodeMemory`."""
        for rank, memory in enumerate(self.memories):
            bell = np.zeros(BellWord.WORDS, np.int64)
            _equip(bell, addresses[rank] + BELL_AT)
            nodes = SimpleNamespace(
                rank=rank,
                token=1,
                memory=memory,
                addresses=addresses,
                traces=[one.trace for one in self.memories],
                bell=bell,
                bell_of=lambda peer: addresses[peer] + BELL_AT,
                processes=np.full(2, os.getpid()) if reads else None,
            )
            self.seen.append(nodes)


class TwoBoards:
    """A group of two ranks: their boards, and the rings in which they note what they call."""

    def __init__(self, reads: bool = True) -> None:
        node = Node(reads)
        self.bells = node.bells
        blocks = [
            (memory.allocate(_area_bytes(2)), memory.allocate(2 * (LINE_BYTES + 2 * NOTE_BYTES)))
            for memory in node.memories
        ]
        members = np.array(
            [(1, rank, area.offset, control.offset) for rank, (area, control) in enumerate(blocks)]
        )
        self.boards, self.rings, self.counters = [], [], []
        for rank in range(2):
            board, ring = Board(rank, members, node.seen[rank], blocks[rank]), Ring()
            ring.move(node.memories[rank].trace)
            counter = np.zeros(Count.WORDS, np.int64)
            board.note_in(ring, counter, lambda _: None)
            board.record[BoardWord.SPINS] = board.record[BoardWord.YIELDS] = 0
            self.boards.append(board)
            self.rings.append(ring)
            self.counters.append(counter)

    def allreduce(self, rank: int, x: np.ndarray[Any, Any]) -> Meeting:
        """Return a rank's call, which is not started."""
        meeting = Meetings(self.boards[rank]).allreduce(wrap(x, writable=True), "sum").meeting
        assert meeting is not None
        call = self.rings[rank].intern(Signature("allreduce", "sum", "", x.size), "two", 2, "a:1")
        meeting.called(self.rings[rank], call)
        return meeting


class TwoBoxes:
    """Rank 0, which sends in these tests, and rank 1."""

    def __init__(self, reads: bool = True) -> None:
        node = Node(reads)
        self.bells, self.memory = node.bells, node.memories[0]
        blocks = [memory.allocate(2 * BOX_BYTES) for memory in node.memories]
        members = np.array([(1, rank, blocks[rank].offset) for rank in range(2)], np.int64)
        self.boxes = [Boxes(rank, members, node.seen[rank], blocks[rank]) for rank in range(2)]
        self.ordinals = [Ordinals(), Ordinals()]

    def send(self, x: np.ndarray[Any, Any], tag: int = 0) -> Message:
        """Return the next message from rank 0, of which no step is taken yet."""
        bytes_ = Bytes(address_of(x), x.nbytes, x)
        there, _ = self.boxes[0].where(bytes_, 1)
        return self.boxes[0].outgoing(bytes_, 1, tag, there, self._next(0, tag))

    def note(self, nbytes: int, tag: int = 0) -> Message:
        """Return the next message from rank 0, a note of bytes that lie elsewhere."""
        note = self.boxes[0].note()
        return self.boxes[0].outgoing_note(note, nbytes, 1, tag, self._next(0, tag))

    def receive(self, y: np.ndarray[Any, Any], tag: int = 0) -> Message:
        """Return the next message to rank 1, of which no step is taken yet."""
        bytes_ = Bytes(address_of(y), y.nbytes, y)
        return self.boxes[1].incoming(bytes_, 0, tag, self._next(1, tag))

    def _next(self, rank: int, tag: int) -> int:
        return self.ordinals[rank].next(tag)

    def pass_on(self, x: np.ndarray[Any, Any], tag: int = 0) -> None:
        """Send a small message and receive it."""
        assert step(self.send(x, tag)) == Status.DONE
        got = np.zeros_like(x)
        assert step(self.receive(got, tag)) == Status.DONE
        np.testing.assert_array_equal(got, x)


def step(message: Message) -> int:
    """Take a step of a message, which looks once; return its status."""
    return int(advance_letter_kernel()(message.address))


def goes_on(message: Message) -> bool:
    """Take steps of a message until it has to wait; tell whether there were any."""
    before, after = b"", bytes(message._words)
    steps = 0
    while after != before:
        step(message)
        before, after, steps = after, bytes(message._words), steps + 1
    return steps > 1
