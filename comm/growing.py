"""Start processes in place of ranks that have died, but not for ever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import CommError, PeerLost
from .settings import started_in

if TYPE_CHECKING:
    from .transport.mpi_survivors import Survivors

_ALIVE, _ONWARD, _ONCE_MORE = 1, 2, 4
"""Flags that ranks agree on: none has died; all have done more since the last start; nobody has
started others too often. A rank that joins meanwhile has done nothing, and counted no starts."""


class Growth:
    """What starts a process for every rank that is missing.

    starts: in a row, without progress beyond what had been reached; newcomers learn of it.
    """

    def __init__(
        self, survivors: Survivors, command: Sequence[str] | None, attempts: int, timeout: float
    ) -> None:
        """command: None to start nothing.  timeout: seconds until what was started must come."""
        self._survivors, self._wanted = survivors, survivors.size
        self._command, self._folder = command, started_in()
        self._attempts, self._timeout = attempts, timeout
        self.starts = 0
        self._reached = -1

    def reached(self, done: int, starts: int) -> None:
        """Take what all ranks know now, those that have joined, too."""
        self._reached, self.starts = done, starts

    def grow(self, done: int) -> None:
        """Start what is missing; collective over the living.

        done: what this rank has done; -1 of one that is joining itself.
        Raises: CommError where that has been in vain too often, PeerLost where one more has died.
        """
        missing = self._wanted - self._survivors.size
        if self._command is None or not missing:
            return
        flags = _ONWARD * (done > self._reached) | _ONCE_MORE * (self.starts < self._attempts)
        agreed = self._survivors.agree(_ALIVE | flags)
        if not agreed & _ALIVE:
            raise PeerLost("a rank has died while others were to be started")
        if agreed & _ONWARD:
            self.reached(done, 0)
        elif not agreed & _ONCE_MORE:
            steps = f" ({done} steps are)" if done >= 0 else ""
            raise CommError(
                f"ranks that were started in place of dead ones have died {self._attempts} times "
                f"in a row, and nothing was done in between{steps}: see what they have printed; "
                "the others would start them for ever"
            )
        self.starts += 1
        self._survivors.grow(missing, self._command, self._folder, self._timeout)
