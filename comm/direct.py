"""Operations on device memory that a GPU-aware MPI library sends as it lies there.

The host waits for events. Before the library may read or write a buffer, all that the caller has
put on its stream has run; what the caller puts there after the operation has ended runs behind the
last kernel. Sums are made by kernels: half widths in float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from .arithmetic import mean_scales, plain
from .chunks import bounds
from .device import Device, DeviceArithmetic, DeviceArray, Event, Like
from .device_calls import Make, called
from .device_executor import Memory, Site, execute_on_device, landing_bytes
from .device_wait import reached
from .dtypes import DTYPES
from .executor import NETWORK_WINDOW
from .fingerprint import fingerprint
from .scratch import Room, Scratch
from .trace import Signature
from .transport.base import Channel, DeviceMessages
from .work import Prepared, Receipt, Steps

if TYPE_CHECKING:
    from .choice import Chosen
    from .communicator import Communicator
    from .schedule import Algorithm

WAY = "gpu-aware mpi"


class Direct:
    """Prepare collectives of one group whose ranks all send device memory by MPI."""

    def __init__(
        self,
        group: Communicator,
        messages: DeviceMessages,
        device: Device,
        arithmetic: DeviceArithmetic,
        reason: str,
        like: Like,
    ) -> None:
        """group: where nobody else sends collective messages with the tags of these operations.

        like: makes what takes a result.
        """
        self._group, self._messages, self._device, self._like = group, messages, device, like
        self._arithmetic, self._reason = arithmetic, reason
        self._stream = device.make_stream()
        self._scratch = Scratch(device)
        self._abandoned: list[object] = []

    # -- reductions --------------------------------------------------------------------------

    def allreduce(self, array: DeviceArray, op: str, algorithm: Algorithm) -> Prepared:
        """Reduce in place."""
        signature = Signature("allreduce", op, array.dtype.name, array.count)
        chosen = self._choose(signature, array.count, algorithm)

        def run(into: int, tag: int) -> Steps:
            yield from self._reduce(chosen, array, into, op, tag)

        return self._prepared(signature, chosen, array, array.nbytes, run)

    def reduce(self, array: DeviceArray, root: int, op: str, algorithm: Algorithm) -> Prepared:
        """Reduce in place at root; elsewhere in a copy, as partial sums may pass here."""
        signature = Signature("reduce", op, array.dtype.name, array.count, root)
        chosen = self._choose(signature, array.count, algorithm, root)

        def run(into: int, tag: int) -> Steps:
            if self._group.rank == root:
                yield from self._reduce(chosen, array, into, op, tag)
            else:
                room = yield from self._copy(array)
                yield from self._reduce(chosen, array, room.address, op, tag)
                self._give(room)

        return self._prepared(signature, chosen, array, array.nbytes, run)

    def reduce_scatter(self, array: DeviceArray, op: str, algorithm: Algorithm) -> Prepared:
        """Reduce a copy, and return this rank's part of it."""
        signature = Signature("reduce_scatter", op, array.dtype.name, array.count)
        chosen = self._choose(signature, array.count, algorithm)
        low, high = bounds(array.count, self._group.size, self._group.rank)
        item = array.dtype.itemsize

        def run(into: int, tag: int) -> Steps:
            room = yield from self._copy(array)
            yield from self._reduce(chosen, array, room.address, op, tag)
            if high > low:
                size = (high - low) * item
                self._arithmetic.copy(into, room.address + low * item, size, self._stream)
            self._give(room)

        make = self._new(array, (high - low,))
        return self._prepared(signature, chosen, array, array.nbytes, run, make)

    def _reduce(self, chosen: Chosen, array: DeviceArray, address: int, op: str, tag: int) -> Steps:
        """Reduce count elements at an address in place; half widths in a copy of float32."""
        name, count = array.dtype.name, array.count
        if not count:
            return
        if not array.dtype.wide:
            adding, item = (plain(op), name), array.dtype.itemsize
            yield from self._execute(chosen, item, address, address, tag, adding)
            if op == "mean" and self._group.size > 1:
                self._convert(address, name, address, name, count, float(self._group.size))
            return
        before, after = mean_scales(op, self._group.size)
        room = self._scratch.take(count * 4)
        self._convert(address, name, room.address, "float32", count, before)
        yield from self._settled()
        yield from self._execute(chosen, 4, room.address, room.address, tag, (plain(op), "float32"))
        self._convert(room.address, "float32", address, name, count, after)
        self._give(room)

    # -- movements ---------------------------------------------------------------------------

    def broadcast(self, array: DeviceArray, root: int, algorithm: Algorithm) -> Prepared:
        """Copy root's over the others'."""
        signature = Signature("broadcast", "", array.dtype.name, array.count, root)
        chosen = self._choose(signature, array.count, algorithm, root)

        def run(into: int, tag: int) -> Steps:
            yield from self._move(chosen, array, into, into, tag)

        return self._prepared(signature, chosen, array, array.nbytes, run)

    def allgather(self, array: DeviceArray, algorithm: Algorithm) -> Prepared:
        """Return a row from every rank."""
        size = self._group.size
        signature = Signature("allgather", "", array.dtype.name, array.count)
        chosen = self._choose(signature, array.count * size, algorithm)

        def run(into: int, tag: int) -> Steps:
            yield from self._own_row(array, into)
            yield from self._move(chosen, array, into, into, tag)

        make = self._new(array, (size, *array.shape))
        return self._prepared(signature, chosen, array, array.nbytes * size, run, make)

    def gather(self, array: DeviceArray, root: int, algorithm: Algorithm) -> Prepared:
        """Return a row from every rank at root; elsewhere rows may pass through scratch memory."""
        size = self._group.size
        signature = Signature("gather", "", array.dtype.name, array.count, root)
        chosen = self._choose(signature, array.count * size, algorithm, root)

        def run(into: int, tag: int) -> Steps:
            if self._group.rank == root:
                yield from self._own_row(array, into)
                yield from self._move(chosen, array, into, into, tag)
                return
            room = self._scratch.take(array.nbytes * size)
            yield from self._own_row(array, room.address)
            yield from self._move(chosen, array, room.address, room.address, tag)
            self._give(room)

        def make(device: Device) -> Any:
            at_root = self._group.rank == root
            return self._like(device, array, (size, *array.shape)) if at_root else None

        return self._prepared(signature, chosen, array, array.nbytes * size, run, make)

    def alltoall(self, array: DeviceArray, algorithm: Algorithm) -> Prepared:
        """Return row r from rank r."""
        signature = Signature("alltoall", "", array.dtype.name, array.count)
        chosen = self._choose(signature, array.count, algorithm)
        row = array.nbytes // self._group.size

        def run(into: int, tag: int) -> Steps:
            if row:
                at = self._group.rank * row
                self._arithmetic.copy(into + at, array.address + at, row, self._stream)
            yield from self._settled()
            yield from self._move(chosen, array, array.address, into, tag)

        make = self._new(array, array.shape)
        return self._prepared(signature, chosen, array, array.nbytes, run, make)

    # -- parts of them -----------------------------------------------------------------------

    def _choose(
        self, signature: Signature, count: int, algorithm: Algorithm, root: int = 0
    ) -> Chosen:
        host = self._group.host_operations
        return host.choice.choose(
            signature.operation, count, DTYPES[signature.dtype], algorithm, root
        )

    def _prepared(
        self,
        signature: Signature,
        chosen: Chosen,
        array: DeviceArray,
        nbytes: int,
        run: Callable[[int, int], Steps],
        make: Make | None = None,
    ) -> Prepared:
        """run: given what takes the result, and a tag; the caller's work has run when it begins."""

        def settled(into: int, ready: Event, tag: int) -> Steps:
            self._device.follow(self._stream, ready)
            yield from self._settled()
            yield from run(into, tag)
            return self._device.record(self._stream), ""

        begin = partial(called, self._device, array, make, settled, self._abandoned)
        receipt = Receipt(
            signature.operation,
            chosen.algorithm,
            WAY,
            chosen.schedule.num_chunks,
            nbytes,
            f"{chosen.reason}; {self._reason}",
        )
        way = f"direct {chosen.way}"
        mark = fingerprint(signature, way)
        return Prepared(receipt, Channel.COLLECTIVE, begin, signature, way=way, mark=mark)

    def _new(self, array: DeviceArray, shape: tuple[int, ...]) -> Make:
        return lambda device: self._like(device, array, shape)

    def _give(self, room: Room) -> None:
        self._scratch.give(room, self._device.record(self._stream))

    def _settled(self) -> Steps:
        """Wait for all that is on this side's stream, so that messages may touch it."""
        yield from reached(self._device.record(self._stream), self._group.rank)

    def _own_row(self, array: DeviceArray, into: int) -> Steps:
        if array.nbytes:
            at = into + self._group.rank * array.nbytes
            self._arithmetic.copy(at, array.address, array.nbytes, self._stream)
        yield from self._settled()

    def _copy(self, array: DeviceArray) -> Steps:
        """Return a copy of an array in scratch memory."""
        room = self._scratch.take(array.nbytes)
        if array.nbytes:
            self._arithmetic.copy(room.address, array.address, array.nbytes, self._stream)
        yield from self._settled()
        return room

    def _move(
        self, chosen: Chosen, array: DeviceArray, source: int, target: int, tag: int
    ) -> Steps:
        yield from self._execute(chosen, array.dtype.itemsize, source, target, tag, ("", ""))

    def _execute(
        self,
        chosen: Chosen,
        itemsize: int,
        source: int,
        target: int,
        tag: int,
        adding: tuple[str, str],
    ) -> Steps:
        settings = self._group._settings
        segment = min(settings.segment_bytes, settings.max_message_bytes)
        site = Site(
            self._messages,
            tag,
            self._group.rank,
            self._device,
            self._stream,
            segment,
            NETWORK_WINDOW,
            self._abandoned,
        )
        nbytes = landing_bytes(chosen.program, itemsize, segment, site.window)
        room = self._scratch.take(nbytes) if nbytes else None
        memory = Memory(source, target, room.address if room else 0, itemsize)

        def add(into: int, incoming: int, count: int) -> None:
            self._arithmetic.combine(*adding, into, incoming, count, self._stream)

        yield from execute_on_device(chosen.program, site, memory, add)
        if room:
            self._give(room)

    def _convert(
        self, source: int, source_dtype: str, target: int, dtype: str, count: int, divisor: float
    ) -> None:
        self._arithmetic.convert(source, source_dtype, target, dtype, count, divisor, self._stream)
