"""Allreduce of GPU memory in place: ranks of a node read and write each other's memory by kernels.

Each rank folds its part of all ranks' buffers into all of them, as `fused.allreduce_shared` does on
the host. Two events of each rank are known to all others: `ready`, behind which its buffer may be
read, and `done`, behind its part of the work. The host exchanges only words: that every rank has
put its event on its stream. No host waits for a device.

An event is put on a stream anew for every operation. A rank does so only after an exchange that
each other rank enters behind its own use of the event's last place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from .call_codes import code_of
from .device import HANDLE_BYTES, Device, DeviceArray, Event, Exported, Peering, Stream, describe
from .errors import CommError
from .fused import part
from .trace import Signature
from .transport.base import Channel
from .work import Prepared, Receipt, Steps

if TYPE_CHECKING:
    from .communicator import Communicator

Made = TypeVar("Made")
Words = npt.NDArray[np.int64]

_HANDLE_WORDS = HANDLE_BYTES // 8
_TRIAL = 1000


@dataclass(frozen=True)
class Offer:
    """What one rank brings to an operation."""

    exported: Exported | None
    count: int
    code: int

    def words(self) -> Words:
        """Return it as int64: token (0 where not registered), offset, count, code, handle."""
        row = np.zeros(4 + _HANDLE_WORDS, np.int64)
        row[2:4] = self.count, self.code
        if self.exported is not None:
            row[:2] = self.exported.token, self.exported.offset
            row[4:] = np.frombuffer(self.exported.handle.ljust(HANDLE_BYTES, b"\0"), np.int64)
        return row


class Ipc:
    """One rank's side of a group whose ranks open each other's device memory."""

    def __init__(
        self, comm: Communicator, device: Device, peering: Peering, mine: list[tuple[Event, bytes]]
    ) -> None:
        """Exchange the events; collective over a group on one node.

        mine: two events of this rank, with their handles.

        Raises: CommError where a device refuses another rank's; after all were exchanged.
        """
        self._comm, self._device, self._peering = comm, device, peering
        self._stream = device.make_stream()
        self._opened: dict[tuple[int, int], int] = {}
        self._mine = mine
        handles = np.zeros((2, HANDLE_BYTES), np.uint8)
        for line, (_, handle) in zip(handles, self._mine, strict=True):
            line[: len(handle)] = np.frombuffer(handle, np.uint8)
        everyone = comm.allgather(handles)
        self._ready, self._done = (
            [
                self._mine[which][0]
                if rank == comm.rank
                else peering.open_event(everyone[rank, which].tobytes())
                for rank in range(comm.size)
            ]
            for which in range(2)
        )

    def offer(self, array: DeviceArray, op: str) -> Offer:
        """Return what this rank brings to an allreduce of an array."""
        fits = self._peering.folds(op, array.dtype.name) and array.count > 0
        exported = self._peering.export(array.address, array.nbytes) if fits else None
        return Offer(exported, array.count, code_of("allreduce", op, array.dtype.name))

    def allreduce(
        self, array: DeviceArray, op: str, ready: Event, caller: Stream, tag: int
    ) -> Steps:
        """Run on this rank; return whether it was done, which is alike on all of them.

        ready: behind which this rank's buffer may be used.  caller: the stream that is to follow.
        """
        device, peering, comm = self._device, self._peering, self._comm
        offer = self.offer(array, op)
        device.follow(self._stream, ready)
        peering.place(self._mine[0][0], self._stream)
        rows = yield from self._exchange(offer.words(), tag)
        # Calls that differ go the staged way on all ranks, which tells how they differ.
        if not rows[:, 0].all() or (rows[:, 2:4] != rows[0, 2:4]).any():
            return False
        bases = [
            array.address if rank == comm.rank else self._opened_at(rank, row) + int(row[1])
            for rank, row in enumerate(rows)
        ]
        low, high = part(array.count, array.dtype.itemsize, comm.size, comm.rank)
        for event in self._ready:
            device.follow(self._stream, event)
        if high > low:
            places = [base + low * array.dtype.itemsize for base in bases]
            peering.fold(op, array.dtype.name, places, high - low, self._stream)
        peering.place(self._mine[1][0], self._stream)
        yield from self._exchange(np.zeros(1, np.int64), tag)
        for event in self._done:
            device.follow(caller, event)
        return True

    def close(self) -> None:
        """Give back the others' memory; after the last operation has ended."""
        opened, self._opened = self._opened, {}
        for address in opened.values():
            self._peering.close(address)

    def _exchange(self, words: Words, tag: int) -> Steps:
        prepared = self._comm.host_operations.allgather(words)
        self._comm._runner.note(prepared)
        return (yield from prepared.run(tag))

    def _opened_at(self, rank: int, row: Words) -> int:
        key = rank, int(row[0])
        if key not in self._opened:
            self._opened[key] = self._peering.open(row[4:].tobytes())
        return self._opened[key]


def open_ipc(comm: Communicator, device: Device) -> tuple[Ipc | None, str]:
    """Open a group's device memory to its ranks, and try it; collective.

    Returns: the group's side, or None and why not. It was seen to give right sums where it is not
    None; what a device refuses is refused on all ranks.
    """
    peering = device.peering
    several = 1 < comm.size == comm.node.size
    if not several:
        return None, "its ranks are on several nodes" if comm.size > 1 else "it has one rank"
    if not _agree(comm, peering is not None):
        return None, "a device offers none"
    assert peering is not None
    mine, why = _attempt(lambda: ([peering.make_event() for _ in range(2)], peering.trial(_TRIAL)))
    if not _agree(comm, mine is not None):
        return None, why or "another rank's device refuses"
    assert mine is not None
    events, (x, right) = mine
    made, why = _attempt(lambda: Ipc(comm, device, peering, events))
    if not _agree(comm, made is not None):
        return None, why or "another rank cannot open events"
    assert made is not None
    array = describe(x, writable=True)
    if not _agree(comm, _can_open(made, array)):
        return None, "memory cannot be opened"
    caller = device.caller(array)

    def run(tag: int) -> Steps:
        return (yield from made.allreduce(array, "sum", device.record(caller), caller, tag))

    receipt = Receipt("allreduce", "pairwise, in place", "ipc", comm.size, array.nbytes, "trial")
    signature = Signature("allreduce", "sum", array.dtype.name, array.count)
    done = comm._start(Prepared(receipt, Channel.COLLECTIVE, run, signature), True)
    if not _agree(comm, done and right(comm.size)):
        return None, "a trial gave wrong sums"
    return made, ""


def _attempt(make: Callable[[], Made]) -> tuple[Made | None, str]:
    try:
        return make(), ""
    except CommError as error:
        return None, str(error)


def _agree(comm: Communicator, fine: bool) -> bool:
    return bool(comm.allreduce(np.array([fine], np.uint8), "min")[0])


def _can_open(ipc: Ipc, array: DeviceArray) -> bool:
    """Exchange handles, and open the others'; collective, and never an error on one rank only."""
    rows = ipc._comm.allgather(ipc.offer(array, "sum").words())
    try:
        for rank, row in enumerate(rows):
            if rank != ipc._comm.rank:
                ipc._opened_at(rank, row)
    except CommError:
        return False
    return bool(rows[:, 0].all())
