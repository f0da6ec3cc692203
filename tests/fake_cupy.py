"""A CuPy whose GPU is a thread for each stream, over memory that other processes can open.

It stands in for what `ringfold.comm.transport` calls of CuPy and of CUDA's runtime, with the same
arguments, and is as strict: an address outside of every allocation, a handle of this very process,
an event that is not for other processes, or memory that is registered twice are errors. What is put
on a stream runs a little later, and each stream on its own, so that what is not ordered by events
goes wrong. A stream is destroyed with the last reference to it, as CuPy's are, and may then not be
named again. In Numba's simulator, kernels run on these streams as well.

    fake_cupy.install(folder)   # a folder of this job alone; before anything imports cupy
    pytest -p fake_cupy tests/gpu/test_staged_gpu.py    # tests of a GPU, without one
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import operator
import os
import queue
import random
import sys
import tempfile
import threading
import time
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

LATE = 0.002
"""Seconds that a job waits at most, and half of them at least, before it runs."""

HANDLE_BYTES = 64
MPS_ENABLED = 133


OUT_OF_MEMORY, INVALID_HANDLE, NOT_READY, ILLEGAL_ADDRESS, UNKNOWN = 2, 400, 600, 700, 999
ERRORS = {
    OUT_OF_MEMORY: "cudaErrorMemoryAllocation: out of memory",
    INVALID_HANDLE: "cudaErrorInvalidResourceHandle: invalid resource handle",
    NOT_READY: "cudaErrorNotReady: device not ready",
    ILLEGAL_ADDRESS: "cudaErrorIllegalAddress: an illegal memory access was encountered",
}


class CUDARuntimeError(RuntimeError):
    """As CuPy's, which takes a status."""

    def __init__(self, status: int | str) -> None:
        super().__init__(ERRORS[status] if isinstance(status, int) else status)
        self.status = status if isinstance(status, int) else UNKNOWN


def view(address: int, nbytes: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)


class SharedWords:
    """Counters in a file: how often an event was put on a stream, reached, and destroyed."""

    def __init__(self, path: Path, *, new: bool) -> None:
        if new:
            path.write_bytes(bytes(24))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 24)
        self.words = np.frombuffer(self._map, np.int64)

    @property
    def recorded(self) -> int:
        return int(self.words[0])

    @property
    def reached(self) -> int:
        return int(self.words[1])


class Worker:
    """One stream: runs its jobs in their order, late; also those of before it was destroyed."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.destroyed = False
        self.failed: BaseException | None = None
        self._random = random.Random(id(self))
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while True:
            job = self.jobs.get()
            if job is None:
                return
            time.sleep((1 + self._random.random()) / 2 * LATE)
            try:
                job()
            except BaseException as error:  # told by whoever synchronises
                self.failed = error

    def destroy(self) -> None:
        self.destroyed = True
        self.jobs.put(None)

    def synchronize(self) -> None:
        ended = threading.Event()
        self.jobs.put(ended.set)
        while not ended.wait(0.01) and self.thread.is_alive():
            continue
        if self.failed is not None:
            raise CUDARuntimeError(f"a job of this stream failed: {self.failed!r}")


class Runtime:
    """The calls of CUDA's runtime, as CuPy has them."""

    CUDARuntimeError = CUDARuntimeError
    errorMemoryAllocation = OUT_OF_MEMORY
    memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice, memcpyDefault = 1, 2, 3, 4

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.forget_others = False  # a mutation: events of other processes hold up nothing
        self.capacity = sys.maxsize  # of what this process allocates, pools included
        self.pooled: list[int] = []  # that a library has freed, and keeps
        self.allocated = 0
        self.spans: dict[int, int] = {}
        self.registered: dict[int, int] = {}
        self.opened: dict[int, str] = {}
        self._files: dict[int, tuple[str, mmap.mmap]] = {}
        self._shown: set[str] = set()
        self._graves: list[tuple[str, mmap.mmap]] = []
        self._events: dict[int, tuple[str, SharedWords, bool]] = {}
        self._workers: dict[int, Worker] = {}
        self._numbers = itertools.count(2)
        self._streams = itertools.count(100)
        self._lock = threading.RLock()

    # -- memory ------------------------------------------------------------------------------

    def malloc(self, size: int) -> int:
        with self._lock:
            if self.allocated + sum(self.pooled) + size > self.capacity:
                raise CUDARuntimeError(OUT_OF_MEMORY)
            self.allocated += size
        name = f"{os.getpid()}-{next(self._numbers)}"
        (self.folder / name).write_bytes(bytes([0xEE]) * size)
        return self._map(name)

    def _map(self, name: str) -> int:
        with (self.folder / name).open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        with self._lock:
            self._files[address] = name, mapped
            self.spans[address] = len(mapped)
        return address

    def free(self, ptr: int) -> None:
        """As CUDA's, which waits for the device; but where a job of its own lets go of memory."""
        if all(worker.thread is not threading.current_thread() for worker in self._all()):
            self.deviceSynchronize()
        name = self._files[ptr][0]
        if not self._owns(name):
            raise CUDARuntimeError("memory of another process is freed")
        self.allocated -= self.spans[ptr]
        self._forget(ptr)
        (self.folder / name).unlink()

    def _forget(self, ptr: int) -> None:
        with self._lock:
            self._graves.append(self._files.pop(ptr))  # what still reads there reads old bytes
            del self.spans[ptr]

    def find(self, address: int, nbytes: int) -> np.ndarray:
        """View device memory by address."""
        with self._lock:
            for base, size in self.spans.items():
                if base <= address and address + nbytes <= base + size:
                    return view(address, nbytes)
        raise CUDARuntimeError(f"cudaErrorIllegalAddress: {nbytes} bytes at {address:#x}")

    def pointerGetAttributes(self, ptr: int) -> SimpleNamespace:
        self.find(ptr, 1)
        return SimpleNamespace(device=0)

    def memcpyAsync(self, dst: int, src: int, size: int, kind: int, stream: int) -> None:
        to_device = kind != self.memcpyDeviceToHost
        from_device = kind != self.memcpyHostToDevice
        target = self.find(dst, size) if to_device else self._host(dst, size, stream)
        source = self.find(src, size) if from_device else self._host(src, size, stream)
        self.put(stream, lambda: np.copyto(target, source))
        if not (self._pinned(dst, size) or to_device) or not (
            self._pinned(src, size) or from_device
        ):
            self.streamSynchronize(stream)  # memory that is not pinned: the host waits

    def _host(self, address: int, nbytes: int, stream: int) -> np.ndarray:
        return view(address, nbytes)

    def _pinned(self, address: int, nbytes: int) -> bool:
        return any(
            base <= address and address + nbytes <= base + size
            for base, size in list(self.registered.items())
        )

    def hostRegister(self, ptr: int, size: int, flags: int) -> None:
        if self._pinned(ptr, 1):
            raise CUDARuntimeError("cudaErrorHostMemoryAlreadyRegistered")
        self.registered[ptr] = size

    def hostUnregister(self, ptr: int) -> None:
        if self.registered.pop(ptr, None) is None:
            raise CUDARuntimeError("cudaErrorHostMemoryNotRegistered")

    # -- between processes -------------------------------------------------------------------

    def ipcGetMemHandle(self, devPtr: int) -> bytes:
        return self._files[devPtr][0].encode().ljust(HANDLE_BYTES, b"\0")

    def ipcOpenMemHandle(self, handle: bytes, flags: int = 1) -> int:
        name = self._name(handle)
        if name in self.opened.values():
            raise CUDARuntimeError("cudaErrorAlreadyMapped")
        address = self._map(name)
        self.opened[address] = name
        return address

    def ipcCloseMemHandle(self, devPtr: int) -> None:
        del self.opened[devPtr]
        self._forget(devPtr)

    def _name(self, handle: bytes) -> str:
        assert isinstance(handle, bytes) and len(handle) == HANDLE_BYTES
        name = handle.rstrip(b"\0").decode()
        if self._owns(name):
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle: of this very process")
        return name

    def ipcGetEventHandle(self, event: int) -> bytes:
        name, _, interprocess = self._find_event(event)
        if not interprocess:
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle: not an interprocess event")
        self._shown.add(name)
        return name.encode().ljust(HANDLE_BYTES, b"\0")

    def ipcOpenEventHandle(self, handle: bytes) -> int:
        return self._event(self._name(handle), new=False, interprocess=True)

    # -- streams and events ------------------------------------------------------------------

    @property
    def streams(self) -> list[int]:
        """Return the streams that there are, but for the default one."""
        with self._lock:
            return [
                one for one, worker in self._workers.items() if not worker.destroyed and one > 1
            ]

    def streamCreateWithFlags(self, flags: int) -> int:
        with self._lock:
            stream = next(self._streams)
            self._workers[stream] = Worker()
            return stream

    def streamDestroy(self, stream: int) -> None:
        """As CUDA's, which returns at once; what is on the stream still runs."""
        self.worker(stream).destroy()

    def put(self, stream: int, job: Callable[[], Any]) -> None:
        self.worker(stream).jobs.put(job)

    def worker(self, stream: int) -> Worker:
        with self._lock:
            worker = self._workers.get(stream or 1)
            if worker is None and stream in (0, 1):
                worker = self._workers[1] = Worker()
            if worker is None or worker.destroyed:
                raise CUDARuntimeError(INVALID_HANDLE)
            return worker

    def make_event(self, interprocess: bool) -> int:
        name = f"{os.getpid()}-event-{next(self._numbers)}"
        return self._event(name, new=True, interprocess=interprocess)

    def _event(self, name: str, *, new: bool, interprocess: bool) -> int:
        number = 1000 + next(self._numbers)
        self._events[number] = name, SharedWords(self.folder / name, new=new), interprocess
        return number

    @property
    def opened_events(self) -> list[str]:
        """Return the events of other processes that are open here."""
        return [name for name, _, _ in list(self._events.values()) if not self._owns(name)]

    def eventDestroy(self, event: int) -> None:
        """As CUDA's, which does not wait; but what its owner has destroyed may not be named."""
        name, shared, _ = self._find_event(event)
        del self._events[event]
        if not self._owns(name):
            if shared.words[2]:
                raise CUDARuntimeError("an event is named that its owner has destroyed")
            return
        if name in self._shown:
            shared.words[2] = 1
        (self.folder / name).unlink(missing_ok=True)

    def _find_event(self, event: int) -> tuple[str, SharedWords, bool]:
        if event not in self._events:
            raise CUDARuntimeError(INVALID_HANDLE)
        return self._events[event]

    @staticmethod
    def _owns(name: str) -> bool:
        return name.partition("-")[0] == str(os.getpid())

    def memsetAsync(self, ptr: int, value: int, size: int, stream: int) -> None:
        target = self.find(ptr, size)
        self.put(stream, lambda: target.fill(value))

    def eventRecord(self, event: int, stream: int) -> None:
        words = self._find_event(event)[1].words
        words[0] += 1
        number = int(words[0])

        def reach() -> None:
            words[1] = max(int(words[1]), number)

        self.put(stream, reach)

    def eventQuery(self, event: int) -> int:
        """As CuPy's, which returns the status: errors of the device, as all calls from there on."""
        if any(worker.failed is not None for worker in self._all()):
            return ILLEGAL_ADDRESS
        shared = self._find_event(event)[1]
        return 0 if shared.reached >= shared.recorded else NOT_READY

    def streamWaitEvent(self, stream: int, event: int, flags: int = 0) -> None:
        name, shared, _ = self._find_event(event)
        number = shared.recorded
        if self.forget_others and not self._owns(name):
            return

        def wait() -> None:
            while shared.reached < number:
                if shared.words[2]:
                    raise CUDARuntimeError("an event is destroyed while a stream waits for it")
                time.sleep(5e-5)

        self.put(stream, wait)

    def streamSynchronize(self, stream: int) -> None:
        self.worker(stream).synchronize()

    def deviceSynchronize(self) -> None:
        for worker in self._all():
            worker.synchronize()

    def _all(self) -> list[Worker]:
        with self._lock:
            return list(self._workers.values())

    def getDeviceCount(self) -> int:
        return 1

    def getDevice(self) -> int:
        return 0

    def driverGetVersion(self) -> int:
        return 13000

    runtimeGetVersion = driverGetVersion

    def deviceGetAttribute(self, attribute: int, device: int) -> int:
        if attribute != MPS_ENABLED:
            raise CUDARuntimeError("cudaErrorInvalidValue")
        return 0

    def deviceGetPCIBusId(self, device: int) -> str:
        return "0000:00:01.0"

    def getDeviceProperties(self, device: int) -> dict[str, bytes]:
        return {"name": b"a pretended GPU"}


_CURRENT = threading.local()


def current_stream() -> int:
    """Return the handle of this thread's current stream; 0 for the default one."""
    stack = getattr(_CURRENT, "stack", [])
    return stack[-1].ptr if stack else 0


def module(runtime: Runtime) -> Any:
    """Return the module that `import cupy` gives."""

    class Device:
        def __init__(self, device: int = 0) -> None:
            if device != 0:
                raise CUDARuntimeError("cudaErrorInvalidDevice")

        def __enter__(self) -> Device:
            return self

        def __exit__(self, *_: object) -> None:
            return None

    class Stream:
        null: Any = None

        def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
            self.ptr = 0 if null else runtime.streamCreateWithFlags(int(non_blocking))

        def __del__(self) -> None:
            if self.ptr:
                runtime.streamDestroy(self.ptr)

        def __enter__(self) -> Stream:
            _CURRENT.stack = [*getattr(_CURRENT, "stack", []), self]
            return self

        def __exit__(self, *_: object) -> None:
            _CURRENT.stack.pop()

        def synchronize(self) -> None:
            runtime.streamSynchronize(self.ptr)

    Stream.null = Stream(null=True)

    class Event:
        def __init__(
            self, block: bool = False, disable_timing: bool = False, interprocess: bool = False
        ) -> None:
            if interprocess and not disable_timing:
                raise CUDARuntimeError("cudaErrorInvalidValue: such events have no clock")
            self.ptr = runtime.make_event(interprocess)
            weakref.finalize(self, runtime.eventDestroy, self.ptr).atexit = False

        @property
        def done(self) -> bool:
            return runtime.eventQuery(self.ptr) == 0

        def record(self) -> None:
            runtime.put(current_stream(), lambda: setattr(self, "at", time.perf_counter()))
            runtime.eventRecord(self.ptr, current_stream())

        def synchronize(self) -> None:
            while not self.done:
                time.sleep(5e-5)

    class UnownedMemory:
        def __init__(self, ptr: int, size: int, owner: object, device_id: int = -1) -> None:
            runtime.find(ptr, size)
            self.ptr, self.owner = ptr, owner

    class MemoryPointer:
        def __init__(self, mem: Any, offset: int) -> None:
            self.mem, self.ptr = mem, mem.ptr + offset

    def on_stream(function: Callable[..., Any], *operands: Any) -> ndarray:
        """Put a kernel of the user's on the current stream, and return what it will write."""
        values = [x.host if isinstance(x, ndarray) else x for x in operands]
        shape = np.broadcast_shapes(*(np.shape(value) for value in values))
        ones = (np.ones(1, v.dtype) if isinstance(v, np.ndarray) else v for v in values)
        made = empty(shape, function(*ones).dtype)

        def kernel(_keeps: Any = operands) -> None:
            np.copyto(made.host, function(*values))

        runtime.put(current_stream(), kernel)
        return made

    class ndarray:
        """An array in device memory; host: the same memory, as the device's jobs see it."""

        def __init__(self, shape: Any, dtype: Any = float, memptr: Any = None) -> None:
            self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
            self.dtype = np.dtype(dtype)
            count = int(np.prod(self.shape, dtype=np.int64))
            if memptr is None:
                memory = np.full(max(count, 1) * self.dtype.itemsize, 0xEE, np.uint8)
                self.memory: Any = memory
                address = memory.ctypes.data
                runtime.spans[address] = memory.nbytes
                weakref.finalize(self, runtime.spans.pop, address, None).atexit = False
            else:
                self.memory, address = memptr, memptr.ptr
            self.data = SimpleNamespace(ptr=address)
            raw = view(address, count * self.dtype.itemsize)
            self.host = raw.view(self.dtype).reshape(self.shape)

        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            return {
                "version": 3,
                "shape": self.shape,
                "typestr": self.dtype.str,
                "data": (self.data.ptr if self.host.size else 0, False),
                "strides": None,
                "stream": current_stream() or 1,
            }

        @property
        def size(self) -> int:
            return self.host.size

        def get(self) -> np.ndarray:
            runtime.streamSynchronize(current_stream())
            return self.host.copy()

        def set(self, values: np.ndarray) -> None:
            if (values.dtype, values.shape) != (self.dtype, self.shape):
                raise ValueError(
                    f"{values.dtype}, {values.shape} set in {self.dtype}, {self.shape}"
                )
            self._put(..., values)

        def __getitem__(self, where: Any) -> ndarray:
            if where is Ellipsis:
                return self
            part = self.host[where]
            assert part.flags.c_contiguous
            return ndarray(part.shape, part.dtype, SimpleNamespace(ptr=part.ctypes.data, of=self))

        def __setitem__(self, where: Any, values: Any) -> None:
            if isinstance(values, np.ndarray) and values.ndim:
                raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
            self._put(where, values)

        def _put(self, where: Any, values: Any) -> None:
            source = values.host if isinstance(values, ndarray) else np.array(values)
            target = self.host[where]

            def kernel(_keeps: Any = (self, values)) -> None:
                np.copyto(target, source)

            runtime.put(current_stream(), kernel)

        def all(self) -> ndarray:
            made = empty((), np.bool_)

            def kernel(_keeps: Any = self) -> None:
                made.host[()] = self.host.all()

            runtime.put(current_stream(), kernel)
            return made

        def __bool__(self) -> bool:
            return bool(self.get())

        def __rmul__(self, other: Any) -> ndarray:
            return on_stream(np.multiply, self, other)

        def __abs__(self) -> ndarray:
            return on_stream(np.abs, self)

        def sum(self) -> ndarray:
            made = empty((), np.int64)

            def kernel(_keeps: Any = self) -> None:
                made.host[()] = self.host.sum()

            runtime.put(current_stream(), kernel)
            return made

        def __int__(self) -> int:
            return int(self.get())

        def __iadd__(self, other: Any) -> ndarray:
            self[...] = on_stream(np.add, self, self.dtype.type(other))
            return self

        def __imul__(self, other: Any) -> ndarray:
            self[...] = on_stream(np.multiply, self, self.dtype.type(other))
            return self

    for name in ("eq", "ne", "lt", "add", "sub", "mul", "mod"):
        made = getattr(operator, name)
        setattr(ndarray, f"__{name}__", lambda a, b, made=made: on_stream(made, a, b))
    ndarray.__module__ = "cupy"

    def empty(shape: Any, dtype: Any = float) -> ndarray:
        return ndarray(shape, dtype)

    def asarray(values: Any, dtype: Any = None) -> ndarray:
        source = np.asarray(values, dtype)
        made = empty(source.shape, source.dtype)
        made.set(source)
        return made

    def alloc_pinned_memory(nbytes: int) -> SimpleNamespace:
        memory = np.zeros(nbytes, np.uint8)
        runtime.hostRegister(memory.ctypes.data, nbytes, 0)
        return SimpleNamespace(ptr=memory.ctypes.data, memory=memory)

    cuda = SimpleNamespace(
        alloc_pinned_memory=alloc_pinned_memory,
        get_elapsed_time=lambda first, last: (last.at - first.at) * 1e3,
        runtime=runtime,
        Device=Device,
        Stream=Stream,
        Event=Event,
        UnownedMemory=UnownedMemory,
        MemoryPointer=MemoryPointer,
        get_current_stream=lambda: (getattr(_CURRENT, "stack", [])[-1:] or [Stream.null])[0],
    )
    made_module: Any = types.ModuleType("cupy")
    made_module.fake, made_module.__version__ = True, "14, pretended"
    made_module.cuda, made_module.ndarray = cuda, ndarray
    made_module.get_default_memory_pool = lambda: SimpleNamespace(
        free_all_blocks=runtime.pooled.clear
    )
    made_module.empty, made_module.asarray = empty, asarray
    made_module.copyto = lambda target, source: target.__setitem__(..., source)
    made_module.arange = lambda *a, dtype=None: asarray(np.arange(*a, dtype=dtype))
    made_module.full = lambda shape, value, dtype: asarray(np.full(shape, value, dtype))
    made_module.zeros = lambda shape, dtype=float: asarray(np.zeros(shape, dtype))
    for name in ("float32", "float64", "uint8", "bool_"):
        setattr(made_module, name, getattr(np, name))
    return made_module


def install(folder: Path | str) -> Runtime:
    """Let `import cupy` give this one, and let kernels in the simulator run on its streams."""
    runtime = Runtime(Path(folder))
    sys.modules["cupy"] = module(runtime)
    from ringfold.kernels.device import launch, table
    from ringfold.kernels.device.primitives import simulating

    if simulating():
        _launch_on_streams(runtime, launch, table)
    return runtime


def _launch_on_streams(runtime: Runtime, launch: Any, table: Any) -> None:
    made, prepared, one = launch.Launcher, launch.Launcher.prepared, threading.Lock()

    def late(
        self: Any, kernel: Any, wanted: int, *arguments: Any, keeps: object = None
    ) -> Callable[[], bool]:
        run = prepared(self, kernel, wanted, *arguments, keeps=keeps)

        def job() -> None:
            with one:  # the simulator runs one kernel at a time
                run()

        def put() -> bool:
            if wanted:
                runtime.put(self.stream, job)
            return wanted > 0

        return put

    read = table.Placed.read

    def read_behind(self: Any) -> Any:
        runtime.streamSynchronize(1)  # as a copy to the host, which is put on the default stream
        return read(self)

    table.Placed.read = read_behind
    made.prepared = late
    launch.Launcher = lambda device=0, stream=1, blocks=2, threads=4: made(
        device, stream, blocks, threads
    )


def pytest_configure(config: Any) -> None:
    """Let the tests that need a GPU have this one."""
    folder = tempfile.TemporaryDirectory(prefix="ringfold-fake-gpu-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    install(folder.name)
