"""Go on without ranks that have died."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import watchdog
from .arguments import whole, words
from .communicator import Communicator
from .errors import CommError, PeerLost
from .guard import Guard
from .job import Job
from .lookout import PATIENCE, lookout_for
from .scope import Scope
from .settings import Settings, started_in, survives_failures

__all__ = ["Elastic", "Loss"]

_FINE, _FINISHED = 1, 2
"""Flags that living ranks agree on; a rank that has met a loss gives none."""


@dataclass(frozen=True)
class Loss:
    """Tell of one recovery.

    ranks: those that died, as they were numbered before.  size: the ranks that go on.
    done: what the rank that was furthest had done.  root: that rank, as numbered now.
    seconds: from `recover` until this rank could go on.
    joined: how many of the last ranks are new.
    """

    ranks: tuple[int, ...]
    size: int
    done: int
    root: int
    seconds: float
    joined: int = 0


class Elastic(Scope):
    """Hold the communicator of the ranks that live, through the death of others.

        with ringfold.Elastic() as world:
            done, finished = 0, False
            while not finished:
                try:
                    if done < steps:
                        ...             # one step over world.comm
                        done += 1
                    else:
                        finished = world.finished()
                except ringfold.PeerLost:
                    ...                 # checkpoints.give_up(), where there are some
                    loss = world.recover(done)
                    ...                 # take model and optimizer from rank loss.root
                    done = loss.done

    Where a rank dies, every other one gets PeerLost from what it does over `comm`, or over a group
    made of it, and must call `recover`, which is collective over the living. `comm` is another one
    afterwards, with ranks numbered anew in the old order; the old one, and what was made of it
    (groups, plans, registered memory), is of no use any more, and its works have ended in PeerLost.
    `Checkpoints` over it may still write: call their `give_up` before others are made, else an old
    save that is slow ends behind a newer one, and passes for the newest.

    command: with it, `recover` starts this command, program first, as often as ranks have died: the
    newcomers are the last ranks of the new `comm`. In them the same program opens Elastic with the
    same arguments, `joined` is set, and `losses` holds the recovery that they are part of. They
    begin in the folder in which the launcher has started the ranks, wherever these have gone since.
    attempts: so many times in a row they are started without any progress in `done`; then `recover`
    raises CommError on all ranks. A process that dies before it opens Elastic is not seen by MPI:
    after the timeout of the settings (RINGFOLD_TIMEOUT) the ranks say so, and end.

    A process that ends in the middle, whatever its status, is a rank that has died. Of one that
    ends by os._exit with a status other than 0 MPI learns nothing: after the timeout the others,
    which wait in `recover`, `commit` or `finished`, say so, and end.

    Open it before anything imports mpi4py.MPI: where a rank has died, MPI_Finalize may wait for
    it for ever, and is left out then. Collective. CommError unless the job was started so that MPI
    goes on: mpirun --with-ft ulfm. TypeError or ValueError before that for arguments that are none.
    """

    comm: Communicator

    def __init__(
        self,
        *,
        settings: Settings | None = None,
        command: Sequence[str] | None = None,
        attempts: int = 3,
    ) -> None:
        settings = Settings.of(settings)
        command, attempts = words("command", command), whole("attempts", attempts, 1)
        if not survives_failures():
            raise CommError(
                "MPI ends this job when a rank dies: start it by mpirun --with-ft ulfm, of Open "
                "MPI 5 or newer"
            )
        from .transport.mpi_survivors import Survivors

        self._settings = settings
        if self._settings.watch:
            watchdog.catch(self)  # while one communicator is given up for another, too
        self._command, self._folder = command, started_in()
        self._attempts = attempts
        self._starts = 0  # in a row, without progress beyond _reached
        self._reached = -1
        self._kept: list[Any] = []
        self._known = False
        # One each, as MPI starts while this rank opens.
        starting, opening = lookout_for(self._settings), lookout_for(self._settings)
        try:
            with opening.opening():
                self._survivors = Survivors(max(self._settings.timeout, PATIENCE), starting)
                self._open()
        except PeerLost as error:
            raise CommError(
                f"a rank has died before all had opened Elastic, which ends the job: {error}"
            ) from error
        self.joined = self._survivors.joined
        self.losses: list[Loss] = []
        self._wanted = self.comm.size
        if self.joined:
            done, root, joined = self._progress(-1, True)
            self.losses.append(Loss((), self.comm.size, done, root, 0.0, joined))

    def _open(self) -> None:
        self._transport = self._survivors.open()
        self._job = Job(self._transport, self._settings)
        self.comm = Communicator.of(self._job)
        if self._settings.abort:
            self._job.guard_by(Guard(self._transport))

    def _progress(self, done: int, joined: bool) -> tuple[int, int, int]:
        """Return what has been done at most, on which rank, and how many ranks are new."""
        rows = self.comm.allgather(np.array([done, joined, self._starts], np.int64))
        root = int(rows[:, 0].argmax())
        self._reached, self._starts = int(rows[root, 0]), int(rows[:, 2].max())
        return self._reached, root, int(rows[:, 1].sum())

    def _grow(self, done: int, command: Sequence[str]) -> None:
        """Start a process for every rank that is missing; collective.

        Raises: CommError where that has been in vain too often.
        """
        missing = self._wanted - self._survivors.size
        if not missing:
            return
        if self._survivors.agree(int(done > self._reached)):
            self._starts = 0
        if self._starts == self._attempts:
            raise CommError(
                f"ranks that were started in place of dead ones have died {self._starts} times in "
                f"a row, and nothing was done in between ({done} steps are): see what they have "
                "printed; the others would start them for ever"
            )
        self._starts += 1
        self._survivors.grow(missing, command, self._folder, self._settings.timeout)

    def recover(self, done: int) -> Loss:
        """Go on without the dead; return who they were, and which rank is furthest.

        done: what this rank has done, in steps or any other measure that grows. Collective over
        the living. Other ranks may die meanwhile.
        """
        start = time.perf_counter()
        self._leave_old()
        dead: list[int] = []
        places = list(range(self.comm.size))
        while True:
            self._transport.revoke()
            if not self._known:
                self._survivors.agree(0)
            self._known = False
            lost = self._survivors.shrink()
            dead += [places[rank] for rank in lost if rank < len(places)]
            places = [place for rank, place in enumerate(places) if rank not in lost]
            try:
                if self._command is not None:
                    self._grow(done, self._command)
                self._open()
                furthest, root, joined = self._progress(done, False)
                break
            except PeerLost:  # one more has died
                self._leave_old()
        seconds = time.perf_counter() - start
        loss = Loss(tuple(dead), self.comm.size, furthest, root, seconds, joined)
        self.losses.append(loss)
        return loss

    def commit(self) -> None:
        """Return once all living ranks ask this, and all of them alike; collective.

        PeerLost, on all of them, if one has died or is recovering: then recover, too. So either
        all living ranks take what comes next as done, such as a step of the optimizer, or none.
        """
        self._agree(_FINE)

    def finished(self) -> bool:
        """Return True once all living ranks ask this; False where others `commit` meanwhile.

        Collective with `commit` and `recover`, and PeerLost as of `commit`.
        """
        return self._agree(_FINE | _FINISHED) == _FINE | _FINISHED

    def _agree(self, flags: int) -> int:
        agreed = self._survivors.agree(flags)
        if not agreed & _FINE:
            self._known = True
            raise PeerLost("a rank has died, or has met the death of one")
        return agreed

    def _leave_old(self) -> None:
        error = PeerLost("this communicator is given up: a rank of it has died")
        # MPI may still write to what is under way.
        self._kept += [self.comm, *self._job.progress.abandon(error)]
        self._job.leave()
        self.comm.give_up()

    def require_open(self) -> None:
        """Raise CommError where `comm` is closed; for the package's own use."""
        self.comm.require_open()

    def _leave(self, error: BaseException | None) -> None:
        if error is None:
            with suppress(PeerLost):  # all have done what there was to do
                self.comm.close()
            self._survivors.leave()
        if self._settings.watch:
            watchdog.let_go(self)
