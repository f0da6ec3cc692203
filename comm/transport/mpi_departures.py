"""Notices between all ranks of a job beside their messages: who leaves it, and what is told."""

from __future__ import annotations

import functools
import gc
import threading
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np

from ..errors import CommTimeout, PeerLost
from .base import Channel
from .mpi_start import tell_of_end

_LEFT = 1
"""Tag of the notice that a rank leaves, on the control communicator."""

_TOLD = 2
"""Tag of notices beside all messages, there too."""

_DRAIN = 5.0
"""Seconds that a closing rank waits for the others, and for notices on their way."""

_NAP, _LOOK = 1e-4, 0.05
"""Seconds between two looks of a rank that waits for others to open a communicator: whether they
have come, and whether they have left."""

_GRACE = 2.0
"""Seconds that data of a rank that left may still be on its way."""


class Departures:
    """Who has left the job, as told by the leaving ranks; shared by all groups of a rank.

    groups: MPI's communicators, of all of these.  users: the transports that are open.
    """

    def __init__(self, mpi: Any, control: Any) -> None:
        self._mpi = mpi
        self._control = control
        self.left: dict[int, float] = {}
        self._announced = False
        self._ended = False
        # The rank, its watchdog, and other threads of the program tell and hear.
        self._lock = threading.RLock()
        self._notices: list[Any] = []
        self._sent = np.zeros(control.size, np.int64)
        self._received = np.zeros(control.size, np.int64)
        self.groups: list[Any] = [control]
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        _OPEN.add(self)
        tell_of_end(mpi, self)

    def mpi_ends(self) -> None:
        """Tell and hear nothing from now on, be it in other threads: MPI would end the job."""
        with self._lock:
            self._ended = True

    def announce(self) -> None:
        """Tell everybody that this rank leaves, once."""
        with self._lock:
            if self._announced or self._ended:
                return
            self._announced = True
            control = self._control
            self._notices += [
                control.Isend([b"", self._mpi.BYTE], rank, _LEFT)
                for rank in range(control.size)
                if rank != control.rank
            ]
            self._sent[np.arange(control.size) != control.rank] += 1

    def tell(self, ranks: Iterable[int], data: bytes) -> None:
        """Send a notice to ranks; what MPI still holds of earlier ones stays alive."""
        try:
            with self._lock:
                if self._ended:
                    return
                self._notices = [notice for notice in self._notices if not notice.Test()]
                for rank in ranks:
                    self._notices.append(self._control.Isend([data, self._mpi.BYTE], rank, _TOLD))
                    self._sent[rank] += 1
        except self._mpi.Exception:  # a dead rank hears nothing
            return

    def heard(self) -> list[tuple[int, bytes]]:
        """Return the notices that have come."""
        status, found = self._mpi.Status(), []
        with self._lock, suppress(self._mpi.Exception):  # where MPI goes on without a rank
            while message := self._found(_TOLD, status):
                data = bytearray(status.Get_count(self._mpi.BYTE))
                message.Recv([data, self._mpi.BYTE])
                self._received[status.Get_source()] += 1
                found.append((status.Get_source(), bytes(data)))
        return found

    def _found(self, tag: int, status: Any) -> Any:
        """Match a notice that has come, at once: another thread may look at the same time."""
        if self._ended:
            return None
        return self._control.Improbe(self._mpi.ANY_SOURCE, tag, status)

    def check(self, ranks: Iterable[int]) -> None:
        """Raise PeerLost where one of the ranks left, and what it sent has had time to arrive."""
        status = self._mpi.Status()
        try:
            with self._lock:
                while message := self._found(_LEFT, status):
                    src = status.Get_source()
                    message.Recv([bytearray(), self._mpi.BYTE])
                    self._received[src] += 1
                    self.left[src] = time.monotonic()
        except self._mpi.Exception as error:  # only where MPI goes on without a rank
            raise PeerLost(f"a rank of the job has died: {error}") from error
        for rank in ranks:
            if rank in self.left and time.monotonic() - self.left[rank] > _GRACE:
                raise PeerLost(
                    f"rank {rank} has left the job (its program ended) while rank "
                    f"{self._control.rank} waits for it"
                )

    def check_all(self, group: Any) -> None:
        """Raise PeerLost where a rank of an MPI group has left."""
        top = self._control.Get_group()
        places = self._mpi.Group.Translate_ranks(top, list(range(self._control.size)), group)
        self.check(rank for rank, place in enumerate(places) if place != self._mpi.UNDEFINED)

    def end(self) -> None:
        """Free the communicator of the notices, if none are left and none will be; collective."""
        if self._drained():
            _OPEN.discard(self)
            with self._lock:
                self._ended = True
                self._control.Free()

    def _drained(self) -> bool:
        """Receive every notice that was sent; tell whether all came, and none will. Collective.

        What is left in a communicator may meet receives of another one that MPI makes later.
        Groups that are still open on a rank, on whichever, go on to use it.
        """
        mine = np.stack([self._sent, np.full_like(self._sent, len(self.users))], axis=1)
        told = np.zeros_like(mine)
        due, open_groups = told.T
        end = time.monotonic() + _DRAIN
        try:
            asked = self._control.Ialltoall(mine, told)
            while not asked.Test() or (not open_groups.any() and (self._received < due).any()):
                self.heard()
                self.check(())
                if time.monotonic() > end:
                    return False
                time.sleep(1e-4)
        except (self._mpi.Exception, PeerLost):
            return False
        return not open_groups.any() and all(notice.Test() for notice in self._notices)


_OPEN: weakref.WeakSet[Departures] = weakref.WeakSet()
"""Those of this process whose notices can be heard."""


def groups_held() -> str:
    """Say how many groups this process has MPI hold, as it holds no more than so many."""
    gc.collect()  # dropped groups are parts of cycles
    users = sum(len(departures.users) for departures in _OPEN)
    held = sum((len(departures.groups) - 1) // len(Channel) for departures in _OPEN)
    return (
        f"; MPI holds {held} groups for this process, two for a Communicator, {held - users} of "
        "which were dropped without close()"
    )


def await_all(mpi: Any, comm: Any, timeout: float) -> None:
    """Wait for all ranks of an MPI communicator, as its own calls do unwatched; collective.

    In two steps, as an Assembly: what a rank has begun that gives up, it goes on with when it comes
    again. Who leaves the job is heard where a communicator of ours is open already.
    Raises: PeerLost, CommTimeout.
    """
    key = _begun(mpi)
    begun: list[Any] = comm.Get_attr(key) or []
    comm.Set_attr(key, begun)
    start = looked = time.monotonic()
    for step in range(2):
        if len(begun) == step:
            begun.append(comm.Ibarrier())
        while not begun[step].Test():
            time.sleep(_NAP)
            now = time.monotonic()
            if now - looked < _LOOK:
                continue
            looked = now
            for departures in list(_OPEN):
                departures.check_all(comm.Get_group())
            if now - start > timeout:
                raise CommTimeout(
                    f"rank {comm.rank} of {comm.size} waited {now - start:.1f} s for the others to "
                    "open a communicator as well"
                )
    comm.Delete_attr(key)


@functools.cache
def _begun(mpi: Any) -> int:
    """Return the key at which an MPI communicator holds what waits for its ranks."""
    return int(mpi.Comm.Create_keyval())
