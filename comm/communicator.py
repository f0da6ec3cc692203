"""The one stateful object that users meet."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.records import Status
from .buffer import allocate, registered
from .deaths import Deaths, Process
from .device import on_device
from .dtypes import dtype_named
from .errors import CommError
from .fingerprint import tag_of
from .guard import Guard
from .inquiry import Inquiry
from .lookout import Lookout
from .memo import Memo
from .operations import Operations
from .progress import Progress
from .schedule import Schedule
from .settings import Seat, Settings
from .timeline import WAIT, Timeline
from .topology import Nodes
from .trace import Entry, Sites, entries_in
from .transport.base import Channel, Transport
from .tune import Tuning, parse, share_text
from .watchdog import Watchdog
from .work import Prepared, Receipt, Steps, Work

if TYPE_CHECKING:
    from .board import Board
    from .device_ways import DeviceWays
    from .mailboxes import Mailboxes
    from .meeting import Meeting
    from .node_memory import NodeMemory
    from .stragglers import Stragglers

Algorithm = str | Schedule | None

_DONE = int(Status.DONE)


class Communicator:
    """Collectives and messages between the ranks of one group.

    `Communicator()` duplicates MPI.COMM_WORLD, and `Communicator(mpi_comm)` a communicator of
    mpi4py's, so that nothing here meets the program's own messages; creating one is collective.
    All ranks call the same collectives in the same order, from one thread at a time. `root`, `dst`
    and `src` are ranks of this group. Half-width floats are added in float32 and rounded once.

    x is a NumPy array, a CPU torch tensor, or anything that speaks DLPack or the buffer protocol;
    strided views are read and written by logical element, in place where it says so. In GPU memory
    it is what publishes the CUDA array interface, contiguous: CuPy arrays, CUDA torch tensors; the
    caller's stream at the call orders it with the caller's other work. With blocking=False a
    collective returns a Work; x must not be touched until it has ended.

    `algorithm` names an algorithm of `ringfold.comm.algorithms`, or is a Schedule, which is proven
    before it runs.

    Raises: CommError without an MPI library, inside a multiprocessing worker, and after close().
    ValueError or TypeError for bad arguments, before anything is sent.
    """

    rank: int
    size: int
    node: Communicator

    def __init__(self, comm: Any = None, *, settings: Settings | None = None) -> None:
        self._settings = settings or Settings.read()
        if multiprocessing.parent_process() is not None:
            raise CommError(
                "a multiprocessing worker is no rank of the job: open the Communicator in the "
                "process that mpirun started, and call collectives there"
            )
        from .transport.mpi import MpiTransport
        from .transport.mpi_start import Starting

        seat = Seat.read()
        guard = Guard(Starting(seat)) if self._settings.abort else None
        lookout = None
        if seat is not None and seat.size > 1 and self._settings.watch:
            lookout = partial(Lookout, seat, self._settings.timeout)
        transport = MpiTransport.open(comm, lookout)
        progress = Progress(self._settings.timeout, transport.threads)
        progress.inquiry = Inquiry(transport, progress.ring)
        if guard is not None:
            guard.watch(transport, progress)
            if transport.size == 1:
                guard.release()
                guard = None
        self._open(transport, progress, guard)
        self._top = True
        self._share()
        self._read_tuning()
        if self._settings.watch and self.size > 1:
            self._watch()

    @classmethod
    def over(
        cls, transport: Transport, settings: Settings | None = None, *, name: str = "world"
    ) -> Communicator:
        """Open over a transport; collective over its ranks.

        name: unlike that of others over a part of the same world.
        """
        settings = settings or Settings.read()
        progress = Progress(settings.timeout, transport.threads)
        progress.inquiry = Inquiry(transport, progress.ring)
        made = cls._make(transport, progress, settings, name=name)
        made._top = True
        return made

    @classmethod
    def _make(
        cls,
        transport: Transport,
        progress: Progress,
        settings: Settings,
        nodes: NodeMemory | None = None,
        is_node: bool = False,
        name: str = "world",
    ) -> Communicator:
        made = cls.__new__(cls)
        made._settings = settings
        made._open(transport, progress, None, is_node, name)
        if nodes is not None:
            made._meet(nodes)
        return made

    def _open(
        self,
        transport: Transport,
        progress: Progress,
        guard: Guard | None,
        is_node: bool = False,
        name: str = "world",
    ) -> None:
        self.rank, self.size = transport.rank, transport.size
        self._transport = transport
        self._progress = progress
        self._guard = guard
        self._operations = Operations(transport, self._settings)
        self._device_operations: DeviceWays | None = None
        self._process = os.getpid()
        self._closed = False
        self._watchdog: Watchdog | None = None
        self._attentive = progress.timeline is not None
        progress.groups.add(self)
        self._top = False
        self._memo = Memo()
        self._name = name
        self._splits = 0
        self._ring = progress.ring
        self._counter = np.zeros(2, np.int64)  # collectives, and messages
        self._sites = Sites()
        self._tuning: Tuning | None = None
        self._nodes: NodeMemory | None = None
        self._board: Board | None = None
        self._mail: Mailboxes | None = None
        self.node = (
            self
            if is_node
            else Communicator._make(
                transport.node(), progress, self._settings, is_node=True, name=f"{name}.node"
            )
        )
        if self.node.size < self.size:
            self._operations.place(self._find_nodes())

    def _find_nodes(self) -> Nodes:
        """Tell every rank which ranks share a node; collective."""
        lowest = self.node.broadcast(np.array([self.rank]))
        return Nodes.labelled(self.allgather(lowest).ravel().tolist())

    def _watch(self) -> None:
        """Start the watchdog, and tell it of the other ranks of this node; collective."""
        inquiry = self._progress.inquiry
        assert inquiry is not None
        own = Process.own()
        mine = np.array([self.rank, own.pid, own.started])
        node = self.node.allgather(mine).tolist()
        known = {rank: Process(pid, started) for rank, pid, started in node if rank != self.rank}
        self._progress.deaths = Deaths(known, self._last_of([row[0] for row in node]))
        watchdog = Watchdog(inquiry, self._transport, self._progress.deaths, self._settings.abort)
        files = self.node.allgather(np.array([watchdog.file])).ravel().tolist()
        of = dict(zip([row[0] for row in node], files, strict=True))
        watchdog.start({rank: (process, of[rank]) for rank, process in known.items()})
        self._watchdog = watchdog

    def _last_of(self, ranks: list[int]) -> Callable[[int], str]:
        """Return what tells the last operation of one of the node's ranks, from its memory."""
        traces = self._nodes.traces if self._nodes is not None and self._nodes.token else []

        def last(rank: int) -> str:
            entries = entries_in(traces[ranks.index(rank)], 1) if traces else ()
            return str(entries[-1]) if entries else "unknown"

        return last

    def _share(self) -> None:
        """Map the memory of the ranks on this node; collective."""
        if self._settings.shared:
            from .node_memory import NodeMemory

            nodes = NodeMemory(self.node, self._settings.cma)
            if nodes.token and nodes.memory is not None:
                self._ring.move(nodes.memory.trace)
            self._meet(nodes)

    def _read_tuning(self) -> None:
        """Take rank 0's table of measurements, so that all ranks choose alike; collective."""
        path, text = self._settings.tuning, ""
        if self.rank == 0 and path is not None and path.is_file():
            text = path.read_text(errors="replace")
        text = share_text(self, text)
        if not text:
            return
        try:
            self._use(parse(text, self._transport.library))
        except ValueError as error:
            if self.rank == 0:
                print(f"ringfold: {path} is ignored: {error}", file=sys.stderr, flush=True)

    def _use(self, tuning: Tuning | None) -> None:
        self._tuning = tuning
        self._operations.tune(tuning)
        if self.node is not self:
            self.node._use(tuning)

    def _meet(self, nodes: NodeMemory) -> None:
        """Meet in shared memory where all ranks of the group can; collective."""
        from .board import Board
        from .mailboxes import Mailboxes

        if self.node is not self and self.node._nodes is None:
            self.node._meet(nodes)
        self._nodes = nodes
        self._board = Board.open(self, nodes)
        if self._board is not None:
            self._board.note_in(self._ring, self._counter)
        self._mail = None if self.size == 1 else Mailboxes.open(self, nodes)
        memory = nodes.memory if nodes.token else None
        self._operations.share(memory, self._board, self._mail, nodes.reason)

    def recent(self, last: int = 16) -> tuple[Entry, ...]:
        """Return the last operations of this rank over all of its groups, the oldest first.

        At most 256 are kept. Not collective.
        """
        return self._ring.entries(last)

    @property
    def name(self) -> str:
        """Return what this group is called: by what was split from what."""
        return self._name

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
        for group in progress.groups:
            group._attentive = True
        return timeline

    def stop_timeline(self) -> None:
        """Record no longer."""
        progress = self._progress
        if progress.timeline is not None:
            progress.timeline.stop()
        progress.timeline = None
        for group in progress.groups:
            group._attentive = group._closed

    @property
    def library(self) -> str:
        """Return what carries the messages, with its version."""
        return self._transport.library

    def __repr__(self) -> str:
        return f"Communicator(rank {self.rank} of {self.size}, {self._transport.name})"

    # -- collectives -------------------------------------------------------------------------

    def allreduce(
        self, x: Any, op: str = "sum", *, algorithm: Algorithm = None, blocking: bool = True
    ) -> Any:
        """Combine all ranks' x element by element, in place, and return x.

        op: sum, mean (over the ranks; floats only), min, max or prod; bool allows min and max.
        """
        known = self._memo.find((id(x), op)) if algorithm is None else None
        if known is None or not known.fits(x):
            prepared = self._side(x).allreduce(x, op, algorithm)
            if algorithm is not None or not prepared.plain or prepared.meeting is None:
                return self._start(prepared, blocking)
            self.note(prepared)
            known = self._memo.add(x, op, prepared.meeting, prepared.receipt)
        if blocking:
            return self._run(known.meeting, known.receipt, x)
        if known.meeting.flying:  # on its way already: do it twice
            return self._start(self._operations.allreduce(x, op), False)
        return self._fly(known.meeting, known.receipt, x)

    def reduce(
        self,
        x: Any,
        root: int = 0,
        op: str = "sum",
        *,
        algorithm: Algorithm = None,
        blocking: bool = True,
    ) -> Any:
        """Combine all ranks' x in place at root; elsewhere x stays as it was. Returns x."""
        return self._start(self._side(x).reduce(x, root, op, algorithm), blocking)

    def broadcast(
        self, x: Any, root: int = 0, *, algorithm: Algorithm = None, blocking: bool = True
    ) -> Any:
        """Copy root's x over the x of every rank, in place, and return x."""
        return self._start(self._side(x).broadcast(x, root, algorithm), blocking)

    def allgather(self, x: Any, *, algorithm: Algorithm = None, blocking: bool = True) -> Any:
        """Return a new array of shape (size, *x.shape): row r is rank r's x."""
        return self._start(self._side(x).allgather(x, algorithm), blocking)

    def reduce_scatter(
        self, x: Any, op: str = "sum", *, algorithm: Algorithm = None, blocking: bool = True
    ) -> Any:
        """Combine all ranks' x and return this rank's part of the flat result, a new 1-D array.

        The part is `chunks.bounds(x.size, size, rank)`; x stays as it was.
        """
        return self._start(self._side(x).reduce_scatter(x, op, algorithm), blocking)

    def gather(
        self, x: Any, root: int = 0, *, algorithm: Algorithm = None, blocking: bool = True
    ) -> Any:
        """Return, at root, a new array of shape (size, *x.shape); None on the other ranks."""
        return self._start(self._side(x).gather(x, root, algorithm), blocking)

    def scatter(
        self, x: Any = None, root: int = 0, *, algorithm: Algorithm = None, blocking: bool = True
    ) -> Any:
        """Return row `rank` of root's x, a new array of shape x.shape[1:].

        x needs to be given at root only, with a first axis of size.
        """
        return self._start(self._side(x).scatter(x, root, algorithm), blocking)

    def alltoall(self, x: Any, *, algorithm: Algorithm = None, blocking: bool = True) -> Any:
        """Send row r of x to rank r; return a new array whose row r is what rank r sent here."""
        return self._start(self._side(x).alltoall(x, algorithm), blocking)

    def barrier(self, *, blocking: bool = True) -> Any:
        """Return when every rank has come."""
        return self._start(self._operations.barrier(), blocking)

    # -- point to point ----------------------------------------------------------------------

    def send(self, x: Any, dst: int, tag: int = 0) -> None:
        """Send x to rank dst; when it returns, x may be changed."""
        self._start(self._side(x).send(x, dst, tag), True)

    def recv(self, x: Any, src: int, tag: int = 0) -> Any:
        """Fill x with what rank src sent with this tag, and return x.

        Raises: MismatchError where the message has another number of bytes.
        """
        return self._start(self._side(x).recv(x, src, tag), True)

    def isend(self, x: Any, dst: int, tag: int = 0) -> Work:
        """Start to send x; the Work, or the communicator if it is dropped, keeps x alive."""
        work: Work = self._start(self._side(x).send(x, dst, tag), False)
        return work

    def irecv(self, x: Any, src: int, tag: int = 0) -> Work:
        """Start to receive into x; wait() returns x."""
        work: Work = self._start(self._side(x).recv(x, src, tag), False)
        return work

    # -- plans and memory --------------------------------------------------------------------

    def plan(self, collective: str, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """Decide a collective once, to run it many times on the same x.

        collective: the name of a method, args and kwargs as it takes them (no `blocking`).
        Returns: a function that runs it, collectively, and returns its result.
        Raises: ValueError for an unknown name, and what the method raises for its arguments.
        """
        if collective not in _PLANNED:
            raise ValueError(f"cannot plan {collective!r}; there is: {', '.join(_PLANNED)}")
        side = self._side(args[0] if args else kwargs.get("x"))
        prepared: Prepared = getattr(side, collective)(*args, **kwargs)
        if prepared.plain and prepared.meeting is not None:
            self.note(prepared)
            return partial(self._run, prepared.meeting, prepared.receipt, prepared.owner)
        return partial(self._begin, prepared, True, self.note(prepared))

    def empty(
        self, shape: int | tuple[int, ...], dtype: Any = np.float32, *, device: str = "cpu"
    ) -> Any:
        """Return an uninitialised array in registered memory, which the node's ranks map.

        Collectives read it in place, without a copy, when every rank passes such an array, or a
        contiguous view of one. It belongs to this communicator and to groups split from it. Not
        collective; where nothing can be shared it is ordinary memory. dtype: of NumPy or of torch;
        the array is of the same library. device: "cuda" for memory of this rank's GPU, in an
        allocation of its own.

        Raises: MemoryError where no space is left; CommError for "cuda" without a GPU.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self._require_open()
        if device != "cpu":
            if device != "cuda":
                raise ValueError(f"device {device!r}: expected 'cpu' or 'cuda'")
            from .transport.device import empty

            return empty(self.node.rank, shape, dtype)
        if self._nodes is not None and self._nodes.token and self._nodes.memory is not None:
            return registered(self._nodes.memory, shape, dtype)
        family, _, name = (
            str(dtype).rpartition(".") if "torch." in str(dtype) else ("numpy", "", "")
        )
        if family == "numpy":
            return np.empty(shape, dtype)
        return allocate(family, shape, dtype_named(name))

    # -- groups ------------------------------------------------------------------------------

    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """Return the Communicator of the ranks that give the same color, ordered by (key, rank).

        Collective. A rank that gives None gets None.
        """
        self._require_open()
        group = self._transport.split(color, key)
        self._splits += 1
        if group is None:
            return None
        name = f"{self._name}.{self._splits}"
        made = Communicator._make(group, self._progress, self._settings, self._nodes, name=name)
        made._use(self._tuning)
        return made

    def close(self) -> None:
        """Finish what is in flight and give the group back; collective, and idempotent."""
        if self._closed:
            return
        self._progress.drain(self._settings.timeout)
        if self._device_operations is not None:
            self._device_operations.close()
        self._unshare()
        self._closed = self._attentive = True
        if self.node is not self:
            self.node.close()
        if self._top:
            self._progress.stop()
        if self._watchdog is not None:
            self._progress.deaths = None
            self._watchdog.stop()
        if self._guard is not None:
            self._guard.release()
        self._transport.close()

    def _unshare(self) -> None:
        """Give board and boxes back, once nobody looks at them any more."""
        board, self._board = self._board, None
        mail, self._mail = self._mail, None
        if self._nodes is None or self.size == 1:  # the same on all ranks
            return
        self._operations.share(self._nodes.memory, None)
        self._memo.forget()
        try:
            self.barrier()
        except CommError:
            return  # a rank is gone, and those left may still look: its memory ends with the job
        for shared in (board, mail):
            if shared is not None:
                shared.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Closing is collective: a rank that fails must not wait there for the others.
        if kind is None:
            self.close()

    # -- running -----------------------------------------------------------------------------

    @property
    def host_operations(self) -> Operations:
        """Return what prepares operations on host memory; for the package's own use."""
        return self._operations

    def use_devices(self, operations: DeviceWays) -> None:
        """Let these prepare operations on device memory, before the first of them."""
        self._device_operations = operations

    def _side(self, x: Any) -> Operations | DeviceWays:
        """Return what prepares operations on memory such as x's."""
        if not on_device(x):
            return self._operations
        if self._device_operations is None:
            from .transport.gpu_aware import cuda_ways

            self.use_devices(cuda_ways(self))
        assert self._device_operations is not None
        return self._device_operations

    def _require_open(self) -> None:
        if self._closed:
            raise CommError(f"rank {self.rank}: the communicator is closed")
        if os.getpid() != self._process:
            raise CommError(
                f"this process is a fork of rank {self.rank}, no rank of its own; call collectives "
                "in the process that opened the communicator"
            )

    def _run(self, meeting: Meeting, receipt: Receipt, owner: Any) -> Any:
        """Run a meeting to its end; at once, without a Work, where nothing is in flight before."""
        start = 0
        if self._attentive or os.getpid() != self._process:
            self._require_open()
            start = time.monotonic_ns()
        if not self._progress.works:
            status = meeting.launch()
            if status != _DONE:
                steps = meeting.steps(status, owner)
                self._advance(lambda: steps, receipt, background=False).wait()
        else:
            self._fly(meeting, receipt, owner).wait()
        if start and self._progress.timeline is not None:
            self._progress.timeline.add(WAIT, receipt.operation, start)
        return owner

    def _fly(self, meeting: Meeting, receipt: Receipt, owner: Any) -> Work:
        """Start a meeting behind what is in flight."""
        self._require_open()
        return self._advance(lambda: meeting.steps(meeting.launch(), owner), receipt, True)

    def _advance(
        self,
        begin: Callable[[], Steps],
        receipt: Receipt,
        background: bool,
        group: str | None = None,
    ) -> Work:
        name = self._name if group is None else group

        def make() -> Work:
            return Work(begin(), receipt, self._transport, self._progress, name)

        return self._progress.start(make, background)

    def _start(self, prepared: Prepared, blocking: bool) -> Any:
        return self._begin(prepared, blocking, self.note(prepared))

    def _begin(self, prepared: Prepared, blocking: bool, call: int) -> Any:
        self._require_open()
        if prepared.meeting is not None:  # it notes itself
            work = self._advance(lambda: prepared.run(0), prepared.receipt, not blocking)
            return work.wait() if blocking else work
        of_messages = prepared.channel is not Channel.COLLECTIVE

        def begin() -> Steps:
            self._counter[int(of_messages)] += 1
            sequence = int(self._counter[int(of_messages)])
            number = self._ring.begin(call, sequence)
            tag = tag_of(sequence, prepared.mark, self._transport.max_tag)
            return self._ring.noted(prepared.run(tag), number)

        group = "" if of_messages else self._name
        background = prepared.background and not blocking
        work = self._advance(begin, prepared.receipt, background, group)
        return work.wait() if blocking else work

    def note(self, prepared: Prepared) -> int:
        """Tell the ring of operations what is called, and where; return how it refers to that."""
        site = self._sites.here()
        call = self._ring.intern(prepared.signature, self._name, self.size, site)
        if prepared.meeting is not None:
            prepared.meeting.called(call)
        return call


_PLANNED = (
    "allreduce",
    "reduce",
    "broadcast",
    "allgather",
    "reduce_scatter",
    "gather",
    "scatter",
    "alltoall",
    "barrier",
)
