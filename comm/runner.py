"""The way of every call of a group: noted, started, and waited for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.records import Count, Outcome, Status
from .again import Errand, Repeated
from .buffer import address_of
from .errors import CommError
from .fingerprint import history_with, shares_of, tag_of
from .forks import in_fork
from .progress import Picks, Progress
from .timeline import WAIT
from .trace import Held, Signature, Sites
from .transport.base import Channel, Transport
from .work import Prepared, Receipt, Steps, Work

if TYPE_CHECKING:
    from .express import Express
    from .meeting import Meeting
    from .notices import Standing

_COLLECTIVES, _MESSAGES, _HISTORY = map(int, (Count.COLLECTIVES, Count.MESSAGES, Count.HISTORY))
_DONE, _REFUSED = int(Status.DONE), int(Status.REFUSED)
_WELL, _FAILED = int(Outcome.DONE), int(Outcome.FAILED)
CLOSED = "the communicator is closed"


class Runner:
    """Run what was prepared for one group.

    name: what the group is called.
    counter: how many collectives, and messages, the group has begun, and the history of the former.
    messages: how many sends and receives were begun, by operation and peer.
    leaving: whether this rank has come to close the group.  closed: whether it has done so.
    progress: of this rank's works.
    attentive: whether a call has to look at more than the group's own state: it is refused, this
        rank records what it does, or this is a fork of the rank's process.
    """

    def __init__(self, transport: Transport, progress: Progress, name: str) -> None:
        self.name = name
        self.counter = np.zeros(Count.WORDS, np.int64)
        self._counts = self.counter.data
        self._tallies = {name: np.zeros(transport.size, np.int64) for name in ("send", "recv")}
        self.messages: dict[str, memoryview[int]]
        self.messages = {name: tally.data for name, tally in self._tallies.items()}
        self._shares = shares_of(transport.max_tag)
        self.closed, self.leaving = False, False
        self._refusal = ""
        self._transport = transport
        self.progress = progress
        self._ring = progress.ring
        self._sites = Sites()
        self._process = os.getpid()
        self.attend()
        progress.groups.add(self)

    def attend(self) -> None:
        """Decide anew what calls have to look at."""
        recorded = self.progress.timeline is not None
        self.attentive = bool(self._refusal) or recorded or os.getpid() != self._process

    def refuse(self, why: str = CLOSED) -> None:
        """Refuse every call from now on, but what `leave` begins."""
        self._refusal = why
        self.attend()

    def close(self, why: str = CLOSED) -> None:
        """Refuse every call: the group is closed."""
        self.closed = True
        self.refuse(why)

    def begin_anew(self) -> None:
        """Let ranks go on that differ in what they have called so far, as is known by now."""
        self._counts[_HISTORY] = 0

    def lacks(self, other: Standing) -> bool:
        """Tell whether another rank of the group waits for a call that this one has not made.

        After an error ranks may count their calls differently, and all that is certain is whether
        this rank has come to close the group.
        """
        operation, peer = other.row.signature.operation, other.place
        if operation == "close":
            return not self.leaving
        if self._transport.soiled:
            return False
        if operation == "recv":
            return self.messages["send"][peer] <= other.count
        if operation == "send":
            flying = self._receiving(peer)
            return not flying and self.messages["recv"][peer] < other.count
        return bool(self._counts[0] < other.row.sequence)

    def count(self, work: Work) -> int:
        """Return what `Standing.count` says of a work of this group's."""
        if work.receipt.operation == "recv":
            return self.messages["recv"][work.peer] - self._receiving(work.peer)
        return work.count

    def _receiving(self, peer: int) -> int:
        works = (work for work in tuple(self.progress.works) if work.transport is self._transport)
        return sum(work.receipt.operation == "recv" and work.peer == peer for work in works)

    def require_open(self) -> None:
        """Raise CommError where the group is closed, or this process is a fork of the rank's."""
        rank = self._transport.rank
        if os.getpid() != self._process:
            raise in_fork(rank)
        if self._refusal:
            raise CommError(f"rank {rank}: {self._refusal}")

    def _keep_up(self) -> None:
        """Let who records this rank take what is to leave the ring of operations."""
        timeline = self.progress.timeline
        if timeline is not None:
            timeline.keep_up()

    def run(self, meeting: Meeting, receipt: Receipt, owner: Any, result: Any) -> Any:
        """Run a meeting to its end; at once, without a Work, where nothing is in flight before.

        owner: of the memory that peers read or write meanwhile.  result: what is returned.
        """
        start = 0
        if self.attentive:
            self.require_open()
            self._keep_up()
            start = time.monotonic_ns()
        work = None
        try:
            if self.progress.works:
                work = self.fly(meeting, receipt, owner, result)
            elif (status := meeting.launch()) != _DONE:
                steps = self._steps(meeting, status, owner, result)
                work = self._advance(lambda: steps, receipt, background=False)
            if work is not None:
                if not work.ended:  # its wait() tells the timeline
                    start = 0
                work.wait()
        except BaseException as error:
            self._forsake(meeting, receipt, owner, error)
            raise
        if start and self.progress.timeline is not None:
            self.progress.timeline.add(WAIT, receipt.operation, start)
        return result

    def fly(self, meeting: Meeting, receipt: Receipt, owner: Any, result: Any) -> Work:
        """Start a meeting behind what is in flight; it may have ended when this returns."""
        self.require_open()
        if self.attentive:
            self._keep_up()
        try:
            if self.progress.works:
                return self._advance(
                    lambda: self._steps(meeting, meeting.launch(), owner, result), receipt, True
                )
            status = meeting.launch()
            if status == _DONE:
                return Work(None, receipt, self._transport, self.progress, self.name, result)
            return self._advance(lambda: self._steps(meeting, status, owner, result), receipt, True)
        except BaseException as error:
            self._forsake(meeting, receipt, owner, error)
            raise

    def _steps(self, meeting: Meeting, status: int, owner: Any, result: Any) -> Steps:
        """Return the steps of a known meeting that waits, which may be called from a new place."""
        if status != _REFUSED:
            meeting.place(self._ring, self._sites.here())
        return meeting.steps(owner, result, status)

    def _forsake(
        self, meeting: Meeting, receipt: Receipt, owner: Any, error: BaseException
    ) -> None:
        """Give up a meeting that an exception has come out of, also one that no work has yet."""
        self._break_off(receipt, error)
        if all(work.receipt is not receipt for work in self.progress.works):
            meeting.abandon(owner)

    def _break_off(
        self, receipt: Receipt, error: BaseException, picks: Picks | None = None
    ) -> None:
        """Give up the work of a call that an exception has come out of, as nobody has it.

        Not where ranks have an error in common; and what has waited in vain goes on, but for a
        receive: its message is left to the next call.
        """
        if receipt.operation == "recv" or not isinstance(error, CommError):
            picks = picks or (lambda work: work.receipt is receipt)
            self.progress.give_up(picks, lambda _: error)

    def start(self, prepared: Prepared, blocking: bool) -> Any:
        """Note a call and begin it."""
        return self.begin(prepared, blocking, self.note(prepared))

    def leave(self, prepared: Prepared) -> Work:
        """Begin what ranks come together by as they close the group, which may refuse all else."""
        work: Work = self.begin(prepared, False, self.note(prepared), last=True)
        return work

    def begin(self, prepared: Prepared, blocking: bool, call: int, *, last: bool = False) -> Any:
        """Begin what was noted as `call`; return its result, or its Work where not blocking.

        last: see `leave`.
        """
        if not last:
            self.require_open()
        if self.attentive:
            self._keep_up()
        try:
            work = self._begin(prepared, blocking, call, last)
            return work.wait() if blocking else work
        except BaseException as error:
            self._break_off(prepared.receipt, error)
            raise

    def _begin(self, prepared: Prepared, blocking: bool, call: int, last: bool) -> Work:
        if prepared.meeting is not None:  # it notes itself
            return self._advance(lambda: prepared.run(0), prepared.receipt, not blocking)
        message = None if prepared.channel is Channel.COLLECTIVE else prepared.signature

        def begin() -> Steps:
            counts, tag = self._counts, 0
            if message is not None:
                sequence = self._count_message(message)
            else:
                history = history_with(counts[_HISTORY], prepared.mark)
                # Side by side: what a signal's handler raises does not come between them.
                counts[_HISTORY] = history
                counts[_COLLECTIVES] = sequence = counts[_COLLECTIVES] + 1
                tag = tag_of(sequence, history, self._shares)
            if prepared.note is not None:
                prepared.note(self._ring, call, sequence)
                return prepared.run(tag)
            return self._ring.noted(prepared.run(tag), self._ring.begin(call, sequence))

        background = prepared.background and not blocking
        return self._advance(begin, prepared.receipt, background, message, last)

    def _count_message(self, message: Signature) -> int:
        """Count a message that begins; return its number among the group's."""
        self.messages[message.operation][message.peer] += 1
        self._counts[_MESSAGES] = sequence = self._counts[_MESSAGES] + 1
        return sequence

    def plan(self, prepared: Prepared) -> Callable[[], Any]:
        """Return what runs an operation to its end, again and again, as called from here."""
        self.require_open()
        call, meeting = self.note(prepared), prepared.meeting
        if not prepared.plain or meeting is None:
            return partial(self._repeat, prepared, call, self._ring.hold(call))
        owner, make, take = prepared.owner, prepared.make, prepared.take
        result = owner if make is None else make()
        step = partial(self.run, meeting, prepared.receipt, (owner, result), result)
        return step if take is None else partial(_taken, step, take)

    def _repeat(self, prepared: Prepared, call: int, _: Held) -> Any:
        return self.begin(prepared, True, call)

    def repeated(self, prepared: Prepared) -> Repeated:
        """Return a collective that is nothing but a meeting, to be run again from here."""
        self.note(prepared)
        assert prepared.meeting is not None
        return Repeated(prepared.meeting, prepared.receipt, prepared.make, prepared.take)

    def errand(self, prepared: Prepared) -> Errand:
        """Return a message, to be sent or received again from here."""
        call, carry = self.note(prepared), prepared.carry
        assert carry is not None
        held, background = self._ring.hold(call), prepared.background
        message, receipt, equip = prepared.signature, prepared.receipt, prepared.express
        return Errand(message, receipt, carry, background, call, held, equip)

    def express(self, errand: Errand, tag: int, blocking: bool) -> bool:
        """Send or receive at once; tell whether that was done, else nothing was."""
        express = errand.express or self._equipped(errand)
        return express is not None and self.progress.express(self, express, tag, blocking)

    def _equipped(self, errand: Errand) -> Express | None:
        """Return what sends, or receives, at once from now on a message that comes again."""
        equip, errand.equip = errand.equip, None
        express = None if equip is None else self.progress.equip(self, equip)
        if express is not None:
            message, counter = errand.message, address_of(self.counter)
            tally = address_of(self._tallies[message.operation]) + 8 * message.peer
            express.note_in(self._ring, errand.call, counter, tally)
            errand.express = express
        return express

    def ended(self, errand: Errand, x: Any) -> Work:
        """Return the Work of a message that was sent or received at once."""
        return Work(None, errand.receipt, self._transport, self.progress, "", x)

    def carry(self, errand: Errand, x: Any, tag: int, blocking: bool) -> Any:
        """Send or receive x; at once, without a Work, where it need not wait behind others.

        Returns: x, or the Work where not blocking.
        """
        entry: list[int] = []
        going = self._carrying(errand, x, tag, entry)
        at_once = blocking
        if self.attentive:
            self.require_open()
            self._keep_up()
            at_once = False
        try:
            if at_once and self.progress.at_once(going):
                return x
            background = errand.background and not blocking
            work = self._advance(lambda: going, errand.receipt, background, errand.message)
            if not work.ended:  # it may be called from a new place
                self._ring.place(entry[0], self._sites.here())
            return work.wait() if blocking else work
        except BaseException as error:
            self._break_off(errand.receipt, error, lambda work: work.takes(going))
            if not any(work.takes(going) for work in self.progress.works):
                going.close()
            raise

    def _carrying(self, errand: Errand, x: Any, tag: int, entry: list[int]) -> Steps:
        """entry: takes the number of this run in the ring."""
        if self._refusal:  # since this call looked, for another thread's sake
            self.require_open()
        ring, outcome = self._ring, _FAILED
        number = ring.begin(errand.call, self._count_message(errand.message))
        entry.append(number)
        try:
            yield from errand.carry(x, tag)
            outcome = _WELL
            return x
        except BaseException:
            self._transport.soiled = True
            raise
        finally:
            ring.end(number, outcome)

    def note(self, prepared: Prepared) -> int:
        """Tell the ring of operations what is called, and where; return how it refers to that."""
        site = self._sites.here()
        size, way = self._transport.size, prepared.way
        call = self._ring.intern(prepared.signature, self.name, size, site, way)
        if prepared.meeting is not None:
            prepared.meeting.called(self._ring, call)
        return call

    def _advance(
        self,
        begin: Callable[[], Steps],
        receipt: Receipt,
        background: bool,
        message: Signature | None = None,
        last: bool = False,
    ) -> Work:
        """message: what was asked for, of one between two ranks.  last: see `leave`."""
        group = self.name if message is None else ""

        def make() -> Work:
            if self._refusal and not last:  # since this call looked, for another thread's sake
                self.require_open()
            work = Work(begin(), receipt, self._transport, self.progress, group)
            work.home = self.name
            if message is None:
                work.sequence = self._counts[_COLLECTIVES]
            else:
                work.sequence, work.peer = self._counts[_MESSAGES], message.peer
                work.count = self.messages[message.operation][message.peer]
            return work

        return self.progress.start(make, background)


def _taken(step: Callable[[], Any], take: Callable[[], Any]) -> Any:
    step()
    return take()
