"""The slots of what one rank sends another through memory: as many as there are messages under way.

A message that nobody receives yet must not stand in the way of later ones, which may be received
before it. So slots come in runs, and a run is used again once all of its messages are done.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..kernels.mailbox_words import (
    EXPRESS_STRIDE,
    EXPRESS_WINDOWS,
    GIVEN_UP,
    RUN_BYTES,
    RUNS,
    SLOT_BYTES,
    SLOTS,
    Out,
    Slot,
)
from .buffer import address_of
from .errors import CommError
from .memory import Block, Memory

AHEAD = 16 * SLOTS
"""Messages under way from which on a sender waits until its next one is received."""

_FEW = 32
"""Runs that are looked at for each message of a sender that is far ahead; more now and then."""


@dataclass
class Run:
    """SLOTS slots, of messages number * SLOTS and those behind it.

    words: a row per slot.
    """

    number: int
    block: Block
    words: npt.NDArray[np.int64]

    @property
    def sequences(self) -> npt.NDArray[np.int64]:
        """Return the messages' numbers."""
        return np.arange(self.number * SLOTS, (self.number + 1) * SLOTS)

    def under_way(self, sent: int) -> int:
        """Return how many of its messages up to `sent` the receiver has not finished with."""
        sequences = self.sequences
        return int(((self.words[:, Slot.DONE] < sequences) & (sequences <= sent)).sum())

    def done(self) -> bool:
        """Tell whether all SLOTS messages were sent, and the receiver has finished with them."""
        return not self.under_way((self.number + 1) * SLOTS)


_SENT, _SLOT, _SLOTS, _WINDOWS = map(int, (Out.SENT, Out.SLOT, Out.SLOTS, Out.WINDOWS))


class Outbox:
    """The slots of one ordered pair of ranks, as the sender sees them.

    words: what compiled code has to know to send by itself, see `Out`.
    """

    def __init__(self, address: int, memory: Memory) -> None:
        """address: of the words that tell the receiver where runs begin."""
        self._address, self._memory = address, memory
        self._runs: list[Run] = []
        self._finished = self._look = 0
        self._windows: Block | None = None
        self._record = np.zeros(Out.WORDS, np.int64)
        self.words, self.address = self._record.data, address_of(self._record)

    @property
    def sent(self) -> int:
        """Return how many messages there were so far."""
        return self.words[_SENT]

    @property
    def slot(self) -> int:
        """Return the address of the last one's slot."""
        return self.words[_SLOT]

    def take(self) -> None:
        """Count another message, and find its slot.

        Raises: CommError where more are under way than can be told apart.
        """
        words = self.words
        sent = words[_SENT] + 1
        if sent % SLOTS == 0 or not words[_SLOTS]:
            self._begin(sent // SLOTS)
        words[_SENT], words[_SLOT] = sent, words[_SLOTS] + sent % SLOTS * SLOT_BYTES

    def take_back(self) -> None:
        """Uncount the last message, if nothing was written to its slot."""
        if self.slot and ctypes.c_int64.from_address(self.slot).value < self.sent:
            self.words[_SENT], self.words[_SLOT] = self.sent - 1, 0

    def given_up(self, number: int) -> bool:
        """Tell whether the receiver has given up a message, if its slot is not in use again."""
        for run in self._runs:
            if run.number == number // SLOTS:
                slot = run.words[number % SLOTS]
                return bool(slot[Slot.SEQUENCE] == number and slot[Slot.CONSUMED] == GIVEN_UP)
        return False

    def _begin(self, number: int) -> None:
        if self._runs and self._runs[-1].number == number:  # for a message that was taken back
            return
        oldest = next((run.number for run in self._runs if not run.done()), number)
        if number - oldest >= RUNS:
            raise CommError(
                f"{self.sent} messages were sent to a rank that has not received number "
                f"{max(oldest * SLOTS, 1)}, or one soon behind it; {RUNS * SLOTS} is the most"
            )
        run = next((run for run in self._runs if run.done()), None)
        if run is None:
            block = self._memory.allocate(RUN_BYTES)
            run = Run(number, block, np.asarray(block).view(np.int64).reshape(SLOTS, -1))
            # Where a receiver still looks for messages long done, they are not yet to come.
            run.words[:, Slot.SEQUENCE] = run.sequences - 1
        else:
            self._runs.remove(run)
            # Still its own: the oldest run is taken first, and before a later one has its word.
            self._word(run.number).value = -1 - run.number
            run.number = number
        self._word(number).value = run.block.offset
        self.words[_SLOTS] = self._memory.address + run.block.offset
        self._runs.append(run)

    def _word(self, number: int) -> ctypes.c_int64:
        return ctypes.c_int64.from_address(self._address + number % RUNS * 8)

    @property
    def far_ahead(self) -> bool:
        """Tell whether more than AHEAD messages are under way, or have been a while ago."""
        if self.sent - self._finished <= AHEAD:
            return False
        if len(self._runs) <= _FEW or self.sent >= self._look:
            self._finished = self.sent - sum(run.under_way(self.sent) for run in self._runs)
            self._look = self.sent + SLOTS
        return self.sent - self._finished > AHEAD

    def open_windows(self) -> None:
        """Have windows for known messages from now on."""
        if self._windows is None:
            self._windows = self._memory.allocate(EXPRESS_WINDOWS * EXPRESS_STRIDE)
            self.words[_WINDOWS] = self._memory.address + self._windows.offset

    def close(self) -> None:
        """Give the memory back, which nobody looks at any more."""
        if self._windows is not None:
            self._memory.release(self._windows)
            self._windows = None
        self.words[_SLOTS] = 0  # another thread may be about to send
        for run in self._runs:
            self._memory.release(run.block)
        self._runs.clear()
