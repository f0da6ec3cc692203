"""The end of a group: finish what is in flight, whatever other groups are at, and part."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from ..kernels.say import say
from .assembly import Lasting
from .draining import drain
from .errors import CommError, CommTimeout, MismatchError
from .progress import Progress
from .transport.base import Request, Transport
from .work import Steps, Work

_LEAST = 1.0
"""Seconds that a rank waits for the others, also when it has spent its time on what was in flight;
and that a message may be on its way which was sent before all ranks came."""


class Closing:
    """One rank's part in closing a group.

    coming: what waits for all ranks of the group, for the first time, or the second.
    start: starts a work of such steps.  refuse: lets the group take no other call.
    together: whether the ranks come together, as far as is known; False once some did not.
    """

    def __init__(
        self,
        transport: Transport,
        progress: Progress,
        timeout: float,
        name: str,
        coming: Callable[[int], Steps],
        start: Callable[[Callable[[], Steps]], Work],
        refuse: Callable[[], None],
        together: bool,
    ) -> None:
        self._transport, self._progress, self._name = transport, progress, name
        self._coming, self._start, self._refuse = coming, start, refuse
        self._timeout = timeout
        self._end = 0.0
        self.together = together and transport.together
        self._steps: dict[int, Lasting] = {}
        self._works: dict[int, Work] = {}

    def finish(self) -> list[Request]:
        """Finish the group's works; those that cannot end, end with an error.

        A rank that waited for what it receives, before the others came, might wait for one of them
        that sends it after this. Returns: what MPI may still know of works that were given up.
        """
        closes = f"closes {self._name}"
        self._end = time.monotonic() + self._timeout
        drain(self._progress, self._timeout, lambda work: self._own(work, False), closes)
        self.meet(1)
        drain(self._progress, _LEAST, lambda work: self._own(work, True), closes)
        self._refuse()  # before: what another thread begins until then is given up with the rest
        return self._progress.give_up(lambda work: work.transport is self._transport, self._why)

    def _own(self, work: Work, receives: bool) -> bool:
        return work.transport is self._transport and work.receives is receives

    def _why(self, work: Work) -> CommError:
        rank = self._transport.rank
        return CommError(f"rank {rank}: {self._name} was closed while this was in flight: {work}")

    def meet(self, number: int) -> bool:
        """Wait for all ranks; tell whether they came. Where they do not, they may still look.

        Again after an interruption: what was sent then still counts.
        """
        if self._transport.size == 1 or not self.together:
            return False
        while self.together and not self._meet(number):
            pass
        return self.together

    def _meet(self, number: int) -> bool:
        """Wait for all ranks; tell whether that is over, or to be gone on with.

        Ranks that have called something else are told, and may come then. This one waits for them
        in another call than the one that they were told of: what they call next is seen, too.
        """
        steps = self._steps.setdefault(number, Lasting(partial(self._coming, number)))
        try:
            if number not in self._works:
                self._works[number] = self._start(steps.run)
            self._works[number].wait(max(self._end - time.monotonic(), _LEAST))
        except MismatchError as error:
            del self._works[number]
            if time.monotonic() < self._end:
                return False
            self._leave(error)
        except CommTimeout as error:
            self._leave(error)
        except CommError:  # a rank is gone
            self.together = False
        return True

    def _leave(self, error: CommError) -> None:
        say(f"closing {self._name} without the others: {error}")
        self.together = False
