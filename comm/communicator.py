"""The one stateful object that users meet."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from .buffer import ordinary, registered
from .calls import GroupCalls
from .closing import Closing
from .errors import CommError, MismatchError
from .job import Job
from .operations import Operations
from .runner import CLOSED, Runner
from .scope import Scope
from .settings import Settings, unlike
from .sharing import Sharing
from .splitting import Splitting, color_of, key_of
from .timeline import Timeline
from .topology import Nodes
from .trace import Entry, group_within
from .transport.base import Transport
from .tune import Tuning, load
from .work import Steps, Work

if TYPE_CHECKING:
    from .device_ways import DeviceWays
    from .node_memory import NodeMemory
    from .stragglers import Stragglers


class Communicator(GroupCalls, Scope):
    """Collectives and messages between the ranks of one group.

    `Communicator()` duplicates MPI.COMM_WORLD, and `Communicator(mpi_comm)` a communicator of
    mpi4py's, so that nothing here meets the program's own messages; creating one is collective. It
    keeps its memory, its thread and what MPI has for it until close(): one that is dropped, too.
    All ranks call the same collectives in the same order, from one thread at a time. `root`, `dst`
    and `src` are ranks of this group. Half-width floats are added in float32 and rounded once.

    x is a NumPy array, a CPU torch tensor, or anything that speaks DLPack or the buffer protocol;
    strided views are read and written by logical element, in place where it says so. In GPU memory
    it is what publishes the CUDA array interface, contiguous: CuPy arrays, CUDA torch tensors; the
    caller's stream at the call orders it with the caller's other work. With blocking=False a
    collective returns a Work; x must not be touched until it has ended.

    `algorithm` names an algorithm of `ringfold.comm.algorithms`, or is a Schedule, which is proven
    before it runs.

    Attributes:
        rank: this rank's number in the group, from 0.
        size: how many ranks the group has.
        node: the communicator of those of its ranks that share this rank's node.

    Raises: CommError without an MPI library or with the launcher of another, inside a
    multiprocessing worker or a script that a rank has started (docs/faults.md), and after close();
    its children MismatchError where the ranks' settings or calls differ, CommTimeout on a rank that
    waited `Settings.timeout` seconds in vain, PeerLost where a rank that is waited for has gone.
    ValueError or TypeError for bad arguments, before anything is sent.
    """

    rank: int
    size: int
    node: Communicator

    def __init__(self, comm: Any = None, *, settings: Settings | None = None) -> None:
        with Job.started(comm, Settings.of(settings)) as job, job.opening():
            self._join(job)
            job.watch(self, self._nodes)

    @classmethod
    def of(cls, job: Job) -> Communicator:
        """Open over all ranks of a job that goes on when some die; collective."""
        made = cls.__new__(cls)
        with job.opening():
            made._join(job)
            job.watch(made, made._nodes, survives=True)
        return made

    @classmethod
    def over(
        cls, transport: Transport, settings: Settings | None = None, *, name: str = "world"
    ) -> Communicator:
        """Open over a transport; collective over its ranks.

        name: unlike that of others over a part of the same world.
        """
        made = cls.__new__(cls)
        made._open(Job(transport, Settings.of(settings)), transport, name)
        return made

    def _join(self, job: Job) -> None:
        """Take all that the job's ranks can share; collective."""
        self._open(job, job.transport, "world")
        self._compare_settings()
        self._share()
        self._use(load(self, self._settings.tuning, self._transport.library))

    def _open(self, job: Job, transport: Transport, name: str, *, is_node: bool = False) -> None:
        self.rank, self.size = transport.rank, transport.size
        self._job = job
        self._settings = job.settings
        self._transport = transport
        GroupCalls.__init__(
            self, Runner(transport, job.progress, name), Operations(transport, job.settings)
        )
        coming, come = self._operations.coming("split"), partial(self._come, "split")
        self._splitting = Splitting(job, transport, name, coming, come)
        self._closing: Closing | None = None
        self._ending = threading.RLock()  # a second thread that closes it waits for the first
        self._tuning: Tuning | None = None
        self._sharing: Sharing | None = None
        self.node = (
            self
            if is_node
            else self._part(transport.node(), group_within(name, "node"), is_node=True)
        )
        if self.node.size < self.size:
            self._operations.choice.place(self._find_nodes())

    def _part(self, transport: Transport, name: str, *, is_node: bool = False) -> Communicator:
        """Return the communicator of some of the job's ranks; collective over these."""
        part = Communicator.__new__(Communicator)
        part._open(self._job, transport, name, is_node=is_node)
        return part

    def _compare_settings(self) -> None:
        """Refuse, on every rank, to open where ranks would miss each other; collective."""
        differ = unlike(self.allgather(np.array(self._settings.alike)).tolist())
        if differ:
            raise MismatchError(f"the ranks' settings differ: {differ}")

    def _find_nodes(self) -> Nodes:
        """Tell every rank which ranks share a node; collective."""
        lowest = self.node.broadcast(np.array([self.rank]))
        return Nodes.labelled(self.allgather(lowest).ravel().tolist())

    @property
    def _nodes(self) -> NodeMemory | None:
        return None if self._sharing is None else self._sharing.nodes

    def _share(self) -> None:
        """Map the memory of the ranks on this node; collective."""
        if self._settings.shared:
            from .node_memory import NodeMemory

            nodes = NodeMemory(self.node, self._settings.cma)
            if nodes.token and nodes.memory is not None:
                self._progress.ring.move(nodes.memory.trace)
            self._meet(nodes)

    def _meet(self, nodes: NodeMemory) -> None:
        """Meet in shared memory where all ranks of the group can; collective."""
        if self.node is not self and self.node._sharing is None:
            self.node._meet(nodes)
        self._sharing = sharing = Sharing(self, nodes)
        if sharing.board is not None:
            inquiry = self._progress.inquiry
            assert inquiry is not None  # a job has one from its start
            settle = partial(inquiry.settle, self.name)
            sharing.board.note_in(self._progress.ring, self._runner.counter, settle)
        self._operations.share(sharing.memory, sharing.board, sharing.mail, nodes.reason)

    def _use(self, tuning: Tuning | None) -> None:
        self._tuning = tuning
        self._operations.choice.tune(tuning)
        if self.node is not self:
            self.node._use(tuning)

    def recent(self, last: int = 16) -> tuple[Entry, ...]:
        """Return the last operations of this rank over all of its groups, the oldest first.

        At most 256 are kept. Not collective.
        """
        return self._progress.ring.entries(last)

    @property
    def name(self) -> str:
        """Return what this group is called: by what was split from what."""
        return self._runner.name

    def stragglers(self) -> Stragglers:
        """Return who came last to this group's last collectives, and by how much; collective."""
        from .stragglers import stragglers

        return stragglers(self)

    @property
    def timeline(self) -> Timeline | None:
        """Return where this rank records what it does, None while nobody traces."""
        return self._progress.timeline

    def start_timeline(self) -> Timeline:
        """Record from now on what this rank does, over all of its groups; not collective."""
        progress = self._progress
        if progress.timeline is not None:
            raise CommError(f"rank {self.rank} is traced already")
        progress.timeline = timeline = Timeline(progress.ring)
        progress.attend()
        return timeline

    def stop_timeline(self) -> None:
        """Record no longer."""
        progress = self._progress
        if progress.timeline is not None:
            progress.timeline.stop()
        progress.timeline = None
        progress.attend()

    @property
    def users(self) -> MutableMapping[object, Any]:
        """Return what uses groups of this rank by itself; for the package's own use.

        What stands here is not kept alive by it, and in the order in which it came.
        """
        return self._job.users

    @property
    def noted(self) -> list[Any] | None:
        """Return the notes of what layers call, while they are taken; for the package's own use."""
        return self._job.noted

    @noted.setter
    def noted(self, calls: list[Any] | None) -> None:
        self._job.noted = calls

    @property
    def members(self) -> tuple[int, ...]:
        """Return the group's ranks as they are numbered in what was opened first.

        For the package's own use.
        """
        return self._transport.world

    @property
    def transport(self) -> str:
        """Return what carries the messages: "mpi", or "local" between threads of one process."""
        return self._transport.name

    @property
    def library(self) -> str:
        """Return what carries the messages, with its version."""
        return self._transport.library

    def __copy__(self) -> Communicator:
        return self

    def __deepcopy__(self, memo: Any) -> Communicator:
        return self  # so that modules that hold it can be copied, as averages of weights do

    def __reduce__(self) -> Any:
        raise TypeError(f"{self} has no pickle: it belongs to this process; open one in each")

    def __repr__(self) -> str:
        return f"Communicator(rank {self.rank} of {self.size}, {self._transport.name})"

    # -- memory ---

    def empty(
        self, shape: int | tuple[int, ...], dtype: Any = np.float32, *, device: str = "cpu"
    ) -> Any:
        """Return an uninitialised array in registered memory, which the node's ranks map.

        Collectives read it in place, without a copy, when every rank passes such an array, or a
        contiguous view of one. It belongs to this communicator and to groups split from it. Not
        collective; where nothing can be shared it is ordinary memory. dtype: of NumPy or of torch;
        the array is of the same library. device: "cuda" for memory of this rank's GPU, in an
        allocation of its own.

        Raises: MemoryError where no space is left, of "cuda" behind what CuPy and torch had spare;
        CommError for "cuda" without a GPU; TypeError for a dtype that no operation takes.
        """
        lengths: Iterable[Any] = shape if isinstance(shape, Iterable) else (shape,)
        shape = tuple(map(operator.index, lengths))
        self._runner.require_open()
        if device != "cpu":
            if device != "cuda":
                raise ValueError(f"device {device!r}: expected 'cpu' or 'cuda'")
            from .transport.device import empty

            return empty(self.node.rank, shape, dtype)
        memory = None if self._sharing is None else self._sharing.memory
        return ordinary(shape, dtype) if memory is None else registered(memory, shape, dtype)

    # -- groups ------------------------------------------------------------------------------

    @overload
    def split(self, color: int, key: int = ...) -> Communicator: ...
    @overload
    def split(self, color: None, key: int = ...) -> None: ...

    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """Return the Communicator of the ranks that give the same color, ordered by (key, rank).

        Collective. A rank that gives None gets None. MPI holds a group until it is closed, which
        one that is dropped is not, and no more than so many: MPICH 2048, of which each needs four.

        Raises: TypeError for a color or a key that is no whole number; ValueError for a color that
        is negative or above 2**31 - 1, or a key of more than 32 bits.
        """
        color = None if color is None else color_of(color)
        key = key_of(key)
        self._runner.require_open()
        group, name = self._splitting.part(color, key)
        if group is None:
            return None
        made = self._part(group, name)
        if self._nodes is not None:
            made._meet(self._nodes)
        made._use(self._tuning)
        return made

    def close(self) -> None:
        """Finish what is in flight and give the group back; collective, and idempotent.

        Groups that were split from it go on. A receive whose message no rank has sent before
        it came here ends with CommError.
        """
        with self._ending:
            if not self._runner.closed:
                self._close(together=True)

    def _close(self, *, together: bool) -> None:
        """together: whether the ranks may all come; else they are not waited for."""
        self._progress.require_uninterrupted()
        self._runner.leaving = True
        coming = self._operations.coming("close")
        closing = self._closing = self._closing or Closing(
            self._transport,
            self._progress,
            self._settings.timeout,
            self.name,
            coming,
            self._leave_by,
            self._runner.refuse,
            together,
        )
        self._job.kept += closing.finish()
        kept = [] if self._device_operations is None else self._device_operations.close()
        self._unshare(closing)  # behind which no rank uses what is kept
        del kept
        self._runner.close()
        self._progress.forget(self.name)
        if self.node is not self:  # of whom some did not come before, either
            self.node._close(together=closing.together)
        self._job.closing |= self._transport is self._job.transport
        if self._job.closing:
            self._job.leave_when_idle()
        self._transport.close()

    def _come(self, operation: str, steps: Callable[[], Steps]) -> Work:
        work: Work = self._start(self._operations.come(operation, steps), False)
        return work

    def _leave_by(self, steps: Callable[[], Steps]) -> Work:
        return self._runner.leave(self._operations.come("close", steps))

    def _find_devices(self) -> DeviceWays:
        from .transport.gpu_aware import cuda_ways

        return cuda_ways(self)

    def _unshare(self, closing: Closing) -> None:
        """Give board and boxes back, once nobody looks at them any more.

        With the last group that refers to it, a rank unmaps its node's memory; what `empty` has
        lent stays.
        """
        sharing = self._sharing
        if sharing is None:  # the same on all ranks
            return
        self.forget()
        sharing.refuse(CLOSED)
        if self.size == 1 or closing.meet(2):
            self._operations.close()
            sharing.close()
            self._sharing = None

    def give_up(self) -> None:
        """Refuse every call from now on; not collective, for a group that has lost a rank."""
        self._runner.close()

    def require_open(self) -> None:
        """Raise CommError where the group is closed; for the package's own use."""
        self._runner.require_open()

    def _leave(self, error: BaseException | None) -> None:
        if error is None:
            self.close()
