"""See that MPI comes up, and goes down, with all ranks of this node.

MPI_Init and MPI_Finalize wait for every rank, for ever; and until a communicator is open its ranks
do not know each other's processes. A rank that stands still, or that ended before the others knew
it, is found by its process; what is known of it is written, and the job ended by ending this rank,
as the launcher takes that for a failure.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..kernels.say import flush, say
from .company import company, sees_launcher
from .deaths import STOPPED_SECONDS, Process
from .ending import Told, told_to_end
from .settings import Seat, Settings
from .texts import listed
from .waited import Waited

Why = Callable[[float], str]
Holds = Callable[[Process], bool]

_LOOK = 0.2
PATIENCE = 60.0
"""Seconds that ranks may take to start, and to open a communicator, whatever the deadline."""

_GRACE = 1.5
"""Seconds that the launcher is given to end the job by itself."""

_ALONE = Seat("", 0, 1, 1)


class Lookout:
    """Look after the ranks of this node beside this one, while MPI does not let it."""

    def __init__(self, seat: Seat | None = None, timeout: float = 0.0) -> None:
        """seat: of this rank; None, or that of a job of one, to look after nobody.

        timeout: seconds that the start may take; a short one is not meant for that.
        """
        self._seat, self._timeout = seat or _ALONE, max(timeout, PATIENCE)
        self._others: dict[int, Process] = {}
        self._since: dict[tuple[int, float], float] = {}

    @contextmanager
    def starting(self) -> Iterator[None]:
        """End this rank where one has died or stands still, or when time is up.

        A launcher that sees a rank end in the middle of the start ends the others, now and then
        without a word: then this rank says why.
        """
        if self._seat.size == 1:
            yield
            return
        self._sees = sees_launcher(self._seat)
        with told_to_end() as told, self._looking(self._why_not_started, told):
            yield

    @contextmanager
    def opening(self) -> Iterator[None]:
        """End this rank where another stands still while they open a communicator."""
        with self._looking(self._why_not_opened, None):
            yield

    @contextmanager
    def ending(self) -> Iterator[None]:
        """End this rank where another stands still; ranks may take as long as they need."""
        with self._looking(self._why_not_ended, None):
            yield

    @contextmanager
    def _looking(self, why: Why, told: Told | None) -> Iterator[None]:
        if self._seat.size == 1:
            yield
            return
        done = threading.Event()
        waited = Waited()
        self._others = company(self._seat)
        self._since.clear()

        def look() -> None:
            while not done.is_set():
                if told is not None and told.within(_LOOK):
                    self._end(self._why_told(), 128 + signal.SIGTERM)
                elif told is None:
                    done.wait(_LOOK)
                if waited.stopped():
                    self._since.clear()  # the others may have been stopped with this rank
                reason = why(waited.look())
                if reason and not done.is_set():
                    self._end(f"{reason}; ending the job", 1)

        thread = threading.Thread(target=look, name="ringfold-lookout", daemon=True)
        looking = _starts(thread)
        try:
            yield
        finally:
            done.set()
            if looking:
                if told is not None:
                    told.wake()
                thread.join()

    def _end(self, reason: str, status: int) -> None:
        flush()
        seat = self._seat
        say(f"rank {seat.rank} of {seat.size} {reason}")
        os._exit(status)

    def _why_told(self) -> str:
        """Say who has ended, when the launcher ends this rank."""
        here = "is told to end (SIGTERM) while it waits for MPI to start"
        gone = [self._name(rank) for rank, other in self._others.items() if not other.lives]
        known = {*self._others, self._seat.rank}
        if self._sees and self._seat.local_size > len(known):
            gone.append(self._missing(known))
        return f"{here}: {' and '.join(gone)} ended before it did" if gone else here

    def _why_not_started(self, waited: float) -> str:
        here = "waits for MPI to start, but"
        self._complete()
        known = {*self._others, self._seat.rank}
        if self._sees and self._seat.local_size > len(known) and waited > _GRACE:
            return f"{here} {self._missing(known)} ended before it did"
        gone = self._for_long(lambda process: not process.lives, _GRACE)
        if gone is not None:
            return f"{here} {self._name(gone)} has died"
        return self._why_stopped(here) or (
            f"has waited {waited:.0f} s for MPI to start; its node's other ranks are there, and "
            "those of other nodes may not be"
            if waited > self._timeout
            else ""
        )

    def _missing(self, known: set[int]) -> str:
        seat = self._seat
        if seat.local_size == seat.size:
            return " and ".join(f"rank {rank}" for rank in range(seat.size) if rank not in known)
        count = seat.local_size - len(known)
        others = listed(sorted(known))
        return f"{count} of the ranks of {socket.gethostname()}, other than {others},"

    def _complete(self) -> None:
        """Look for those who were not there yet."""
        if len(self._others) + 1 < self._seat.local_size:
            self._others = company(self._seat)

    def _why_not_opened(self, waited: float) -> str:
        self._complete()
        return self._why_stopped("opens a communicator, but")

    def _why_not_ended(self, waited: float) -> str:
        return self._why_stopped("waits for MPI to end, but")

    def _why_stopped(self, here: str) -> str:
        still = self._for_long(lambda process: process.state == "T", STOPPED_SECONDS)
        return "" if still is None else f"{here} {self._name(still)} is stopped (SIGSTOP)"

    def _for_long(self, holds: Holds, seconds: float) -> int | None:
        """Return a rank of which something has held for so long, None for none."""
        now = time.monotonic()
        for rank, process in self._others.items():
            if not holds(process):
                self._since.pop((rank, seconds), None)
            elif now - self._since.setdefault((rank, seconds), now) > seconds:
                return rank
        return None

    def _name(self, rank: int) -> str:
        return f"rank {rank} (process {self._others[rank].pid} on {socket.gethostname()})"


def lookout_for(settings: Settings) -> Lookout:
    """Return one for this process, as the settings want it."""
    return Lookout(Seat.read() if settings.watch else None, settings.timeout)


def _starts(thread: threading.Thread) -> bool:
    """Start a thread where it can be; MPI can be started and ended without anybody looking on.

    Python 3.12.0 to 3.12.2 starts none once the interpreter is ending (CPython issue 113964), which
    is when MPI is ended; later ones do again.
    """
    try:
        thread.start()
    except RuntimeError:
        return False
    return True
