"""Find ranks that wait for each other in calls of different groups, which would do so for ever.

Edge chasing: a rank that waits sends a probe to ranks whose call it needs; who waits as well, and
has not made that call, sends it on to those that itself needs. A probe that comes back has found a
cycle. Each rank of it was waiting when the probe passed, for a call that the next had not made and,
as it waits itself, cannot make; the first one waits still, so all of them do. (The algorithm for
resource deadlocks of K. M. Chandy, J. Misra and L. M. Haas, "Distributed Deadlock Detection", ACM
Transactions on Computer Systems 1(2), 1983; that only the lowest rank's probe goes round is from
D. P. Mitchell and M. J. Merritt, "A Distributed Algorithm for Deadlock Detection and Resolution",
PODC 1984.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from .notices import ASSEMBLING, Probe, Row, Standing
from .trace import Signature

_FIRST, _LONGEST = 0.5, 8.0
"""Seconds until a rank that waits sends its first probe; the pauses behind it double up to that."""

_AGE = 1.0
"""Seconds for which a probe is kept that has come before this rank waits."""

_AGAIN = 0.4
"""Seconds until a rank sends the same probe on once more."""

_PROBES = 256
"""So many are kept."""

_OF_ALL = ("allreduce", "allgather", "alltoall", "reduce_scatter", "barrier", *ASSEMBLING)
_PARTS = ("alltoall", "reduce_scatter")
_FROM_ROOT, _TO_ROOT = ("broadcast", "scatter"), ("reduce", "gather")
_EMPTY = ("barrier", "scatter", *ASSEMBLING)
"""Operations that wait for others though a rank brings no element."""


def needs(signature: Signature, rank: int, size: int) -> list[int]:
    """Return the ranks of a group without whose call a rank's cannot end: their data is in it.

    None where a rank may be at its end without some of them, as with fewer elements than ranks.
    """
    name = signature.operation
    if signature.elements < (size if name in _PARTS else name not in _EMPTY):
        return []
    if name in _OF_ALL or (name in _TO_ROOT and signature.peer == rank):
        return [other for other in range(size) if other != rank]
    return [signature.peer] if name in _FROM_ROOT and signature.peer != rank else []


class Cycles:
    """One rank's part in finding them."""

    def __init__(
        self,
        rank: int,
        tell: Callable[[Iterable[int], Probe], None],
        begun: Callable[[str], int | None],
    ) -> None:
        """rank: of the world.

        begun: how many collectives of a group this rank has begun, None where that tells nothing.
        """
        self._rank, self._tell, self._begun = rank, tell, begun
        self._own = Standing(rank, 0, "", Row(0, Signature("barrier"), "", ""))
        self._due = self._pause = 0.0
        self._heard: deque[tuple[float, Probe]] = deque(maxlen=_PROBES)
        self._sent: dict[tuple[int, int], float] = {}

    def hear(self, probe: Probe) -> None:
        """Keep a probe until this rank next looks."""
        self._heard.append((time.monotonic(), probe))

    def wait(self, group: str, row: Row, members: tuple[int, ...], waited: float) -> None:
        """Begin another wait, in a call of a group; waited: seconds that it has taken already."""
        self._own = Standing(self._rank, self._own.wait + 1, group, row, members)
        self._due, self._pause = time.monotonic() + max(_FIRST - waited, 0), _FIRST
        self._sent.clear()

    def look(self, behind: Callable[[], Iterable[int]]) -> tuple[Standing, ...]:
        """Go on with probes; return the ranks of a cycle, with this one first, if one is found.

        behind: the ranks of the world whose call this one waits for, as far as is known.
        """
        now = time.monotonic()
        if now >= self._due:
            self._pause = min(2 * self._pause, _LONGEST)
            self._due = now + self._pause
            self._tell(behind(), Probe((self._own,)))
        heard, oldest = list(self._heard), now - _AGE
        self._heard.clear()
        for chain in (probe.chain for came, probe in heard if came >= oldest):
            first, last = chain[0], chain[-1]
            begun = self._begun(last.group)
            if begun is None or begun >= last.row.sequence:
                continue
            if first.rank == self._rank and first.wait == self._own.wait:
                return chain
            if first.rank < self._rank and all(one.rank != self._rank for one in chain):
                self._send_on(chain, behind, now)
        return ()

    def _send_on(
        self, chain: tuple[Standing, ...], behind: Callable[[], Iterable[int]], now: float
    ) -> None:
        key = chain[0].rank, chain[0].wait
        if now - self._sent.get(key, -_AGAIN) >= _AGAIN:
            self._sent[key] = now
            self._tell(behind(), Probe((*chain, self._own)))


def told(cycle: tuple[Standing, ...]) -> str:
    """Return a cycle as text."""
    after = (*cycle[1:], cycle[0])
    rows = (
        f"rank {one.rank} for rank {next_.rank} in {one.group}, in {one.row}"
        for one, next_ in zip(cycle, after, strict=True)
    )
    return f"ranks wait for each other, in calls of different groups: {'; '.join(rows)}"
