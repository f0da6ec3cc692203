"""Find out whether a waiting rank waits for ranks that wait for it, and tell them all."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from .cycles import Cycles, told
from .notices import MESSAGES, Notice, Probe, Row, Standing, Stuck, Verdict, encode, rows_of
from .trace import Ring
from .transport.base import Transport
from .work import Work

if TYPE_CHECKING:
    from .runner import Runner

_MEMBERS = 64
"""In a larger group only the ranks of the cycle are told at once."""


class Deadlocks:
    """One rank's waits, over all of its groups."""

    def __init__(
        self,
        transport: Transport,
        ring: Ring,
        group: Callable[[str], Runner | None],
        alone: Callable[[], bool],
    ) -> None:
        """transport: of the group that all others are split from.

        group: returns one of this rank's groups.
        alone: whether no other thread of this rank calls anything: it could end the wait.
        """
        self._transport, self._ring = transport, ring
        self._group, self._alone = group, alone
        self._cycles = Cycles(transport.rank, self._tell, self._lacks)
        self._work: Callable[[], Work | None] = lambda: None
        self._stuck: Stuck | None = None

    def hear(self, notice: Probe | Stuck) -> None:
        """Keep what another rank has told."""
        if isinstance(notice, Stuck):
            self._stuck = notice
        else:
            self._cycles.hear(notice)

    def look(self, work: Work, waited: float, behind: Callable[[Row], list[int]]) -> str:
        """Look, in a wait for a work; return which ranks wait for each other, "" where none do.

        waited: the seconds that it has taken.
        behind: given the call, returns the ranks of the world whose call this one waits for.
        """
        own = self._standing(work)
        if own is None:
            return ""
        signature = own.row.signature
        if signature.operation in MESSAGES and signature.peer == own.place and self._lacks(own):
            return f"rank {own.rank} waits for itself, in {own.group}, in {own.row}"
        cycle = self._cycles.look(own, waited, lambda: behind(own.row))
        if cycle:
            self._tell_all_of(cycle)
            return told(cycle)
        stuck = self._stuck
        return stuck.text if stuck is not None and stuck.wait == own.wait else ""

    def _standing(self, work: Work) -> Standing | None:
        """Return how this rank waits; None where the wait may end by itself, or nobody can tell.

        After an error in a group its ranks may count its calls apart, but who closes it waits for
        the others to do so, whatever they have called before.
        """
        transport, last = work.transport, self._cycles.own
        lost = transport.soiled and work.receipt.operation != "close"
        if lost or not self._alone():  # first: another thread may be making groups
            return None
        group = self._group(work.home)
        if group is None:
            return None
        count = group.count(work)
        if work is self._work():
            return replace(last, count=count)
        rows = rows_of(self._ring, work.home, messages=not work.group)
        row = next((row for row in rows if row.sequence == work.sequence), None)
        if row is None:
            return None
        self._work = weakref.ref(work)
        members = transport.world if work.group and transport.size <= _MEMBERS else ()
        rank, place = self._transport.rank, transport.rank
        return Standing(rank, place, last.wait + 1, work.home, row, count, members)

    def _lacks(self, other: Standing) -> bool:
        group = self._group(other.group)
        return group is not None and group.lacks(other)

    def _tell(self, ranks: Iterable[int], notice: Notice) -> None:
        self._transport.tell(list(ranks), encode(notice))

    def _tell_all_of(self, cycle: tuple[Standing, ...]) -> None:
        """Tell all at once: this rank may leave before those of the cycle have told the others."""
        text, own = told(cycle), self._transport.rank
        for one in cycle:
            if one.row.signature.operation in MESSAGES:
                self._tell({one.rank} - {own}, Stuck(one.wait, text))
            else:
                others = {one.rank, *one.members} - {own}
                self._tell(others, Verdict(one.group, one.row.sequence, text))
