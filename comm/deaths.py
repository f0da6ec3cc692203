"""Know of the ranks on this node that have died, or were stopped, without a word from them."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .errors import PeerLost

_STATE_EVERY = 0.5
STOPPED_SECONDS = 3.0
"""A rank that is seen stopped for so long (SIGSTOP) is given up."""


@dataclass(frozen=True)
class Process:
    """A process of this node: `started` in clock ticks after boot tells a reused number apart."""

    pid: int
    started: int

    @classmethod
    def own(cls) -> Process:
        """Return this process."""
        pid = os.getpid()
        return cls(pid, int(_status(pid)[19]))

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Return the process of this number, None where there is none."""
        try:
            return cls(pid, int(_status(pid)[19]))
        except (OSError, IndexError):
            return None

    @property
    def state(self) -> str:
        """Return the letter of its state in proc(5), X where it is gone."""
        try:
            status = _status(self.pid)
            return status[0] if int(status[19]) == self.started else "X"
        except (OSError, IndexError):
            return "X"

    @property
    def lives(self) -> bool:
        """Tell whether it is there, seen from here, under this number."""
        return self.state not in "XZ"


def _status(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third, the state, on; see proc(5)."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()


class Deaths:
    """Watch the processes of this node's other ranks."""

    def __init__(self, processes: dict[int, Process], last: Callable[[int], str]) -> None:
        """processes: by rank in the world.  last: tells what such a rank did last."""
        self._last = last
        self._host = socket.gethostname()
        self._poll = select.poll()
        self._ranks: dict[int, int] = {}
        self._processes = processes
        self._stopped: dict[int, float] = {}
        self._looked = 0.0
        self._lock = threading.Lock()
        self.dead: dict[int, float] = {}
        for rank, process in processes.items():
            with contextlib.suppress(OSError):
                descriptor = os.pidfd_open(process.pid)
                if process.lives:
                    self._ranks[descriptor] = rank
                    self._poll.register(descriptor, select.POLLIN)
                else:  # of another space of process numbers
                    os.close(descriptor)

    def look(self) -> None:
        """Note who has died; never waits."""
        if not self._lock.acquire(blocking=False):
            return  # the other thread of this rank is at it
        try:
            for descriptor, _ in self._poll.poll(0):
                self._poll.unregister(descriptor)
                self.dead[self._ranks[descriptor]] = time.monotonic()
        finally:
            self._lock.release()

    def check(self, ranks: Iterable[int]) -> None:
        """Raise PeerLost where one of the ranks is dead, or has been stopped for long."""
        self.look()
        ranks = list(ranks)
        for rank in ranks:
            if rank in self.dead:
                raise PeerLost(self.told(rank))
        now = time.monotonic()
        if now - self._looked >= _STATE_EVERY:
            # Where this process was stopped as well, the time of that does not count.
            if now - self._looked > 4 * _STATE_EVERY:
                self._stopped.clear()
            self._looked = now
            for rank, process in self._processes.items():
                if process.state == "T":
                    self._stopped.setdefault(rank, now)
                else:
                    self._stopped.pop(rank, None)
        for rank in ranks:
            if now - self._stopped.get(rank, now) > STOPPED_SECONDS:
                raise PeerLost(f"{self._name(rank)} is stopped (SIGSTOP); {self._did(rank)}")

    def told(self, rank: int) -> str:
        """Return what is known of a rank that has died."""
        return f"{self._name(rank)} has died; {self._did(rank)}"

    def _name(self, rank: int) -> str:
        return f"rank {rank} (process {self._processes[rank].pid} on {self._host})"

    def _did(self, rank: int) -> str:
        return f"its last operation: {self._last(rank)}"

    def close(self) -> None:
        """Watch nobody any more."""
        with self._lock:
            for descriptor in self._ranks:
                with contextlib.suppress(KeyError):
                    self._poll.unregister(descriptor)
                os.close(descriptor)
            self._ranks.clear()
