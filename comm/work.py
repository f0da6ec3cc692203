"""The handle of an operation that was started."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..kernels.handlers import of_a_signal
from .arguments import seconds
from .errors import MismatchError
from .texts import listed
from .transport.base import Channel, Request, Transport

if TYPE_CHECKING:
    from .express import Express
    from .meeting import Meeting
    from .patience import Watch
    from .progress import Progress
    from .trace import Signature

Steps = Generator[list[Request], bool | None, Any]
"""An operation as a generator: yields the requests it waits for, returns its result.

It is sent True where somebody waits for it, and may then look longer before it yields again.
"""


@dataclass(frozen=True)
class Receipt:
    """What ran: the operation, and what was decided for it.

    chunks: how many the schedule cut the buffer into; 1 for point-to-point.
    nbytes: of the flat buffer on this rank.
    reason: why this algorithm was taken.
    """

    operation: str
    algorithm: str
    transport: str
    chunks: int
    nbytes: int
    reason: str = ""


class Behind:
    """A result that is there for the caller once its own stream follows what makes it.

    The stream follows where the thread that called sees that the operation has ended; earlier it
    would hold up what the caller puts on the stream meanwhile. Where nobody looks, it follows
    before the result is let go: who frees memory lets it be used again on that stream.
    """

    def __init__(self, result: Any, follow: Callable[[Any], None], transport: str = "") -> None:
        """follow: makes the caller's streams wait; must hold no reference to the array.

        It is given the result, or None where nobody looks.

        transport: that was taken, where the receipt left it open.
        """
        self.result, self.transport = result, transport
        self._follow: Callable[[Any], None] | None = follow
        self._process = os.getpid()

    def settle(self) -> Any:
        """Let the stream follow, once, and return the result."""
        self._let_follow(self.result)
        return self.result

    def _let_follow(self, result: Any) -> None:
        follow, self._follow = self._follow, None
        if follow is not None:
            follow(result)

    def __del__(self) -> None:
        if not sys.is_finalizing() and os.getpid() == self._process:  # streams are no fork's
            self._let_follow(None)


@dataclass(frozen=True)
class Prepared:
    """One operation, ready to run any number of times.

    channel: of its messages; None where it sends none.
    run: given its tag, does it; the generator returns the operation's result.
    signature: what was asked for.
    meeting: where the operation meets on a board.
    note: given (ring, call, sequence), lets the next run note itself there; None where it does not.
    background: somebody else may wait for it, so that it goes on also while nobody waits here.
    way: how its messages go, such as the algorithm, which all ranks must agree on too; "" for none.
    mark: of what was asked for, see fingerprint; part of the tags of a collective's messages.
    plain: it is nothing but this meeting, whose result is `owner`, or what `make` has made before,
        or `take` gives behind.
    take: gives the result that the last run of the meeting has made.
    make: makes an array for the next run of the meeting to write to; keeps none alive.
    carry: of a message, does it as `run`, given the array, which it does not keep alive, and a tag.
    express: of a message, makes what sends or receives it again at once, where something does.
    """

    receipt: Receipt
    channel: Channel | None
    run: Callable[[int], Steps]
    signature: Signature
    meeting: Meeting | None = None
    plain: bool = False
    owner: Any = None
    make: Callable[[], Any] | None = None
    take: Callable[[], Any] | None = None
    carry: Callable[[Any, int], Steps] | None = None
    express: Callable[[], Express | None] | None = None
    way: str = ""
    mark: int = 0
    background: bool = True
    note: Callable[[Any, int, int], None] | None = None


class Work:
    """One operation in flight. Keeps every buffer of the operation alive until it is done."""

    def __init__(
        self,
        steps: Steps | None,
        receipt: Receipt,
        transport: Transport,
        progress: Progress,
        group: str = "",
        result: Any = None,
    ) -> None:
        """Begin, among the works that `progress` looks after.

        steps: None for an operation that has ended well already, with a result.

        group: the name under which the ranks of a collective compare what they call.
        """
        self.receipt = receipt
        self.transport = transport
        self.group = group
        self.background = False
        self.told = False
        self.overdue = False  # somebody has waited for it in vain
        self.watch: Watch | None = None  # of who asks, and does not wait
        self._differs = False  # by itself it has found that the ranks' calls do; to be told
        # Where it stands among the group's calls: see notices.Standing.
        self.home, self.sequence, self.peer, self.count = group, 0, -1, 0
        self._steps = steps
        self._progress = progress
        self._result = result
        self._error: BaseException | None = None
        self.pending: list[Request] = []
        if steps is not None:
            progress.works.append(self)  # first, so that what a signal raises does not lose it
            self._take(steps, None)

    def advance(self, patient: bool = False) -> bool:
        """Go on as far as possible; tell whether the work has ended.

        patient: somebody waits for it, so that it may look a while; without, it never waits.

        For the progress engine, which holds the lock; users call done() or wait().
        """
        if self._steps is not None:
            self._take(self._steps, patient)
        return self._steps is None

    def _take(self, steps: Steps, patient: bool | None) -> None:
        try:
            try:
                self.pending = steps.send(patient)
            except StopIteration as stop:
                self._end(stop.value, None)
        except BaseException as error:  # the waiter raises it, whatever it is
            if self._steps is not None:
                steps.close()  # which a signal may have met right behind a step
                self._differs = isinstance(error, MismatchError) and bool(self.group)
                self._end(None, error)
            # Ctrl-C, or what another signal's handler raises, came by chance while this work went
            # on: it is for whoever runs now. The work ends all the same: its steps are broken off.
            if not isinstance(error, Exception) or of_a_signal(error):
                raise

    def fail(self, error: BaseException) -> None:
        """End the work with an error."""
        if self._steps is not None:
            self._steps.close()
            self._end(None, error)

    def leave(self) -> None:
        """Let the steps be, for good, in a fork of the rank's process.

        Where the garbage collector met them, or the end of the fork, they would give up, in memory
        that is shared with peers, what the rank itself is still at.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._steps))

    def _end(self, result: Any, error: BaseException | None) -> None:
        if error is not None:
            self.transport.soiled = True
        if type(result) is Behind and result.transport not in ("", self.receipt.transport):
            self.receipt = replace(self.receipt, transport=result.transport)
        self._steps, self._result, self._error, self.pending = None, result, error, []
        timeline = self._progress.timeline
        if timeline is not None:
            timeline.ended(self)

    @property
    def ended(self) -> bool:
        """Tell whether the work has ended, without trying to advance it."""
        return self._steps is None

    def takes(self, steps: Steps) -> bool:
        """Tell whether these are its steps, which it has not come to the end of."""
        return self._steps is steps

    @property
    def receives(self) -> bool:
        """Tell whether it waits for a message that nobody may ever send."""
        return self.receipt.operation == "recv"

    def __str__(self) -> str:
        peers = sorted({request.peer for request in self.pending})
        return f"{self.receipt.operation} ({self.receipt.nbytes} bytes) for ranks {listed(peers)}"

    def done(self) -> bool:
        """Tell whether the work has ended, well or not; never waits.

        A work that cannot end any more, of a peer that is gone, say, ends at that: wait() raises.
        """
        if self._steps is not None:
            self._progress.require_own(self.transport.rank)
            self._progress.poll([self])
        if type(self._result) is Behind:
            self._result = self._result.settle()
        return self._steps is None

    def exception(self) -> BaseException | None:
        """Return the error that ended the work, None where it ended well or goes on."""
        return self._error

    def wait(self, timeout: float | None = None) -> Any:
        """Wait until the work has ended and return its result.

        timeout: seconds; the communicator's own where None. With less than 2 s the error says for
            whom it waited, but not where they are; with 0 or less it looks once.

        Raises: CommTimeout when time is up, the work going on; else what ended the work.
        TypeError or ValueError for a timeout that is no number of seconds, ended or not.
        """
        if timeout is not None:
            seconds("timeout", timeout, positive=False)
        if self._steps is not None:
            self._progress.require_own(self.transport.rank)
            self._progress.wait(self, timeout)
        if self._error is not None:
            if self._differs:  # here, where all ranks are behind the same calls
                self._differs = False
                self._progress.settle(self.group, self.sequence)
            raise self._error
        if type(self._result) is Behind:
            self._result = self._result.settle()
        return self._result
