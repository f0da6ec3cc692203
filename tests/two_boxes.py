"""Two ranks of one process that send each other messages; a test takes each step itself."""

from __future__ import annotations

import ctypes
import os
from types import SimpleNamespace
from typing import Any

import numpy as np

from ringfold.comm.boxes import Boxes, Bytes
from ringfold.comm.buffer import address_of
from ringfold.comm.letters import Message
from ringfold.comm.memory import BELL_AT, Memory
from ringfold.comm.node_memory import _equip
from ringfold.kernels.mailbox import advance_letter_kernel
from ringfold.kernels.mailbox_words import BOX_BYTES
from ringfold.kernels.records import BellWord, Status


class TwoBoxes:
    """Rank 0, which sends in these tests, and rank 1.

    reads: whether they have access to each other's own memory.
    """

    def __init__(self, reads: bool = True) -> None:
        memories = [Memory(rank, 2) for rank in range(2)]
        addresses = [memory.address for memory in memories]
        blocks = [memory.allocate(2 * BOX_BYTES) for memory in memories]
        members = np.array([(1, rank, blocks[rank].offset) for rank in range(2)], np.int64)
        self.bells = [ctypes.c_int64.from_address(at + BELL_AT) for at in addresses]
        self.boxes = []
        for rank, memory in enumerate(memories):
            bell = np.zeros(BellWord.WORDS, np.int64)
            _equip(bell, addresses[rank] + BELL_AT)
            nodes: Any = SimpleNamespace(
                rank=rank,
                token=1,
                memory=memory,
                addresses=addresses,
                bell=bell,
                bell_of=lambda peer: addresses[peer] + BELL_AT,
                processes=np.full(2, os.getpid()) if reads else None,
            )
            self.boxes.append(Boxes(rank, members, nodes, blocks[rank]))
        self.memory = memories[0]
        self._ordinals: dict[tuple[int, int], int] = {}

    def send(self, x: np.ndarray[Any, Any], tag: int = 0) -> Message:
        """Return the next message from rank 0, of which no step is taken yet."""
        bytes_ = Bytes(address_of(x), x.nbytes, x)
        there, _ = self.boxes[0].where(bytes_, 1, False)
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
        self._ordinals[rank, tag] = ordinal = self._ordinals.get((rank, tag), 0) + 1
        return ordinal

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
