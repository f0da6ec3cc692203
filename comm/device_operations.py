"""Operations on device memory, staged: copied to pinned host memory, exchanged there, copied back.

A collective is cut into windows (`windows`), each a whole collective on host memory; while one is
exchanged, the next is copied in and the one before is copied out, on streams of their own. What
the caller has put on its stream before the call runs before the copies; what it puts there after
the operation has ended runs behind them: nobody has to synchronise.

Operations of a group take turns, in the order of the calls, on a group of their own: when a copy
ends differs from rank to rank, so they could not keep an order with the host's operations.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .device import Device, DeviceArray, Event, Stream, describe
from .fingerprint import fingerprint
from .ipc import Ipc, open_ipc
from .schedule import Schedule
from .staging import Place, Staging, Typed
from .trace import Signature
from .transport.base import Channel, Request
from .windows import Window, elementwise, exchanged, gathered, scattered
from .work import Prepared, Receipt, Steps

if TYPE_CHECKING:
    from .communicator import Communicator
    from .operations import Operations

WINDOW_BYTES = 4 << 20
"""Of a window: long enough that a copy runs at full speed, short enough that many overlap."""

_LOOKS, _GLANCES = 200, 4
"""How often a rank looks at an event before it does other things, if somebody waits, and if not."""

Algorithm = str | Schedule | None

First = Callable[..., Steps]
"""A way to try before the windows, as `Ipc.allreduce`."""


@dataclass(frozen=True)
class Lane:
    """What one rank keeps for one device: two streams for copies, and pinned memory."""

    device: Device
    inward: Stream
    outward: Stream
    staging: Staging


@dataclass(frozen=True)
class _Copying:
    """What an operation that waits for this rank's own device shows: nobody else is waited for."""

    peer: int
    event: Event

    def done(self) -> bool:
        return self.event.ended()


@dataclass(frozen=True)
class _Turn:
    """An operation's place in the line of its group."""

    peer: int
    line: deque[_Turn]

    def done(self) -> bool:
        return self.line[0] is self


class DeviceOperations:
    """Prepare operations on device memory for one rank of one group; as `Operations` does."""

    def __init__(
        self,
        comm: Communicator,
        find: Callable[[DeviceArray], Device],
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        """find: return the device that an array lies on; the same object for the same device."""
        self._comm = comm
        self._find = find
        self._window_bytes = window_bytes
        self._lanes: dict[str, Lane] = {}
        self._line: deque[_Turn] = deque()
        self._group: Communicator | None = None
        self._ipc: Ipc | None = None
        self._no_ipc = ""

    def close(self) -> None:
        """Give the group back; collective where a collective was called."""
        group, self._group = self._group, None
        ipc, self._ipc = self._ipc, None
        if ipc is not None:
            ipc.close()
        if group is not None:
            group.close()

    # -- collectives -------------------------------------------------------------------------

    def allreduce(self, x: Any, op: str = "sum", algorithm: Algorithm = None) -> Prepared:
        array = describe(x, writable=True)
        array.dtype.require(op)
        many = self._comm.size > 1
        windows = elementwise(array.count, self._most(array), sends=many, takes=many)
        signature = Signature("allreduce", op, array.dtype.name, array.count)

        def prepare(host: Operations, part: Typed) -> Prepared:
            return host.allreduce(part, op, algorithm)

        self._copy_of_group(array)
        ipc = self._ipc if algorithm is None else None
        if ipc is None:
            return self._in_place(signature, array, windows, prepare)
        prepared = self._in_place(signature, array, windows, prepare, partial(ipc.allreduce, op=op))
        if ipc.offer(array, op).exported is None:
            return prepared
        receipt = replace(
            prepared.receipt,
            algorithm="pairwise, in place",
            transport="ipc",
            reason="registered memory of one node; staged where another rank's is not registered",
        )
        return replace(prepared, receipt=receipt)

    def reduce(
        self, x: Any, root: int = 0, op: str = "sum", algorithm: Algorithm = None
    ) -> Prepared:
        root = self._comm.host_operations.root(root)
        at_root = self._comm.rank == root
        array = describe(x, writable=at_root)
        array.dtype.require(op)
        windows = elementwise(array.count, self._most(array), sends=True, takes=at_root)
        return self._in_place(
            Signature("reduce", op, array.dtype.name, array.count, root),
            array,
            windows,
            lambda host, part: host.reduce(part, root, op, algorithm),
        )

    def broadcast(self, x: Any, root: int = 0, algorithm: Algorithm = None) -> Prepared:
        root = self._comm.host_operations.root(root)
        at_root = self._comm.rank == root
        array = describe(x, writable=not at_root)
        windows = elementwise(array.count, self._most(array), sends=at_root, takes=not at_root)
        return self._in_place(
            Signature("broadcast", "", array.dtype.name, array.count, root),
            array,
            windows,
            lambda host, part: host.broadcast(part, root, algorithm),
        )

    def reduce_scatter(self, x: Any, op: str = "sum", algorithm: Algorithm = None) -> Prepared:
        array = describe(x, writable=False)
        array.dtype.require(op)
        size, rank = self._comm.size, self._comm.rank
        windows = scattered(array.count, size, rank, self._most(array))
        own = -(-(array.count - rank) // size)
        return self._anew(
            Signature("reduce_scatter", op, array.dtype.name, array.count),
            array,
            windows,
            (max(own, 0),),
            lambda host, part: host.reduce_scatter(part, op, algorithm),
        )

    def allgather(self, x: Any, algorithm: Algorithm = None) -> Prepared:
        array = describe(x, writable=False)
        size = self._comm.size
        windows = gathered(array.count, size, self._most(array), takes=True)
        shape = (size, *array.shape)
        return self._anew(
            Signature("allgather", "", array.dtype.name, array.count),
            array,
            windows,
            shape,
            lambda host, part: host.allgather(part, algorithm),
        )

    def gather(self, x: Any, root: int = 0, algorithm: Algorithm = None) -> Prepared:
        root = self._comm.host_operations.root(root)
        array = describe(x, writable=False)
        size, at_root = self._comm.size, self._comm.rank == root
        windows = gathered(array.count, size, self._most(array), takes=at_root)
        return self._anew(
            Signature("gather", "", array.dtype.name, array.count, root),
            array,
            windows,
            (size, *array.shape) if at_root else None,
            lambda host, part: host.gather(part, root, algorithm),
        )

    def scatter(self, x: Any = None, root: int = 0, algorithm: Algorithm = None) -> Prepared:
        """Refuse: ranks that pass nothing could not tell on which device they want their row."""
        raise TypeError(
            "x: scatter takes host memory only, since the other ranks do not say where their row "
            "is to lie; broadcast it, or scatter a host copy"
        )

    def alltoall(self, x: Any, algorithm: Algorithm = None) -> Prepared:
        array = describe(x, writable=False)
        size = self._comm.size
        if not array.shape or array.shape[0] != size:
            raise ValueError(
                f"x: expected a first axis of {size}, a row per rank, got shape {array.shape}"
            )
        windows = exchanged(array.count // size, size, self._most(array))
        return self._anew(
            Signature("alltoall", "", array.dtype.name, array.count),
            array,
            windows,
            array.shape,
            lambda host, part: host.alltoall(part, algorithm),
        )

    # -- point to point ----------------------------------------------------------------------

    def send(self, x: Any, dst: int, tag: int = 0) -> Prepared:
        """Copy x to the host while the caller waits, then send it as any host memory.

        A message keeps its place among the others to that rank, which wait for no copy.
        """
        array = describe(x, writable=False)
        host = self._comm.host_operations
        lane = self._lane(array)

        def run(_: int) -> Steps:
            place = lane.staging.take(array.nbytes)
            lane.device.follow(lane.inward, lane.device.record(_caller(lane, array)))
            part = place.part(0, array.nbytes)
            if array.nbytes:
                lane.device.to_host(part, array.address, lane.inward)
            copied = lane.device.record(lane.inward)
            while not copied.ended():
                os.sched_yield()
            yield from host.send(_typed(part, array, (array.count,)), dst, tag).run(0)
            lane.staging.give(place, None)
            return array.owner

        return self._message(host.send(np.empty(0), dst, tag), array, run)

    def recv(self, x: Any, src: int, tag: int = 0) -> Prepared:
        array = describe(x, writable=True)
        host = self._comm.host_operations
        lane = self._lane(array)

        def run(_: int) -> Steps:
            device, caller = lane.device, _caller(lane, array)
            ready = device.record(caller)
            place = lane.staging.take(array.nbytes)
            part = place.part(0, array.nbytes)
            yield from host.recv(_typed(part, array, (array.count,)), src, tag).run(0)
            device.follow(lane.outward, ready)
            if array.nbytes:
                device.to_device(array.address, part, lane.outward)
            copied = device.record(lane.outward)
            device.follow(caller, copied)
            lane.staging.give(place, copied)
            return array.owner

        return self._message(host.recv(np.empty(0), src, tag), array, run)

    def _message(
        self, empty: Prepared, array: DeviceArray, run: Callable[[int], Steps]
    ) -> Prepared:
        """Prepare a message as one of no elements was prepared."""
        receipt = replace(
            empty.receipt,
            transport=f"staged, {empty.receipt.transport}",
            nbytes=array.nbytes,
            reason=_REASON,
        )
        signature = empty.signature._replace(dtype=array.dtype.name, elements=array.count)
        return Prepared(receipt, empty.channel, run, signature)

    # -- staging -----------------------------------------------------------------------------

    def _in_place(
        self,
        signature: Signature,
        array: DeviceArray,
        windows: Sequence[Window],
        prepare: Callable[[Operations, Typed], Prepared],
        first: First | None = None,
    ) -> Prepared:
        lane = self._lane(array)

        def run(tag: int) -> Steps:
            caller = _caller(lane, array)
            yield from self._staged(
                lane, tag, array, array.address, caller, windows, prepare, first
            )
            return array.owner

        return Prepared(
            self._receipt(signature.operation, array, windows),
            Channel.COLLECTIVE,
            run,
            signature,
            mark=fingerprint(signature, "staged"),
        )

    def _anew(
        self,
        signature: Signature,
        array: DeviceArray,
        windows: Sequence[Window],
        shape: tuple[int, ...] | None,
        prepare: Callable[[Operations, Typed], Prepared],
    ) -> Prepared:
        """Return a new array of a shape, or None where the shape is None."""
        lane = self._lane(array)

        def run(tag: int) -> Steps:
            caller = _caller(lane, array)
            result = None if shape is None else lane.device.like(array, shape)
            into = 0 if result is None else describe(result, writable=True).address
            yield from self._staged(lane, tag, array, into, caller, windows, prepare)
            return result

        return Prepared(
            self._receipt(signature.operation, array, windows),
            Channel.COLLECTIVE,
            run,
            signature,
            mark=fingerprint(signature, "staged"),
        )

    def _staged(
        self,
        lane: Lane,
        tag: int,
        array: DeviceArray,
        into: int,
        caller: Stream,
        windows: Sequence[Window],
        prepare: Callable[[Operations, Typed], Prepared],
        first: First | None = None,
    ) -> Steps:
        """Run the windows from an array to the address `into`; the caller's stream follows.

        first: is tried before, and leaves nothing to do where it returns True.
        """
        device, item = lane.device, array.dtype.itemsize
        # Recorded now, when the caller calls, and behind the making of its result.
        ready = device.record(caller)
        patient: bool | None = False
        with self._in_line() as turn:
            while not turn.done():
                patient = yield [turn]
            if first is not None:
                done = yield from first(array, ready=ready, caller=caller, tag=tag)
                if done:
                    return
            device.follow(lane.inward, ready)
            device.follow(lane.outward, ready)
            slots = [_Slot(lane, windows, item) for _ in range(min(2, len(windows)))]
            fetched = deque([slots[0].fetch(windows[0], array.address)])
            for index, window in enumerate(windows):
                if index + 1 < len(windows):
                    ahead = slots[(index + 1) % 2]
                    fetched.append(ahead.fetch(windows[index + 1], array.address))
                patient = yield from self._until(fetched.popleft(), patient)
                slot = slots[index % 2]
                part = _typed(slot.passed(window), array, window.shape)
                group = self._copy_of_group(array)
                prepared = prepare(group.host_operations, part)
                group._runner.note(prepared)
                result = yield from prepared.run(tag)
                slot.deliver(window, result, into)
            # Also where there was nothing to copy out: what comes next may change what was read.
            last = device.record(lane.outward)
            device.follow(caller, device.record(lane.inward))
            device.follow(caller, last)
            for slot in slots:
                lane.staging.give(slot.place, last)

    def _until(
        self, event: Event, patient: bool | None
    ) -> Generator[list[Request], bool | None, bool | None]:
        """Wait for an event; take and return whether somebody waits for the operation."""
        while True:
            for _ in range(_LOOKS if patient else _GLANCES):
                if event.ended():
                    return patient
                os.sched_yield()
            patient = yield [_Copying(self._comm.rank, event)]

    @contextmanager
    def _in_line(self) -> Iterator[_Turn]:
        turn = _Turn(self._comm.rank, self._line)
        self._line.append(turn)
        try:
            yield turn
        finally:
            self._line.remove(turn)

    def _copy_of_group(self, array: DeviceArray) -> Communicator:
        """Return this group's own copy, where device operations meet; collective at first.

        The ranks also try then whether they can open each other's memory.
        """
        if self._group is None:
            self._group = self._comm.split(0, self._comm.rank)
            assert self._group is not None
            self._ipc, self._no_ipc = open_ipc(self._group, self._find(array))
        return self._group

    def open(self, array: DeviceArray) -> tuple[Communicator, bool]:
        """Return this group's own copy, and whether its ranks open each other's memory; collective.

        The same answer on all ranks.
        """
        group = self._copy_of_group(array)
        return group, self._ipc is not None

    def _lane(self, array: DeviceArray) -> Lane:
        device = self._find(array)
        lane = self._lanes.get(device.name)
        if lane is None:
            staging = Staging(device, lambda nbytes: self._comm.empty(nbytes, np.uint8))
            lane = Lane(device, device.make_stream(), device.make_stream(), staging)
            self._lanes[device.name] = lane
        return lane

    def _most(self, array: DeviceArray) -> int:
        return max(1, self._window_bytes // array.dtype.itemsize)

    def _receipt(self, name: str, array: DeviceArray, windows: Sequence[Window]) -> Receipt:
        way = self._copy_of_group(array).host_operations.way
        why = f"{_REASON}; no ipc: {self._no_ipc}" if self._no_ipc else _REASON
        count = f"{len(windows)} windows"
        return Receipt(name, count, f"staged, {way}", 1, array.nbytes, why)


_REASON = "device memory passes through pinned host memory"


class _Slot:
    """One of an operation's two places: what is passed, and behind it what comes out."""

    def __init__(self, lane: Lane, windows: Sequence[Window], item: int) -> None:
        self._lane, self._item = lane, item
        self._second = max(window.count for window in windows) * item
        results = max(window.result for window in windows) * item
        self.place: Place = lane.staging.take(self._second + results)
        self._emptied: Event | None = None

    def fetch(self, window: Window, address: int) -> Event:
        """Start to copy a window in; the place is the host's when the event has ended."""
        device, inward, item = self._lane.device, self._lane.inward, self._item
        if self._emptied is not None:
            device.follow(inward, self._emptied)
        for start, at, count in window.into:
            device.to_host(self.place.part(start * item, count * item), address + at * item, inward)
        return device.record(inward)

    def passed(self, window: Window) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the bytes that the host passes."""
        return self.place.part(0, window.count * self._item)

    def deliver(self, window: Window, result: Any, address: int) -> None:
        """Start to copy a window's result out."""
        device, outward, item = self._lane.device, self._lane.outward, self._item
        begin = 0
        if isinstance(result, np.ndarray) and window.out:
            begin = self._second
            source = result.reshape(-1).view(np.uint8)
            self.place.part(begin, source.size)[:] = source
        for start, at, count in window.out:
            source = self.place.part(begin + start * item, count * item)
            device.to_device(address + at * item, source, outward)
        self._emptied = device.record(outward)


def _caller(lane: Lane, array: DeviceArray) -> Stream:
    """Return the caller's stream as it is now: a plan may have been made under another."""
    return lane.device.caller(describe(array.owner, writable=False))


def _typed(part: np.ndarray[Any, Any], array: DeviceArray, shape: tuple[int, ...]) -> Typed:
    return Typed(part.view(array.dtype.storage).reshape(shape), array.dtype)
