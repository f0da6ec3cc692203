"""A device over host memory that is as late as a device may be, for tests without a GPU.

What is put on a stream runs only when somebody has to know: when an event behind it is asked for
again and again, or when the test itself synchronises. Until a copy to the host has run, its target
holds DIRT; a copy to the device reads its source only when it runs. So whoever uses memory before
its event has ended gets wrong values, every time. Streams, events and what else happens are written
into one log.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from contract import FOLDS

from ringfold import CommError, Communicator
from ringfold.comm.device import Device, DeviceArray, Exported
from ringfold.comm.device_operations import DeviceOperations
from ringfold.comm.device_ways import DeviceWays
from ringfold.comm.dtypes import DTYPES
from ringfold.comm.transport.base import Channel, Request
from ringfold.comm.transport.cuda_probe import Verdict
from ringfold.comm.transport.local import LocalTransport
from ringfold.kernels import reference
from ringfold.kernels.storage import HALVES

DIRT = 0xEE
LOOKS, SLOW, EVERY = 2, 9, 50
"""An event has ended only after so many looks, even if nothing stands in its way; some are slow."""


@dataclass
class FakeEvent:
    """Ended when it has been reached, which takes a few looks."""

    gpu: FakeGpu
    stream: int
    number: int
    reached: bool = False
    looks: int = 0
    seen: bool = field(default=False)

    def ended(self) -> bool:
        self.looks += 1
        if self.looks > (self.gpu.looks if self.number % EVERY else SLOW):
            self.gpu.run_until(self)
        if self.reached and not self.seen:
            self.seen = True
            self.gpu.log.append(("ended", self.stream, self.number))
        return self.reached


Job = Callable[[], None] | FakeEvent
"""What stands on a stream: work, an event that is reached, or (in a tuple) one to wait for."""


def span(memory: np.ndarray) -> tuple[int, int]:
    """Return the first address, and the one behind the last."""
    return memory.ctypes.data, memory.ctypes.data + memory.nbytes


class FakeGpu:
    """The streams of one rank's device; not more than one thread at a time runs them."""

    name = "fake:0"

    def __init__(self, node: FakeNode | None = None, card: str = "") -> None:
        self.node = node
        self.peering = None if node is None else FakePeering(self, node, card or f"{id(self)}")
        self.arithmetic: FakeArithmetic | None = FakeArithmetic(self)
        self.looks = LOOKS
        self.log: list[tuple[Any, ...]] = []
        self.pinned: list[tuple[int, int]] = []
        self.arrays: list[FakeArray] = []
        self._unread: list[tuple[int, int]] = []
        self._streams: dict[int, deque[Any]] = {}
        self._events = 0
        self._lock = threading.RLock() if node is None else node.lock
        self._made = 100
        self.allocated = 0

    # -- the protocol ------------------------------------------------------------------------

    def caller(self, array: DeviceArray) -> int:
        return array.stream if array.stream is not None else 1

    def make_stream(self) -> int:
        self._made += 1
        return self._made

    def record(self, stream: int) -> FakeEvent:
        with self._lock:
            self._events += 1
            event = FakeEvent(self, stream, self._events)
            self._put(stream, event)
            self.log.append(("record", stream, event.number))
            return event

    def follow(self, stream: int, event: FakeEvent | SharedEvent) -> None:
        if isinstance(event, SharedEvent):
            with self._lock:
                if event.place is None:
                    return
                event = event.place
        self.log.append(("follow", stream, event.stream, event.number))
        self._put(stream, (event,))

    def room(self, nbytes: int) -> tuple[int, FakeArray]:
        self.allocated += 1
        made = FakeArray(self, np.full(nbytes, DIRT, np.uint8), registered=True)
        return made.address, made

    def pin(self, memory: np.ndarray) -> None:
        memory[:] = DIRT
        self.pinned.append(span(memory))

    def to_host(self, target: np.ndarray, address: int, stream: int) -> None:
        self._require_pinned(target)
        source = self.memory(address, target.nbytes)
        low, high = span(target)
        if not any(low < end and start < high for start, end in self._unread):
            target[:] = DIRT
        self.log.append(("to_host", stream, target.nbytes))
        self._put(stream, lambda: np.copyto(target, source))

    def to_device(self, address: int, source: np.ndarray, stream: int) -> None:
        self._require_pinned(source)
        target = self.memory(address, source.nbytes)
        self.log.append(("to_device", stream, source.nbytes))
        self._unread.append(span(source))

        def copy() -> None:
            np.copyto(target, source)
            self._unread.remove(span(source))

        self._put(stream, copy)

    def like(self, array: DeviceArray, shape: tuple[int, ...]) -> FakeArray:
        made = np.empty(shape, array.dtype.storage)
        made.reshape(-1).view(np.uint8)[:] = DIRT
        return FakeArray(self, made, stream=array.stream, dtype=array.dtype.name)

    # -- what the test does ------------------------------------------------------------------

    def launch(self, stream: int, kernel: Callable[[], None]) -> None:
        """Put a kernel of the user's on a stream."""
        self.log.append(("launch", stream))
        self._put(stream, kernel)

    def synchronize(self, stream: int) -> None:
        """Run all of a stream."""
        with self._lock:
            queue = self._streams.setdefault(stream, deque())
            while queue:
                self._step(queue)

    def run_until(self, event: FakeEvent) -> None:
        with self._lock:
            queue = self._streams.setdefault(event.stream, deque())
            while not event.reached:
                self._step(queue)

    def memory(self, address: int, nbytes: int) -> np.ndarray:
        """Find device memory by address; what lies in no array is an illegal access."""
        for array in self.arrays:
            offset = address - array.address
            if offset >= 0 and offset + nbytes <= array.values.nbytes:
                return array.values.reshape(-1).view(np.uint8)[offset : offset + nbytes]
        raise AssertionError(f"illegal access of {nbytes} bytes at {address:#x}")

    def _put(self, stream: int, job: Any) -> None:
        assert stream > 0
        with self._lock:
            self._streams.setdefault(stream, deque()).append(job)

    def _step(self, queue: deque[Any]) -> None:
        job = queue.popleft()
        if isinstance(job, FakeEvent):
            job.reached = True
        elif isinstance(job, tuple):
            job[0].gpu.run_until(job[0])
        else:
            job()

    def _require_pinned(self, memory: np.ndarray) -> None:
        start, end = span(memory)
        assert any(low <= start and end <= high for low, high in self.pinned), (
            "an asynchronous copy of memory that is not pinned"
        )


class FakeArithmetic:
    """Kernels over host memory, as late as everything that is put on a stream."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        into, read = self.gpu.memory(target, nbytes), self.gpu.memory(source, nbytes)
        self.gpu.launch(stream, lambda: np.copyto(into, read))

    def combine(
        self, op: str, dtype: str, target: int, incoming: int, count: int, stream: int
    ) -> None:
        into, read = (self._typed(address, dtype, count) for address in (target, incoming))
        self.gpu.launch(stream, lambda: reference.combine(op, dtype)(into, read))

    def convert(
        self,
        source: int,
        source_dtype: str,
        target: int,
        target_dtype: str,
        count: int,
        divisor: float,
        stream: int,
    ) -> None:
        read = self._typed(source, source_dtype, count)
        into = self._typed(target, target_dtype, count)

        def kernel() -> None:
            wide = read if read.dtype == np.float64 else reference.to_float32(read, source_dtype)
            wide = wide / wide.dtype.type(divisor)
            into[:] = reference.from_float32(wide, target_dtype) if target_dtype in HALVES else wide

        self.gpu.launch(stream, kernel)

    def _typed(self, address: int, dtype: str, count: int) -> np.ndarray:
        storage = DTYPES[dtype].storage
        peering = self.gpu.peering
        find = self.gpu.memory if peering is None else peering.find  # another's, once it is open
        return find(address, count * storage.itemsize).view(storage)


@dataclass(frozen=True)
class HostMessages:
    """A library that sends device memory by address, which here is the host's.

    It looks at no stream: what no kernel has written yet goes out as DIRT, and what a kernel still
    reads is overwritten.
    """

    transport: LocalTransport

    def isend_device(
        self, address: int, nbytes: int, dst: int, tag: int, channel: Channel
    ) -> Request:
        # What is sent is read now and not when it is received, which may be long after.
        return self.transport.isend(at(address, nbytes).copy(), dst, tag, channel)

    def irecv_device(
        self, address: int, nbytes: int, src: int, tag: int, channel: Channel
    ) -> Request:
        return self.transport.irecv(at(address, nbytes), src, tag, channel)


def at(address: int, nbytes: int) -> np.ndarray:
    """View memory of this process by address."""
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)


class FakeNode:
    """What the devices of ranks that share a node have in common; one thread runs all of them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.events: list[SharedEvent] = []
        self.gpus: list[FakeGpu] = []
        self.opened = 0
        self.opened_events: list[SharedEvent] = []


@dataclass
class SharedEvent:
    """An event with a place that changes; whoever follows it follows the place of that moment."""

    place: FakeEvent | None = None

    def ended(self) -> bool:
        return self.place is None or self.place.ended()


class FakePeering:
    """Sharing memory with the other ranks of a FakeNode; handles are numbers."""

    def __init__(self, gpu: FakeGpu, node: FakeNode, card: str) -> None:
        self.gpu, self.node, self.card = gpu, node, card
        self.refuses = ""
        self.wrong = False
        node.gpus.append(gpu)

    def export(self, address: int, nbytes: int) -> Exported | None:
        self._refuse("export")
        for number, array in enumerate(self.gpu.arrays, 1):
            offset = address - array.address
            if array.registered and offset >= 0 and offset + nbytes <= array.values.nbytes:
                return Exported(array.address.to_bytes(8, "little"), number, offset)
        return None

    def open(self, handle: bytes) -> int:
        self._refuse("open")
        self.node.opened += 1
        return int.from_bytes(handle[:8], "little")

    def close(self, address: int) -> None:
        self.node.opened -= 1

    def make_event(self) -> tuple[SharedEvent, bytes]:
        self._refuse("make_event")
        with self.node.lock:
            self.node.events.append(SharedEvent())
            return self.node.events[-1], (len(self.node.events) - 1).to_bytes(8, "little")

    def open_event(self, handle: bytes) -> SharedEvent:
        self._refuse("open_event")
        with self.node.lock:
            event = self.node.events[int.from_bytes(handle[:8], "little")]
            self.node.opened_events.append(event)
            return event

    def close_event(self, event: SharedEvent) -> None:
        with self.node.lock:
            at = [one is event for one in self.node.opened_events].index(True)
            del self.node.opened_events[at]

    def place(self, event: SharedEvent, stream: int) -> None:
        event.place = self.gpu.record(stream)

    def fold(
        self,
        op: str,
        dtype: str,
        sources: Sequence[int],
        targets: Sequence[int],
        count: int,
        stream: int,
    ) -> Callable[[], None]:
        storage = DTYPES[dtype].storage
        nbytes, half = count * storage.itemsize, dtype in HALVES

        def kernel() -> None:
            read = [self.find(address, nbytes).view(storage) for address in sources]
            wide = [reference.to_float32(x, dtype) for x in read] if half else read
            total = FOLDS[op](np.stack(wide)) + wide[0].dtype.type(self.wrong)
            narrow = reference.from_float32(total, dtype) if half else total.astype(storage)
            for address in targets:
                self.find(address, nbytes).view(storage)[:] = narrow

        def launch() -> None:
            if self.refuses == "launch":  # compiled at the first launch, with errors of its own
                raise RuntimeError("module has no attribute\nand more")
            self.gpu.launch(stream, kernel)

        return launch

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        into = self.gpu.memory(target, nbytes)
        self.gpu.launch(stream, lambda: np.copyto(into, self.find(source, nbytes)))

    def trial(self, count: int) -> tuple[FakeArray, Callable[[int], bool]]:
        if self.refuses == "trial":
            raise OSError("no compiler")
        x = FakeArray(self.gpu, np.empty(count, np.float32), registered=True)
        x.filled_late(np.ones(count, np.float32))

        def right(number: int) -> bool:
            if self.refuses == "right":  # what a kernel has done wrong shows where the host waits
                raise OSError("illegal address")
            return bool((x.get() == number).all())

        return x, right

    def find(self, address: int, nbytes: int) -> np.ndarray:
        for gpu in self.node.gpus:
            try:
                return gpu.memory(address, nbytes)
            except AssertionError:
                continue
        raise AssertionError(f"illegal access of {nbytes} bytes at {address:#x} by a kernel")

    def _refuse(self, call: str) -> None:
        if self.refuses == call:
            raise CommError(f"{call} is refused")


class FakeArray:
    """An array that publishes the CUDA array interface over host memory."""

    def __init__(
        self,
        gpu: FakeGpu,
        values: np.ndarray,
        *,
        stream: int | None = 7,
        dtype: str | None = None,
        registered: bool = False,
        **other: Any,
    ) -> None:
        self.registered = registered
        self.gpu, self.values, self.stream = gpu, values, stream
        self.dtype = f"fake.{dtype or values.dtype.name}"
        self.address = values.ctypes.data
        gpu.arrays.append(self)
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": values.shape,
            "typestr": values.dtype.str,
            "data": (self.address if values.size else 0, False),
            "strides": None,
            "stream": stream,
            **other,
        }

    def get(self) -> np.ndarray:
        """Wait for the array's stream, as a user's copy to the host does, and read."""
        self.gpu.synchronize(self.stream or 1)
        return self.values

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return self.values.size

    def set(self, values: np.ndarray) -> None:
        """Copy values here on the array's stream, as late as a kernel's."""
        self.filled_late(values)

    def filled_late(self, values: np.ndarray) -> FakeArray:
        """Let a kernel on the array's stream write values; until then there is DIRT."""
        self.values.reshape(-1).view(np.uint8)[:] = DIRT
        self.gpu.launch(self.stream or 1, lambda: np.copyto(self.values, values))
        return self


AWARE = Verdict(True, "the test says so")
UNAWARE = Verdict(False, "the test says no")


def use_fake(
    comm: Communicator,
    window_bytes: int = 64,
    node: FakeNode | None = None,
    aware: Verdict = UNAWARE,
    card: str = "",
) -> FakeGpu:
    """Let a communicator's operations on device memory run on a fake.

    aware: what the probe says of the MPI library.  card: the physical one; without, one of its own.
    """
    gpu = FakeGpu(node, card)
    device: Device = gpu
    staged = DeviceOperations(comm, lambda array: device, window_bytes)
    comm.use_devices(DeviceWays(comm, lambda array: device, staged, lambda: aware))
    return gpu
