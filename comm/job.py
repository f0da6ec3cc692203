"""What one process has once of the job that mpirun started, whatever its groups."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np

from .deadlocks import Deadlocks
from .deaths import Deaths, Process
from .errors import CommError
from .guard import Guard
from .inquiry import Inquiry
from .lookout import PATIENCE, lookout_for
from .progress import Progress
from .settings import Seat, Settings
from .trace import entries_in
from .transport.base import Request, Transport
from .watchdog import Watchdog

if TYPE_CHECKING:
    from .communicator import Communicator
    from .node_memory import NodeMemory


class Job:
    """This rank's part of the job: its messages, its works, and who looks after the others.

    guard: what ends the job on an exception; None where it is not wanted.
    closing: the group that all others are split from is closed.
    kept: what MPI may still read or write of works that were given up.
    users: what uses groups of this rank by itself, in the order in which it came.
    noted: what layers call on groups of this rank, while somebody notes it.
    """

    def __init__(self, transport: Transport, settings: Settings) -> None:
        self.transport = transport
        self.settings = settings
        self.progress = Progress(settings.timeout, transport.threads)
        progress, ring = self.progress, self.progress.ring
        deadlocks = Deadlocks(transport, ring, progress.group, progress.alone)
        progress.inquiry = Inquiry(transport, ring, deadlocks)
        self.guard: Guard | None = None
        self.watchdog: Watchdog | None = None
        self.progress.owner = self
        self.closing = False
        self._left = False
        self.kept: list[Request] = []
        self.users: WeakValueDictionary[object, Any] = WeakValueDictionary()
        self.noted: list[Any] | None = None

    @classmethod
    @contextmanager
    def started(cls, comm: Any, settings: Settings) -> Iterator[Job]:
        """Start MPI, and look after the node's other ranks until `watch` does; collective.

        comm: mpi4py's, MPI.COMM_WORLD where None.
        """
        if multiprocessing.parent_process() is not None:
            raise CommError(
                "a multiprocessing worker is no rank of the job: open the Communicator in the "
                "process that mpirun started, and call collectives there"
            )
        from .transport.mpi import MpiTransport, load_mpi, require_group
        from .transport.mpi_launch import require_own_place
        from .transport.mpi_start import Starting, process, tell_of_end

        if os.getpid() != process():
            raise CommError(
                f"this process is a fork of a rank, process {process()}, and cannot use its MPI: "
                "open the Communicator, and call collectives, in the process that mpirun started"
            )
        require_own_place()
        require_group(comm)
        seat = Seat.read()
        guard = Guard(Starting(seat)) if settings.abort else None
        lookout = lookout_for(settings)
        mpi = load_mpi(lookout)
        with lookout.opening():
            job = cls(MpiTransport.open(comm, max(settings.timeout, PATIENCE)), settings)
            for other in tell_of_end(mpi, job):
                if isinstance(other, Job):  # of the same rank, opened over another group
                    job.users = other.users
            if guard is not None:
                job.guard_by(guard)
                if job.transport.size == 1:
                    job.release()
            yield job

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Let a communicator open, with the time that a start may take, whatever the deadline.

        Ranks compile kernels for this machine meanwhile, and nobody answers yet for one that does.
        """
        self.progress.timeout = max(self.settings.timeout, PATIENCE)
        try:
            yield
        finally:
            self.progress.timeout = self.settings.timeout

    def guard_by(self, guard: Guard) -> None:
        """Let a guard end the job on an exception."""
        self.guard = guard
        guard.watch(self.transport, self.progress)

    def release(self) -> None:
        """Let exceptions be the program's own affair again."""
        if self.guard is not None:
            self.guard.release()
        self.guard = None

    def watch(
        self, world: Communicator, nodes: NodeMemory | None, *, survives: bool = False
    ) -> None:
        """Start the watchdog, and tell it of the other ranks of this node; collective.

        survives: MPI tells of the dead, and the job goes on without them.
        """
        if not self.settings.watch or (world.size == 1 and not survives):
            return
        inquiry = self.progress.inquiry
        assert inquiry is not None
        own = Process.own()
        mine = np.array([world.rank, own.pid, own.started])
        node = world.node.allgather(mine).tolist()
        ranks = [rank for rank, _, _ in node]
        known = {rank: Process(pid, started) for rank, pid, started in node if rank != world.rank}
        deaths = Deaths({} if survives else known, _last_of(ranks, nodes))
        self.progress.deaths = None if survives else deaths
        watchdog = Watchdog(inquiry, self.transport, deaths, self.settings.abort)
        watchdog.owner = self
        self.watchdog = watchdog
        files = world.node.allgather(np.array([watchdog.file])).ravel().tolist()
        of = dict(zip(ranks, files, strict=True))
        watchdog.start({rank: (process, of[rank]) for rank, process in known.items()})

    def leave_when_idle(self) -> None:
        """Leave where no group is open on this rank, be it one that was split from the world.

        Where nothing looks after the rank, as after one that is a thread, it leaves in any case:
        groups that are left advance when they are waited for.
        """
        alone = self.watchdog is None and self.guard is None
        # Dropped groups are parts of cycles; to look for these takes a fifth of a second.
        if alone or self._idle or (gc.collect() and self._idle):
            self.leave()

    @property
    def _idle(self) -> bool:
        return all(group.closed for group in self.progress.groups)

    def mpi_ends(self) -> None:
        """Refuse calls from now on, as MPI would end the job at the first of them."""
        if self._left and self._idle and not self.progress.works:
            return
        for group in self.progress.groups:
            group.close("MPI has been finalized")
        self.kept += self.progress.abandon(CommError("MPI has been finalized"))
        self.transport.leave()
        self.leave()

    def leave(self) -> None:
        """Go on with no work, and look after nobody, any more."""
        self._left = True
        self.progress.stop()
        if self.watchdog is not None:
            self.progress.deaths = None
            self.watchdog.stop()
            self.watchdog = None
        self.progress.ring.withdraw()
        self.release()


def _last_of(ranks: list[int], nodes: NodeMemory | None) -> Callable[[int], str]:
    """Return what tells the last operation of one of the node's ranks, from its memory."""
    traces = nodes.traces if nodes is not None and nodes.token else []

    def last(rank: int) -> str:
        entries = entries_in(traces[ranks.index(rank)], 1) if traces else ()
        return str(entries[-1]) if entries else "unknown"

    return last
