"""Find out why a rank waits: whether the others have called something else.

A rank that has waited for a while in a collective tells the ranks of the group what it called last.
Whoever waits reads that, and compares call by call. All of it is outside of the way of works that
go on: nothing is told, or looked at, before somebody has waited for ASK_SECONDS.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from .cycles import needs
from .deadlocks import Deadlocks
from .errors import MismatchError
from .notices import (
    ASSEMBLING,
    DIFFER,
    Ask,
    Called,
    Notice,
    Probe,
    Report,
    Row,
    Stuck,
    Verdict,
    calls_of,
    decode,
    encode,
    rows_of,
)
from .texts import table
from .trace import Ring, State
from .transport.base import Transport
from .where import state
from .work import Work

ASK_SECONDS = 0.3
"""A rank waits for so long before it tells what it waits in."""

_GRACE = 1.5
"""Seconds that ranks are given to say what they called, once calls are known to differ."""

_LATE = 64
"""So many closed groups are remembered: what others tell of one may come a moment later."""

_ROWS = 6
"""Calls told up to and with the first that still runs, or is asked for; all behind it are, too."""

_EVERYBODY = 64
"""In larger groups, a rank that waits tells those it waits for, and some others."""


class Inquiry:
    """What one rank has told, and been told, over all of its groups."""

    def __init__(self, transport: Transport, ring: Ring, deadlocks: Deadlocks) -> None:
        """transport: of the group that all others are split from."""
        self._transport = transport
        self._ring = ring
        self._deadlocks = deadlocks
        # The watchdog listens while the rank waits; a signal's handler may wait in between.
        self._lock = threading.RLock()
        self._told: dict[tuple[str, int], tuple[Row, ...]] = {}
        self._verdicts: dict[str, Verdict] = {}
        self._settled: dict[str, int] = {}
        self._since: dict[str, tuple[int, float]] = {}
        self._closed: deque[str] = deque(maxlen=_LATE)
        self._reports: dict[int, dict[int, str]] = {}
        self._asked = 0
        self._heard_ask = -math.inf
        thread = threading.get_ident()
        self.answer: Callable[[], str] = lambda: state(ring, thread)
        self.force: Callable[[int], str | None] = lambda rank: None

    def rows(self, group: str) -> tuple[Row, ...]:
        """Return this rank's last collectives in a group, the oldest first."""
        return rows_of(self._ring, group, messages=False)

    def _shown(self, group: str, asked: float = math.inf) -> tuple[Row, ...]:
        """Return those of the rows that others compare; asked: the first of which they tell."""
        calls = calls_of(self._ring, group, messages=False)
        running = [call.sequence for call in calls if call.state is State.RUNNING]
        first = min([asked, *running, *(call.sequence for call in calls[-1:])])
        return tuple(Row.of(call) for call in calls if call.sequence > first - _ROWS)

    def listen(self) -> None:
        """Read what others have told; any thread may."""
        with self._lock:
            for src, data in self._transport.heard():
                self._take(src, decode(data))

    def forget(self, group: str) -> None:
        """Let go of what is known of a group, which is closed; its name does not come again."""
        with self._lock:
            self._closed.append(group)
            self._told = {key: rows for key, rows in self._told.items() if key[0] != group}
            for known in (self._verdicts, self._settled, self._since):
                known.pop(group, None)

    def _take(self, src: int, notice: Notice) -> None:
        if isinstance(notice, Called):
            if notice.group not in self._closed:
                self._told[notice.group, src] = notice.rows
            if not notice.answer:
                asked = min((row.sequence for row in notice.rows), default=math.inf)
                own = Called(notice.group, self._shown(notice.group, asked), answer=True)
                self._transport.tell([src], encode(own))
        elif isinstance(notice, Verdict):
            new = notice.sequence > self._settled.get(notice.group, 0)
            if new and notice.group not in self._closed:
                self._verdicts[notice.group] = notice
        elif isinstance(notice, Ask):
            self._heard_ask = time.monotonic()
            self._transport.tell([src], encode(Report(notice.number, self.answer())))
        elif isinstance(notice, Probe | Stuck):
            self._deadlocks.hear(notice)
        elif notice.number in self._reports:
            self._reports[notice.number][src] = notice.text

    def look(self, work: Work, waited: float, patient: bool) -> None:
        """Listen, and tell what a work waits in where it has waited for long.

        Ranks that split or close a group may have called different things before, and given these
        up. So a rank that waits there does not judge: those do that wait in something else.

        patient: this rank does nothing else until the work has ended, or all is over.

        Raises: MismatchError where the ranks of its group have called different things, or ranks
        wait for each other in different calls.
        """
        self.listen()
        group = work.group
        assembling = work.receipt.operation in ASSEMBLING
        if group:
            if waited >= ASK_SECONDS and not work.told:
                work.told = True
                self._tell(work, Called(group, self._shown(group)))
            self._judge(group, work.transport.world, heeds=assembling)
        if waited >= ASK_SECONDS and (patient or assembling):
            self._chase(work, waited)

    def _chase(self, work: Work, waited: float) -> None:
        """Raise MismatchError where this rank waits for one that waits for it in another call."""
        with self._lock:
            text = self._deadlocks.look(work, waited, lambda row: self._behind(work, row))
            if not text:
                return
            if work.group:
                self._verdicts[work.group] = Verdict(work.group, work.sequence, text)
        if work.group:
            self._judge(work.group, work.transport.world, heeds=True)
        raise MismatchError(text)

    def _behind(self, work: Work, row: Row) -> list[int]:
        """Return the ranks of the world whose call a work needs, and that may not have made it."""
        transport = work.transport
        near = {request.peer for request in work.pending}
        found = []
        for place in needs(row.signature, transport.rank, transport.size):
            rows = self._told.get((work.group, transport.world[place]))
            late = place in near if rows is None else not _made(rows, row)
            if late:
                found.append(transport.world[place])
        return found[:_EVERYBODY]

    def heed(self, group: str, members: tuple[int, ...]) -> None:
        """Listen, in a call that all have come to; raise MismatchError where one has found it.

        What ranks called before does not matter any more, though it may differ.
        """
        with self._lock:
            self.listen()
            self._judge(group, members, heeds=True)
            called = _last(self.rows(group))
            self._settled[group] = max(self._settled.get(group, 0), called)

    def settle(self, group: str, sequence: int) -> None:
        """Take a call in which ranks differ for known: each has found it where they meet."""
        with self._lock:
            self._settled[group] = max(self._settled.get(group, 0), sequence)
            if group in self._verdicts and self._verdicts[group].sequence <= sequence:
                del self._verdicts[group]

    def _tell(self, work: Work, notice: Notice) -> None:
        transport = work.transport
        near = {request.peer for request in work.pending} | {
            (transport.rank + step) % transport.size for step in range(_EVERYBODY)
        }
        everybody = [transport.world[rank] for rank in sorted(near - {transport.rank})]
        self._transport.tell(everybody, encode(notice))

    def _judge(self, group: str, members: tuple[int, ...], *, heeds: bool) -> None:
        """heeds: only what others have found counts."""
        with self._lock:
            verdict = self._verdicts.get(group)
            if verdict is None and not heeds:
                verdict = self._found(group, members)
            if verdict is None:
                return
            self._verdicts.pop(group, None)
            # Calls behind the first that differ may differ, too, where nobody has waited in them.
            self._settled[group] = max(verdict.sequence, _last(self.rows(group)))
            self._since.pop(group, None)
            others = [rank for rank in members if rank != self._transport.rank]
            self._transport.tell(others, encode(verdict))
        raise MismatchError(verdict.text)

    def _found(self, group: str, members: tuple[int, ...]) -> Verdict | None:
        """Return what is wrong, once every rank has said what it called, or had time to."""
        if not any(name == group for name, _ in self._told):
            return None
        own = {row.sequence: row for row in self.rows(group)}
        told = {
            place: {row.sequence: row for row in self._told.get((group, rank), ())}
            for place, rank in enumerate(members)
            if rank != self._transport.rank
        }
        sequence = _first_difference(own, told.values(), self._settled.get(group, 0))
        if sequence is None:
            return None
        told[members.index(self._transport.rank)] = own
        known = {place: rows[sequence] for place, rows in told.items() if sequence in rows}
        before, since = self._since.get(group, (0, 0.0))
        if before != sequence:
            since = time.monotonic()
            self._since[group] = sequence, since
        if len(known) < len(members) and time.monotonic() - since < _GRACE:
            return None
        ways = len({row.way for row in known.values()}) > 1
        shown = {
            place: known[place].told(ways) if place in known else "has not said what it called"
            for place in range(len(members))
        }
        return Verdict(group, sequence, table(f"{DIFFER} in {group}", shown))

    def ask(self, ranks: Iterable[int], patience: float) -> dict[int, str]:
        """Return what ranks of the world are at, those that answer within `patience` seconds."""
        ranks = [rank for rank in ranks if rank != self._transport.rank]
        with self._lock:
            self._asked += 1
            number = self._asked
            answers = self._reports[number] = {}
            self._transport.tell(ranks, encode(Ask(number)))
        end = time.monotonic() + patience
        while len(answers) < len(ranks) and time.monotonic() < end:
            self.listen()
            time.sleep(0.005)
        del self._reports[number]
        silent = {rank: self.force(rank) for rank in ranks if rank not in answers}
        return {**answers, **{rank: text for rank, text in silent.items() if text is not None}}

    def was_asked(self, seconds: float) -> bool:
        """Tell whether a peer has asked within the last seconds."""
        self.listen()
        return time.monotonic() - self._heard_ask < seconds

    def around(self, work: Work, patience: float) -> str:
        """Return what the ranks of a work's group are at, as rows of a text."""
        members = work.transport.world
        told = self.ask(members, patience)
        told[self._transport.rank] = self.answer()
        rows = {place: told.get(rank, "does not answer") for place, rank in enumerate(members)}
        return table("where the ranks are", rows)


def _last(rows: tuple[Row, ...]) -> int:
    return max((row.sequence for row in rows), default=0)


def _made(rows: tuple[Row, ...], row: Row) -> bool:
    """Tell whether a rank that has told these calls has made one; a close counts by itself."""
    if row.signature.operation == "close":
        return any(one.signature.operation == "close" for one in rows)
    return _last(rows) >= row.sequence


def _first_difference(
    own: Mapping[int, Row], told: Iterable[Mapping[int, Row]], settled: int
) -> int | None:
    """Return the first call behind `settled`, by its number, of which somebody tells another.

    own: what this rank called, by number.  told: what others say that they did.
    """
    differ = (
        sequence
        for rows in told
        for sequence, row in rows.items()
        if sequence > settled and sequence in own and row.differs(own[sequence])
    )
    return min(differ, default=None)
