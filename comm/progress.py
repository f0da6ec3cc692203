"""Advance the works of a rank while its program does other things.

Works advance in the order they were started, but a new one takes its first step before the others:
under one lock, by whoever comes, the rank that waits for one, or a background thread that looks now
and then while nobody waits.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .background import Background
from .callers import Callers
from .deaths import Deaths
from .errors import CommError, CommTimeout, MismatchError, PeerLost
from .forks import in_fork, when_forked
from .inquiry import Inquiry
from .patience import ASKS, Watch
from .serving import Waiting
from .timeline import WAIT, Timeline
from .trace import Ring
from .transport.base import Request
from .work import Steps, Work

if TYPE_CHECKING:
    from .express import Express
    from .runner import Runner

_MANY = 64
"""With more works in flight than these, a start does not always advance all others first."""

Picks = Callable[[Work], bool]
"""Tells whether a work is among those that are meant."""


class Progress:
    """The works of one rank, over all of its communicators."""

    def __init__(self, timeout: float, threads: bool) -> None:
        """timeout: seconds.  threads: whether a background thread may use the transports.

        owner: stays alive as long as any work does, to end it when MPI ends.
        """
        self.owner: object = None
        self.timeout = timeout
        self._threads = threads
        self.works: list[Work] = []
        self.ring = Ring()
        self.timeline: Timeline | None = None
        self.groups: weakref.WeakSet[Runner] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._callers = Callers()
        self._advancing = False
        self._forked = False
        self._rested = 0.0
        self._waiting = 0
        self._background = Background()
        self.inquiry: Inquiry | None = None
        self.deaths: Deaths | None = None
        when_forked(self.forked)

    def forked(self) -> None:
        """Refuse all calls, in a fork of the rank's process: works and groups are the rank's."""
        self._forked = True
        for work in self.works:
            work.leave()
        for group in self.groups:
            group.close()

    def require_own(self, rank: int) -> None:
        """Raise CommError in a fork of the rank's process, which works in flight do not belong to.

        What they touch is shared with the rank: it would wait for what another has taken.
        """
        if self._forked:
            raise in_fork(rank)

    def attend(self) -> None:
        """Let every group decide anew what its calls have to look at."""
        for group in self.groups:
            group.attend()

    def forget(self, group: str) -> None:
        """Let go of what is known of a group that is closed."""
        if self.inquiry is not None:
            self.inquiry.forget(group)

    def group(self, name: str) -> Runner | None:
        """Return a group that is open, by its name."""
        groups = (one for one in tuple(self.groups) if one.name == name and not one.closed)
        return next(groups, None)

    def alone(self) -> bool:
        """Tell whether no thread but this one has called anything, of those that live.

        Without the lock: who asks may hold one that a work wants as it advances.
        """
        return self._callers.alone()

    def start(self, make: Callable[[], Work], background: bool) -> Work:
        """Make a work, which starts it, and look after it until it has ended.

        background: it is to advance also while nobody waits for it.
        """
        with self._lock:
            self._require_uninterrupted()
            self._callers.note()
            try:
                self._advancing = True
                work = make()
                work.background = background
                if work.ended:
                    self.works.pop()
            finally:
                self._advancing = False
            # Others behind it: a message that a peer waits for is sent before one is received.
            self._advance_in_passing(work)
            if not work.ended:
                self._background.hurry()
        if background and not work.ended and self._threads:
            self._background.wake(self)
        return work

    def at_once(self, steps: Steps) -> bool:
        """Take the first steps of what is waited for, and may end by them; tell whether it has.

        As `start` does, without a work: for what ends sooner than one is made.
        """
        ended = False
        with self._lock:
            self._require_uninterrupted()
            self._callers.note()
            try:
                self._advancing = True
                steps.send(None)
                if not self.works:  # else there are others to look after, too
                    steps.send(True)
            except StopIteration:
                ended = True
            finally:
                self._advancing = False
            self._advance_in_passing()
        return ended

    def express(self, group: Runner, express: Express, tag: int, blocking: bool) -> bool:
        """Send or receive at once; tell whether that was done, else nothing was.

        blocking: the caller waits for it, and may as well look a while for a message to receive.
        """
        with self._lock:
            if self._advancing:
                self._require_uninterrupted()
            if group.attentive:
                return False
            self._callers.note()
            try:
                self._advancing = True
                done = express.run(tag, blocking and not self.works)
            finally:
                self._advancing = False
            if done and self.works:
                self._advance_in_passing()
        return done

    def equip(self, group: Runner, make: Callable[[], Express | None]) -> Express | None:
        """Make what sends or receives at once: it takes memory, as nothing else may meanwhile."""
        with self._lock:
            self._require_uninterrupted()
            group.require_open()
            try:
                self._advancing = True
                return make()
            finally:
                self._advancing = False

    @property
    def _deserted(self) -> bool:
        """Tell whether a work is in flight that is to advance while nobody waits."""
        return any(work.background for work in self.works)

    @property
    def idle(self) -> bool:
        """Tell whether the background has nothing to do here."""
        return bool(self._waiting) or not self._deserted

    def look(self) -> list[Waiting]:
        """Advance all works once, in the background; return them where compiled code can go on.

        Where it can go on with all as they are, leave them to it: it does not hold the lock.
        """
        with self._lock:
            waiting = self._compiled()
            if not all(one.work.running for one in waiting):
                waiting = []
            if not waiting:
                self._advance_all()
                waiting = self._compiled()
        return waiting

    def _compiled(self) -> list[Waiting]:
        """Return the works in flight where compiled code can go on with all of them."""
        pending = [r for work in self.works if work.background for r in work.pending]
        waiting = [request for request in pending if isinstance(request, Waiting)]
        return waiting if len(waiting) == len(pending) else []

    def advance(self) -> None:
        """Advance all works once; does nothing where another thread, or an outer call, is at it."""
        if self._lock.acquire(blocking=False):
            try:
                self._advance_all()
            finally:
                self._lock.release()

    def _advance_in_passing(self, new: Work | None = None) -> None:
        """Advance all works but a new one; of many, only so often that it takes half of the time.

        Nothing depends on it: a work never ends for certain by being advanced once.
        """
        if len(self.works) <= _MANY:
            self._advance_all(new=new)
            return
        start = time.monotonic()
        if start < self._rested:
            return
        self._advance_all(new=new)
        end = time.monotonic()
        self._rested = 2 * end - start

    def _advance_all(self, awaited: Work | None = None, new: Work | None = None) -> None:
        if self._advancing:
            return
        try:
            self._advancing = True
            for work in tuple(self.works):
                if work is not new and work.advance(work is awaited):
                    self.works.remove(work)
        finally:
            self._advancing = False

    def require_uninterrupted(self) -> None:
        """Raise CommError where the caller has come in between the steps of a work."""
        with self._lock:  # another thread that advances works is waited for
            self._require_uninterrupted()

    def _require_uninterrupted(self) -> None:
        """Refuse a call, under the lock, that has come in between the steps of a work.

        Such comes from a signal handler or a finalizer, in the thread that advances works: they
        are not at a point where another may start, and go on only after it has returned.
        """
        if self._advancing:
            raise CommError(
                "a signal handler or a finalizer has interrupted the works in flight: there "
                "nothing can be started, waited for or closed, only done() can be asked"
            )

    def poll(self, works: Sequence[Work]) -> None:
        """Advance all works once, and end those of `works` that cannot end by themselves any more.

        Who asks whether a work has ended, and does something else meanwhile, has to learn as well
        as who waits that a peer has gone, or has called something else.
        """
        self.advance()
        for work in works:
            if work.ended or self._advancing:  # a signal's handler asks, say, between its steps
                continue
            if work.watch is None:
                work.watch = Watch(work, math.inf, self.inquiry, self.deaths, False, False)
            try:
                work.watch.look(whole=bool(work.group))
            except (PeerLost, MismatchError) as error:
                self._despair(work, error)

    def wait(self, work: Work, timeout: float | None = None) -> None:
        """Advance works until `work` has ended.

        Raises: CommTimeout when time is up; PeerLost where a peer that is waited for is gone.
        """
        if self.timeline is None:
            self._wait(work, timeout)
            return
        with self.timeline.span(WAIT, work.receipt.operation):
            self._wait(work, timeout)

    def _wait(self, work: Work, timeout: float | None) -> None:
        patience = self.timeout if timeout is None else timeout
        asks = timeout is None or timeout >= ASKS
        counted = overdue = False
        try:
            with self._lock:
                self._require_uninterrupted()
                self._waiting, counted = self._waiting + 1, True
                overdue, work.overdue = work.overdue, False
                self._background.interrupt()
            watch = Watch(work, patience, self.inquiry, self.deaths, asks, timeout is None)
            while True:
                with self._lock:
                    self._advance_all(work)
                if work.ended:
                    return
                watch.pause()
        except CommTimeout:
            work.overdue = overdue or asks  # a look alone is not in vain
            raise
        except (PeerLost, MismatchError) as error:
            self._despair(work, error)
            raise
        finally:
            with self._lock:
                self._waiting -= counted
            if self._deserted and self._background.runs:
                self._background.wake(self)

    def _despair(self, work: Work, error: PeerLost | MismatchError) -> None:
        """Fail a work that will never end, and what hangs on it."""
        if isinstance(error, PeerLost):
            self.lose(work, error)
        elif work.group:
            self.disagree(work.group, error)
        else:
            with self._lock:
                work.fail(error)

    def lose(self, work: Work, error: PeerLost) -> None:
        """Fail a work that waits for a lost rank, and will never end; its buffers may be let go.

        With it those of its group that run in turn, by shared memory: theirs never comes.
        """
        group = work.group if work.receipt.transport == "shared" else ""
        with self._lock:
            for one in self.works:
                if group and (one.group, one.receipt.transport) == (group, "shared"):
                    one.fail(error)
            work.fail(error)

    def disagree(self, group: str, error: MismatchError) -> None:
        """Fail a group's works: ranks that disagree about one call do so about those behind it."""
        with self._lock:
            for one in self.works:
                if one.group == group:
                    one.fail(error)
        self.begin_anew(group)

    def settle(self, group: str, sequence: int) -> None:
        """Go on behind a call in which the ranks of a group differ, as each of them was told."""
        if self.inquiry is not None:
            self.inquiry.settle(group, sequence)
        self.begin_anew(group)

    def begin_anew(self, group: str) -> None:
        """Let the ranks of a group go on, whatever they have called so far."""
        runner = self.group(group)
        if runner is not None:
            runner.begin_anew()

    def give_up(self, picks: Picks, why: Callable[[Work], BaseException]) -> list[Request]:
        """End every work that `picks` picks, with an error; return what was under way.

        MPI may still know the buffers of these requests: keep them as long as that can be. Those in
        shared memory are not among them.
        """
        with self._lock:
            ended = [work for work in self.works if picks(work)]
            self.works = [work for work in self.works if not picks(work)]
            pending = [request for work in ended for request in work.pending]
            requests = [request for request in pending if not isinstance(request, Waiting)]
            for work in ended:
                work.fail(why(work))
        return requests

    def abandon(self, error: BaseException) -> list[Request]:
        """End the background thread and every work, as `give_up` does."""
        self.stop()
        return self.give_up(lambda work: True, lambda work: error)

    def stop(self) -> None:
        """End the background thread; works go on advancing in wait() and done()."""
        self._background.stop()
