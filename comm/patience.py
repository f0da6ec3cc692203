"""How long a rank waits, and what it says when time is up."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .deaths import Deaths
from .errors import CommTimeout, PeerLost
from .inquiry import Inquiry

if TYPE_CHECKING:
    from .work import Work

_CHECK = 0.05
"""Seconds between two checks for lost peers and for the deadline while waiting."""

_ANSWERS = 1.5
"""Seconds that the others have to say where they are, when time is up."""


class Watch:
    """The patience of one waiting rank: pauses, looks for lost peers, and knows when time is up."""

    def __init__(
        self,
        work: Work,
        timeout: float,
        inquiry: Inquiry | None,
        deaths: Deaths | None,
        asks: bool,
    ) -> None:
        """timeout: seconds.  asks: when time is up, the others are asked where they are."""
        self._work = work
        self._deaths = deaths
        self._inquiry = inquiry
        self._timeout = timeout
        self._asks = asks
        self._start = self._checked = time.monotonic()
        self._spins = 0
        self._suspected: set[str] = set()

    def pause(self) -> None:
        """Let others run.

        Raises: PeerLost, CommTimeout.
        """
        transport = self._work.transport
        self._spins += 1
        transport.pause(self._spins)
        if self._work.ended:  # by another thread, with all that there was to ask, as MPI is
            return
        now = time.monotonic()
        if now - self._checked < min(_CHECK, self._timeout):
            return
        self._checked = now
        peers = sorted({request.peer for request in self._work.pending})
        try:
            if self._deaths is not None:
                self._deaths.check(transport.world)
            transport.check(peers)
        except PeerLost as error:
            # Its last messages may have come after this rank last looked: look again first. Behind
            # them the work may wait for another rank, which may have left meanwhile as well.
            if str(error) in self._suspected:
                raise
            self._suspected.add(str(error))
            return
        waited = now - self._start
        if self._inquiry is not None:
            self._inquiry.look(self._work, waited)
        if waited >= self._timeout:
            receipt, around = self._work.receipt, ""
            if self._inquiry is not None and self._asks:
                around = "; " + self._inquiry.around(self._work, _ANSWERS)
            raise CommTimeout(
                f"rank {transport.rank} waited {waited:.1f} s in {receipt.operation} "
                f"({receipt.algorithm}, {receipt.nbytes} bytes) for ranks {peers}{around}"
            )
