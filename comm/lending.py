"""Blocks of a rank's shared memory for what it sends: taken, lent to a message, and used again."""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque

import numpy as np
import numpy.typing as npt

from .memory import Memory, Returned

OUTSTANDING_BYTES = 64 << 20
"""Copies that nobody has received yet; above, senders wait for their receivers."""

_SPARE_BYTES = 32 << 20
"""Of blocks that are kept to be used again: new ones cost a fault for each of their pages."""


class SendPool:
    """Blocks of a rank's memory for what it sends: taken, lent to a message, and used again."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        # By size; the sizes in the order in which they were last asked for.
        self._spare: OrderedDict[int, list[npt.NDArray[np.uint8]]] = OrderedDict()
        self._spare_bytes = 0
        self._lent: deque[tuple[Returned, npt.NDArray[np.uint8]]] = deque()
        # A sender may drop its group as soon as send() has returned: what it sent stays.
        weakref.finalize(self, memory.keep, self._lent).atexit = False
        self.outstanding = 0

    @property
    def full(self) -> bool:
        """Tell whether so much is lent that senders are to wait for their receivers."""
        return self.outstanding >= OUTSTANDING_BYTES

    def take(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return a block of at least nbytes."""
        self._collect()
        room = max(1 << (nbytes - 1).bit_length(), 4096) if nbytes else 4096
        spare = self._spare.setdefault(room, [])
        self._spare.move_to_end(room)
        if spare:
            self._spare_bytes -= room
            return spare.pop()
        return self._memory.lend(room)

    def lend(self, block: npt.NDArray[np.uint8], returned: Returned) -> None:
        """Take the block back some time after `returned` tells so."""
        self.outstanding += block.size
        self._lent.append((returned, block))

    def forget(self) -> None:
        """Let go of all that is lent, which nobody will receive any more."""
        self._lent.clear()
        self.outstanding = 0

    def _collect(self) -> None:
        for _ in range(len(self._lent)):
            returned, block = self._lent[0]  # held, until it is known to be returned
            if not returned():
                self._lent.rotate(-1)
                if not self.full:
                    return  # the oldest is the likeliest to have come back
                continue
            self._lent.popleft()
            self.outstanding -= block.size
            self._spare[block.size].append(block)
            self._spare_bytes += block.size
            while self._spare_bytes > _SPARE_BYTES:
                self._drop()

    def _drop(self) -> None:
        """Let a block go, of the size that was not asked for longest."""
        size = next(size for size, blocks in self._spare.items() if blocks)
        self._spare[size].pop()
        self._spare_bytes -= size
