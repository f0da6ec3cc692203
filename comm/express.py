"""A small message from, or to, the same memory again, by one call of compiled code."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..kernels.mailbox_words import Express as Word
from ..kernels.records import Status
from .buffer import address_of
from .ordinals import Ordinals
from .trace import Ring

Record: TypeAlias = npt.NDArray[np.int64]

_DONE = int(Status.DONE)


class Express:
    """One message that is sent or received again, ready to be so at once."""

    def __init__(
        self, record: Record, ordinals: Ordinals, refused: Collection[object], keeps: object
    ) -> None:
        """record: of `Word`, but for what `note_in` fills in.

        ordinals: of the messages that way.  refused: while there is any, none goes this way.
        keeps: what must stay alive as long as this.
        """
        from ..kernels.express import express_kernel

        self._record, self._address = record, address_of(record)
        self._ordinals, self._refused, self._keeps = ordinals, refused, keeps
        self._run = express_kernel()

    def note_in(self, ring: Ring, call: int, counter: int, tally: int) -> None:
        """Count messages where the group does, and note each in a ring.

        call: as `Ring.intern` has told.  counter, tally: addresses, see `Word`.
        """
        words = self._record
        words[Word.RING], words[Word.CALLED] = ring.address, call
        words[Word.COUNTER], words[Word.TALLY] = counter, tally

    def run(self, tag: int, patient: bool) -> bool:
        """Send or receive at once; tell whether it was done, else nothing was.

        Not with a tag that was not used lately, nor a message that others have to be looked at
        before. patient: a receive may look for its message for a while.
        """
        if type(tag) is not int or self._refused:
            return False
        count = self._ordinals.at(tag)
        return count != 0 and self._run(self._address, tag, count, patient) == _DONE
