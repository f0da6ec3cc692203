"""Go on without ranks that have died."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np

from .communicator import Communicator
from .errors import CommError, PeerLost
from .guard import Guard
from .settings import Settings, survives_failures

__all__ = ["Elastic", "Loss"]


@dataclass(frozen=True)
class Loss:
    """Tell of one recovery.

    ranks: those that died, as they were numbered before.  size: the ranks that go on.
    done: what the rank that was furthest had done.  root: that rank, as numbered now.
    seconds: from `recover` until this rank could go on.
    """

    ranks: tuple[int, ...]
    size: int
    done: int
    root: int
    seconds: float


class Elastic:
    """Hold the communicator of the ranks that live, through the death of others.

        with ringfold.Elastic() as world:
            done = 0
            while done < steps or not world.finished():
                try:
                    ...                 # one step over world.comm
                    done += 1
                except ringfold.PeerLost:
                    loss = world.recover(done)
                    ...                 # take model and optimizer from rank loss.root
                    done = loss.done

    Where a rank dies, every other one gets PeerLost from what it does over `comm`, or over a group
    made of it, and must call `recover`, which is collective over the living. `comm` is another one
    afterwards, with ranks numbered anew in the old order; the old one, and what was made of it, is
    of no use any more. Where a rank has died, leaving the block revokes MPI.COMM_WORLD, too.
    Messages travel over MPI only, since a rank that dies in shared memory leaves no word there.

    Collective. CommError unless the job was started so that MPI goes on: mpirun --with-ft ulfm.
    """

    comm: Communicator

    def __init__(self, *, settings: Settings | None = None) -> None:
        if not survives_failures():
            raise CommError(
                "MPI ends this job when a rank dies: start it by mpirun --with-ft ulfm, of Open "
                "MPI 5 or newer"
            )
        from .transport.mpi import Survivors

        found = settings or Settings.read()
        self._settings = replace(found, shared=False, compiled=False)
        self._survivors = Survivors()
        self._kept: list[Any] = []
        self._known = False
        self.losses: list[Loss] = []
        self._open()

    def _open(self) -> None:
        self._transport = self._survivors.open()
        self.comm = Communicator.over(self._transport, self._settings)
        if self._settings.abort:
            self.comm._guard = Guard(self._transport, self.comm._progress)

    def recover(self, done: int) -> Loss:
        """Go on without the dead; return who they were, and which rank is furthest.

        done: what this rank has done, in steps or any other measure that grows. Collective over
        the living. Other ranks may die meanwhile.
        """
        start = time.perf_counter()
        self._leave_old()
        while True:
            self._transport.revoke()
            if not self._known:
                self._survivors.agree(False)
            self._known = False
            dead = self._survivors.shrink()
            try:
                self._open()
                progress = self.comm.allgather(np.array([done], np.int64))[:, 0]
                break
            except CommError:  # one more has died
                self._leave_old()
        root = int(progress.argmax())
        loss = Loss(
            tuple(dead), self.comm.size, int(progress[root]), root, time.perf_counter() - start
        )
        self.losses.append(loss)
        return loss

    def finished(self) -> bool:
        """Return True once all living ranks ask this; collective with `recover`.

        PeerLost, on all of them, if one has died or is recovering: then recover, too.
        """
        if self._survivors.agree(True):
            return True
        self._known = True
        raise PeerLost("a rank has died while this one had nothing left to do")

    def _leave_old(self) -> None:
        error = PeerLost("this communicator is given up: a rank of it has died")
        self._kept += self.comm._progress.abandon(error)
        if self.comm._guard is not None:
            self.comm._guard.release()
        self.comm._closed = True

    def __enter__(self) -> Elastic:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.comm.close()
            self._survivors.leave()
