"""The end of a group: finish what is in flight, whatever other groups are at, and part."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..kernels.say import say
from .errors import CommError, CommTimeout
from .progress import Progress
from .transport.base import Request, Transport
from .work import Work

_LEAST = 1.0
"""Seconds that a rank waits for the others, also when it has spent its time on what was in flight;
and that a message may be on its way which was sent before all ranks came."""


class Closing:
    """One rank's part in closing a group.

    come: starts to wait for all ranks of the group, for the first time, or the second.
    """

    def __init__(
        self,
        transport: Transport,
        progress: Progress,
        timeout: float,
        name: str,
        come: Callable[[int], Work],
    ) -> None:
        self._transport, self._progress, self._name = transport, progress, name
        self._come = come
        self._timeout = timeout
        self._end = 0.0
        self._together = transport.together
        self._met: dict[int, Work] = {}

    def finish(self) -> list[Request]:
        """Finish the group's works; those that cannot end, end with an error.

        A rank that waited for what it receives, before the others came, might wait for one of them
        that sends it after this. Returns: what MPI may still know of works that were given up.
        """
        closes = f"closes {self._name}"
        self._end = time.monotonic() + self._timeout
        self._progress.drain(self._timeout, lambda work: self._own(work, False), closes)
        self.meet(1)
        self._progress.drain(_LEAST, lambda work: self._own(work, True), closes)
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
        if self._transport.size == 1 or not self._together:
            return False
        try:
            if number not in self._met:
                self._met[number] = self._come(number)
            self._met[number].wait(max(self._end - time.monotonic(), _LEAST))
        except CommTimeout as error:
            say(f"closing {self._name} without the others: {error}")
            self._together = False
        except CommError:  # a rank is gone, or has called something else and is told so
            self._together = False
        return self._together
