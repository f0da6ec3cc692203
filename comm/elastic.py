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
from .growing import Growth
from .guard import Guard
from .job import Job
from .lookout import PATIENCE, lookout_for
from .scope import Scope
from .settings import Settings, survives_failures

__all__ = ["Elastic", "Loss"]

_FINE, _FINISHED = 1, 2
"""Flags that living ranks agree on; a rank that has met a loss gives none."""


@dataclass(frozen=True)
class Loss:
    """Tell of one recovery.

    ranks: those that died, as they were numbered before.  size: the ranks that go on.
    done: what the rank that was furthest had done.  root: that rank, as numbered now.
    seconds: from `recover`, or since a new rank has met the others, until this rank could go on.
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
        self._kept: list[Any] = []
        self._known = False
        self._job: Job | None = None
        self._open_now: list[Communicator] = []
        self.losses: list[Loss] = []
        # One each, as MPI starts while this rank opens.
        starting, opening = lookout_for(self._settings), lookout_for(self._settings)
        try:
            with opening.opening():
                self._survivors = Survivors(max(self._settings.timeout, PATIENCE), starting)
                self._growth = Growth(self._survivors, command, attempts, self._settings.timeout)
                self.joined = self._survivors.joined
                if self.joined:
                    self._go_on(-1, [], joining=True)
                else:
                    self._open()
        except PeerLost as error:
            raise CommError(
                f"a rank has died before all had opened Elastic, which ends the job: {error}"
            ) from error

    def _open(self) -> None:
        self._transport = self._survivors.open()
        self._job = Job(self._transport, self._settings)
        self.comm = Communicator.of(self._job)
        self._open_now = [self.comm]
        if self._settings.abort:
            self._job.guard_by(Guard(self._transport))

    def recover(self, done: int) -> Loss:
        """Go on without the dead; return who they were, and which rank is furthest.

        done: what this rank has done, in steps or any other measure that grows. Collective over
        the living. Other ranks may die meanwhile.
        """
        self._leave_old()
        return self._go_on(done, list(range(self.comm.size)), joining=False)

    def _go_on(self, done: int, places: list[int], *, joining: bool) -> Loss:
        """Open over the living and those started in place of the dead, until none dies meanwhile.

        done: -1 of a rank that is joining.  places: the ranks that are told of if they die.
        joining: this rank has just been started, when the dead had been left out.
        """
        start = time.perf_counter()
        dead: list[int] = []
        whole = joining
        while True:
            try:
                if not whole:
                    lost = self._regroup()
                    dead += [places[rank] for rank in lost if rank < len(places)]
                    places = [place for rank, place in enumerate(places) if rank not in lost]
                    self._growth.grow(done)
                self._open()
                furthest, root, joined = self._progress(done, joining)
                self._agree(_FINE)  # so that all ranks have recovered, or none
                break
            except PeerLost:  # one more has died
                self._leave_old()
                whole = False
        if joined == self.comm.size:
            raise CommError(
                f"all ranks have died but those started in place of dead ones ({joined}): there "
                "is none to take anything from"
            )
        seconds = time.perf_counter() - start
        loss = Loss(tuple(dead), self.comm.size, furthest, root, seconds, joined)
        self.losses.append(loss)
        return loss

    def _regroup(self) -> list[int]:
        """Leave the dead out; return their ranks. Collective over the living."""
        if not self._known:
            self._survivors.agree(0)
        self._known = False
        return self._survivors.shrink()

    def _progress(self, done: int, joined: bool) -> tuple[int, int, int]:
        """Return what has been done at most, on which rank, and how many ranks are new."""
        rows = self.comm.allgather(np.array([done, joined, self._growth.starts], np.int64))
        root = int(rows[:, 0].argmax())
        furthest = int(rows[root, 0])
        self._growth.reached(furthest, int(rows[:, 2].max()))
        return furthest, root, int(rows[:, 1].sum())

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
        """Give up what is open, on this rank; what others wait for in it ends by that."""
        if self._job is None:
            return
        error = PeerLost("this communicator is given up: a rank of it has died")
        # MPI may still write to what is under way.
        self._kept += [*self._open_now, *self._job.progress.abandon(error)]
        self._job.leave()
        for comm in self._open_now:
            comm.give_up()
        self._transport.revoke()
        self._job, self._open_now = None, []

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
