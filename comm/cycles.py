"""Find ranks that wait for each other in different calls, which would do so for ever.

Edge chasing: a rank that waits sends a probe to ranks whose call it needs; who waits as well, and
has not made that call, sends it on to those that itself needs. A probe that comes back has found a
cycle. Each rank of it was waiting when the probe passed, for a call that the next had not made and,
as it waits itself, cannot make; the first one waits still, so all of them do. (The algorithm for
resource deadlocks of K. M. Chandy, J. Misra and L. M. Haas, "Distributed Deadlock Detection", ACM
Transactions on Computer Systems 1(2), 1983; that only the lowest rank's probe goes round is from
D. P. Mitchell and M. J. Merritt, "A Distributed Algorithm for Deadlock Detection and Resolution",
PODC 1984.)

A cycle is believed when a second probe finds all its ranks in the same waits: what a rank was told
last may have been on its way to it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from .notices import ASSEMBLING, MESSAGES, Probe, Row, Standing
from .texts import few
from .trace import Signature

_FIRST, _LONGEST = 0.5, 8.0
"""Seconds until a rank that waits sends its first probe; the pauses behind it double up to that."""

_AGE = 1.0
"""Seconds for which a probe is kept that has come before this rank waits."""

_AGAIN = 0.3
"""Seconds until a rank that suspects a cycle sends another probe."""

_PROBES = 256
"""Probes that are kept at most."""

_OF_ALL = ("allreduce", "allgather", "alltoall", "reduce_scatter", "barrier", *ASSEMBLING)
_PARTS = ("alltoall", "reduce_scatter")
_FROM_ROOT, _TO_ROOT = ("broadcast", "scatter"), ("reduce", "gather")
_EMPTY = ("barrier", "scatter", *ASSEMBLING, *MESSAGES)
"""Operations that wait for others though a rank brings no element."""


def needs(signature: Signature, rank: int, size: int) -> list[int]:
    """Return the ranks of a group without whose call a rank's cannot end: it needs their data.

    Empty where a rank may reach the end without some of them, as with fewer elements than ranks.
    """
    name = signature.operation
    least = size if name in _PARTS else 0 if name in _EMPTY else 1
    if signature.elements < least:
        return []
    if name in _OF_ALL or (name in _TO_ROOT and signature.peer == rank):
        return [other for other in range(size) if other != rank]
    if name in (*_FROM_ROOT, *MESSAGES) and signature.peer != rank:
        return [signature.peer]
    return []


class Cycles:
    """One rank's part in finding them."""

    def __init__(
        self,
        rank: int,
        tell: Callable[[Iterable[int], Probe], None],
        lacks: Callable[[Standing], bool],
    ) -> None:
        """rank: of the world.  lacks: whether this rank has yet to make the call one waits for."""
        self._rank, self._tell, self._lacks = rank, tell, lacks
        self._own = Standing(rank, 0, 0, "", Row(0, Signature("barrier"), "", ""))
        self._due = self._pause = 0.0
        self._number = 0
        self._heard: deque[tuple[float, Probe]] = deque(maxlen=_PROBES)
        self._passed: dict[int, int] = {}
        self._suspected: dict[tuple[tuple[int, int], ...], int] = {}

    @property
    def own(self) -> Standing:
        """Return this rank's present wait, or its last."""
        return self._own

    def hear(self, probe: Probe) -> None:
        """Keep a probe until this rank next looks."""
        self._heard.append((time.monotonic(), probe))

    def look(
        self, own: Standing, waited: float, behind: Callable[[], Iterable[int]]
    ) -> tuple[Standing, ...]:
        """Go on with probes; return the ranks of a cycle, with this one first, if one is found.

        own: how this rank waits; the number of the wait is one more than before for another one.
        waited: the seconds that it has taken.
        behind: the ranks of the world whose call this one waits for, as far as is known.
        """
        now = time.monotonic()
        if own.wait != self._own.wait:
            self._due, self._pause = now + max(_FIRST - waited, 0), _FIRST
            self._passed.clear()
            self._suspected.clear()
        self._own = own
        if now >= self._due:
            self._pause = min(2 * self._pause, _LONGEST)
            self._due = now + self._pause
            self._number += 1
            self._tell(behind(), Probe(self._number, (own,)))
        heard, oldest = list(self._heard), now - _AGE
        self._heard.clear()
        for probe in (probe for came, probe in heard if came >= oldest):
            chain = probe.chain
            first = chain[0]
            if not self._lacks(chain[-1]):
                continue
            if first.rank == self._rank and first.wait == own.wait:
                if self._believes(probe):
                    return chain
                self._due = min(self._due, now + _AGAIN)
            elif first.rank < self._rank and self._passed.get(first.rank, 0) < probe.number:
                self._passed[first.rank] = probe.number
                self._tell(behind(), Probe(probe.number, (*chain, own)))
        return ()

    def _believes(self, probe: Probe) -> bool:
        """Tell whether a probe that was sent before this one was has found the same waits."""
        waits = tuple((one.rank, one.wait) for one in probe.chain)
        return self._suspected.setdefault(waits, self._number) < probe.number


def told(cycle: tuple[Standing, ...]) -> str:
    """Return a cycle as text."""
    after = (*cycle[1:], cycle[0])
    rows = [
        f"rank {one.rank} for rank {next_.rank} in {one.group}, in {one.row}"
        for one, next_ in zip(cycle, after, strict=True)
    ]
    return f"ranks wait for each other, in different calls: {few(rows, '; ')}"
