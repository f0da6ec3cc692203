"""One message through memory that two ranks map, as one of them sees it."""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from ..kernels.mailbox_words import Kind, Letter, Slot
from ..kernels.records import Status
from .buffer import address_of
from .errors import CommError, MismatchError
from .serving import Waiting
from .transport.base import Request

if TYPE_CHECKING:
    from ..kernels.compiled import Kernel

Words: TypeAlias = "memoryview[int]"
"""A rank's record of one message; its words are written one by one, sooner so than as an array."""

_RUNNING, _STATUS, _BELL = int(Status.RUNNING), int(Letter.STATUS), int(Letter.BELL)
_SPINS, _YIELDS = int(Letter.SPINS), int(Letter.YIELDS)


class Message:
    """One message under way."""

    def __init__(
        self, words: Words, rank: int, peer: int, tag: int, keeps: object, advance: Kernel
    ) -> None:
        """keeps: what must stay alive until the message has ended.

        advance: the kernel that goes on with it, which every message of a box has in common.
        """
        self._words, self._rank, self._peer, self._tag = words, rank, peer, tag
        self._advance = advance
        self._keeps = keeps
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(words))
        self.bell = words[_BELL]

    @property
    def running(self) -> bool:
        """Tell whether it has not ended, nor come to where Python decides."""
        return self._words[_STATUS] == _RUNNING

    @property
    def function(self) -> int:
        """Return the address of the C function that goes on with it."""
        from ..kernels.mailbox import advance_letter_callback

        return advance_letter_callback()

    @property
    def sequence(self) -> int:
        """Return its number among all of its box; 0 until a receiver has found it."""
        return int(self._words[Letter.SEQUENCE])

    @property
    def ordinal(self) -> int:
        """Return its number among those with its tag."""
        return int(self._words[Letter.ORDINAL])

    @property
    def is_note(self) -> bool:
        """Tell whether a note is sent, or hoped for."""
        return self._words[Letter.KIND] == Kind.NOTE

    @property
    def note(self) -> int:
        """Return the address of the note that was found; 0 where it is bytes."""
        words = self._words
        found = words[Letter.STATUS] == Status.NOTE
        return int(words[Letter.BASE] + words[Letter.PLACE]) if found else 0

    def hope(self) -> None:
        """Take a note as well, from before the first step."""
        self._words[Letter.KIND] = Kind.NOTE

    def put_at(self, part: npt.NDArray[np.uint8]) -> None:
        """Let the bytes that have come instead of a note be put somewhere, in further steps."""
        self._keeps = (self._keeps, part)
        self._words[Letter.ADDRESS], self._words[Letter.KIND] = address_of(part), Kind.BYTES
        self._words[Letter.STATUS] = Status.RUNNING

    def settle(self, *, served: bool) -> None:
        """Have done with a note: it has served, or the bytes are asked for."""
        from ..kernels.mailbox import settle_note_kernel

        settle_note_kernel()(self.address, served)

    def steps(
        self, patience: tuple[int, int], later: bool = False
    ) -> Generator[list[Request], bool | None, int]:
        """Go on until the message has ended.

        patience: of a rank that waits for nothing else.  later: not in the first step yet.
        Returns: its status, for `check`.
        """
        advance = self._advance
        waits: list[Request] = [Waiting(self._peer, self)]
        words = self._words
        while later or (status := advance(self.address)) == _RUNNING:
            later, patient = False, (yield waits)
            words[_SPINS], words[_YIELDS] = patience if patient else (0, 0)
        return int(status)

    def abandon(self) -> bool:
        """End it, wherever it is; tell whether the receiver has seen or taken any of it."""
        from ..kernels.mailbox import abandon_letter_kernel

        return bool(abandon_letter_kernel()(self.address))

    def returned(self) -> bool:
        """Tell, at the sender, whether the receiver has finished with it."""
        done = ctypes.c_int64.from_address(int(self._words[Letter.BOX]) + 8 * Slot.DONE)
        return bool(done.value >= self.sequence)

    def check(self, status: int) -> int:
        """Return the status in which it has ended, or raise what that means."""
        words = self._words
        if status == Status.REFUSED:
            raise CommError(
                f"rank {self._rank}: rank {self._peer} has given a message up halfway, of "
                f"{words[Letter.NBYTES]} bytes (tag {self._tag})"
            )
        if status == Status.MISMATCH:
            sides = [(self._rank, words[Letter.NBYTES]), (self._peer, words[Letter.FOUND])]
            (src, sent), (dst, wanted) = sides if words[Letter.SENDS] else reversed(sides)
            raise MismatchError(
                f"rank {src} sends {sent} bytes where rank {dst} expects {wanted} (tag {self._tag})"
            )
        return status
