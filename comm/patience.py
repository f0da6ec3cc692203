"""How long a rank waits, and what it says when time is up."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .deaths import Deaths
from .errors import CommTimeout, PeerLost
from .inquiry import Inquiry
from .texts import listed
from .waited import Waited

if TYPE_CHECKING:
    from .work import Work

CHECK = 0.05
"""Seconds between two checks for lost peers and for the deadline while waiting."""

ANSWERS = 1.5
"""Seconds that the others have to say where they are, when time is up."""

ASKS = 2.0
"""Who is given fewer seconds to wait has a look now and then: it asks nobody."""


class Doubts:
    """The ranks that a waiting rank has found gone; it gives a work up only at the second look.

    Until then, the gone rank's last messages may not have been looked at. With them the work may
    end, or come to wait for another rank, which may be gone as well.
    """

    def __init__(self, deaths: Deaths | None) -> None:
        self._deaths = deaths
        self._seen: set[tuple[Work, str]] = set()

    def arise(self, work: Work, whole: bool) -> bool:
        """Tell whether a rank that a work waits for is found gone, for the first time.

        whole: the death of any rank of the group counts.
        Raises: PeerLost where that is no longer new.
        """
        transport, peers = work.transport, peers_of(work)
        try:
            if self._deaths is not None:
                world = transport.world
                self._deaths.check(world if whole else [world[peer] for peer in peers])
            transport.check(peers)
        except PeerLost as error:
            if (work, str(error)) in self._seen:
                raise
            self._seen.add((work, str(error)))
            return True
        return False


def peers_of(work: Work) -> list[int]:
    """Return the ranks that a work waits for."""
    return sorted({request.peer for request in work.pending})


class Watch:
    """The patience of one waiting rank: pauses, looks for lost peers, and knows when time is up."""

    def __init__(
        self,
        work: Work,
        timeout: float,
        inquiry: Inquiry | None,
        deaths: Deaths | None,
        asks: bool,
        patient: bool,
    ) -> None:
        """timeout: seconds.  asks: when time is up, the others are asked where they are.

        patient: the rank waits until all is over; else it may do something else behind.
        """
        self._work = work
        self._doubts = Doubts(deaths)
        self._inquiry = inquiry
        self._timeout = timeout
        self._asks, self._patient = asks, patient
        self._waited = Waited()
        self._checked = time.monotonic()
        self._spins = 0

    def pause(self) -> None:
        """Let others run.

        Raises: PeerLost, CommTimeout, MismatchError.
        """
        self._spins += 1
        self._work.transport.pause(self._spins)
        if not self._work.ended:  # by another thread, with all that there was to ask, as MPI is
            self.look(whole=True)

    def look(self, *, whole: bool) -> None:
        """Look now and then for lost peers, for calls that differ, and whether time is up.

        whole: the death of any rank of the group counts.
        Raises: PeerLost, CommTimeout, MismatchError.
        """
        transport = self._work.transport
        now = time.monotonic()
        if now - self._checked < min(CHECK, self._timeout):
            return
        self._checked = now
        waited = self._waited.look()
        if self._inquiry is not None:  # first: a rank that leaves may have said why
            self._inquiry.look(self._work, waited, self._patient)
        if self._doubts.arise(self._work, whole):
            return
        peers = peers_of(self._work)
        if waited >= self._timeout:
            receipt, around = self._work.receipt, ""
            if self._inquiry is not None and self._asks:
                around = "; " + self._inquiry.around(self._work, ANSWERS)
            raise CommTimeout(
                f"rank {transport.rank} waited {waited:.1f} s in {receipt.operation} "
                f"({receipt.algorithm}, {receipt.nbytes} bytes) for ranks {listed(peers)}{around}"
            )
