"""CuPy's side of the device protocol: streams, events and copies of one NVIDIA GPU.

Calls go to the CUDA runtime by address and handle, so they serve arrays of any library. CUDA keeps
a current device per thread, and operations advance in more than one: every call names its own.
"""

from __future__ import annotations

import importlib
import os
import weakref
from collections.abc import Callable, Mapping
from functools import cache, cached_property, partial
from types import MappingProxyType
from typing import Any

from ..buffer import element_of
from ..device import LEGACY_STREAM, Bytes, DeviceArray, Event, Stream, library_of
from ..errors import CommError
from . import cuda_stream
from .cuda_arithmetic import CudaArithmetic
from .cuda_ipc import CudaPeering
from .cuda_memory import CudaMemory

_CURRENT: Mapping[str, Callable[[Any, int], int]] = MappingProxyType(
    {
        "cupy": lambda cupy, ordinal: cuda_stream.current(cupy),
        # Never destroyed: torch has a pool of them.
        "torch": lambda torch, ordinal: int(torch.cuda.current_stream(ordinal).cuda_stream),
    }
)
"""Array library -> its caller's current stream on a device; by handle, 0 for the default one."""

_MPS_ENABLED = 133
"""cudaDevAttrMpsEnabled."""

_MAKERS: Mapping[str, Callable[[Any, DeviceArray, tuple[int, ...]], Any]] = MappingProxyType(
    {
        "torch": lambda torch, array, shape: torch.empty(
            shape, dtype=array.owner.dtype, device=array.owner.device
        ),
    }
)
"""Array library -> a new array of it; CuPy's where a library is not listed."""


def load_cupy() -> Any:
    """Import CuPy where a GPU can be used.

    Raises: CommError that says what is missing.
    """
    try:
        import cupy
    except ImportError as error:
        raise CommError(
            f"no GPU can be used: CuPy cannot be imported ({error}); install it, such as: "
            "pip install cupy-cuda13x"
        ) from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # a missing driver raises what its loader raises
        raise CommError(f"no GPU can be used: {error}") from error
    if not count:
        raise CommError("no GPU can be used: the driver shows none")
    return cupy


def ordinal_of(node_rank: int, num_gpus: int) -> int:
    """Return the GPU of a node's rank: ranks go round where there are more of them than GPUs."""
    if num_gpus < 1:
        raise ValueError(f"expected 1 GPU or more, got {num_gpus}")
    return node_rank % num_gpus


def has_mps(runtime: Any, ordinal: int) -> bool | None:
    """Tell whether NVIDIA's MPS serves a GPU: whether ranks that share it run there side by side.

    Without, they take turns. None where the driver does not tell, which it does from CUDA 12.3 on.
    """
    try:
        return bool(runtime.deviceGetAttribute(_MPS_ENABLED, ordinal))
    except runtime.CUDARuntimeError:
        return None


def device_of(array: DeviceArray) -> CudaDevice:
    """Return the device that an array lies on; the current one for an array of no elements."""
    cupy = load_cupy()
    runtime = cupy.cuda.runtime
    if array.address:
        return _opened(int(runtime.pointerGetAttributes(array.address).device))
    return _opened(int(runtime.getDevice()))


@cache
def _opened(ordinal: int) -> CudaDevice:
    return CudaDevice(load_cupy(), ordinal)


_NOT_READY = 600
"""cudaErrorNotReady."""


class CudaEvent:
    """An event of CUDA's, without its clock."""

    def __init__(self, runtime: Any, device: str, event: Any) -> None:
        """event: CuPy's, or what has a handle.  device: as errors name it."""
        self._runtime, self._device, self.event = runtime, device, event

    def ended(self) -> bool:
        """Look, without waiting.

        Raises: CommError where something on the device has failed, which shows here first: by
        CuPy's own `done` an event would be waited for until time is up.
        """
        status = int(self._runtime.eventQuery(self.event.ptr))
        if status in (0, _NOT_READY):
            return status == 0
        raise CommError(
            f"{self._device}: a kernel or copy that this process has launched, in the program or "
            f"in an operation, has failed: {self._runtime.CUDARuntimeError(status)}"
        )


class CudaDevice:
    """One GPU of this process."""

    def __init__(self, cupy: Any, ordinal: int) -> None:
        self.name = f"cuda:{ordinal}"
        self._cupy = cupy
        self._runtime = cupy.cuda.runtime
        self._ordinal = ordinal
        self._device = cupy.cuda.Device(ordinal)
        self._memory = CudaMemory(cupy, ordinal)
        self._event_of = partial(CudaEvent, self._runtime, self.name)
        self.peering = CudaPeering(cupy, ordinal, self._memory, self._event_of, _handle_of)

    @cached_property
    def arithmetic(self) -> CudaArithmetic | None:
        """Return what computes in device memory; None where no kernel can be compiled and run."""
        from ...kernels.device.usable import why_not

        why = why_not(self._ordinal)
        return None if why else CudaArithmetic(self._cupy, self._ordinal)

    def caller(self, array: DeviceArray) -> Stream:
        """Return the stream that the array names, else its library's current one.

        It lives as long as what is returned: a program may leave it during an operation.
        """
        if array.stream is not None:
            return cuda_stream.named(self._cupy, array)
        family = library_of(array.owner)
        current = _CURRENT.get(family)
        if current is None:
            return LEGACY_STREAM
        return current(importlib.import_module(family), self._ordinal) or LEGACY_STREAM

    def make_stream(self) -> Stream:
        """Return a new stream, which the default stream does not wait for."""
        with self._device:
            stream = self._cupy.cuda.Stream(non_blocking=True)
        return cuda_stream.kept(int(stream.ptr), stream)

    def record(self, stream: Stream) -> Event:
        """Put an event on a stream."""
        with self._device:
            event = self._cupy.cuda.Event(block=False, disable_timing=True)
            self._runtime.eventRecord(event.ptr, stream)
        return self._event_of(event)

    def follow(self, stream: Stream, event: Event) -> None:
        """Let all later work of a stream run behind an event."""
        assert isinstance(event, CudaEvent)
        with self._device:
            self._runtime.streamWaitEvent(stream, event.event.ptr)

    def room(self, nbytes: int) -> tuple[int, Any]:
        """Return the address of new registered memory, and what owns it.

        Raises: OutOfMemory where none is left.
        """
        made = self._memory.allocate(nbytes)
        return made.piece.base, made

    def pin(self, memory: Bytes) -> None:
        """Register host memory with the driver until it is given back.

        Memory that the driver will not take stays as it is: copies are right, but the host waits.
        """
        address = int(memory.ctypes.data)
        with self._device:
            try:
                self._runtime.hostRegister(address, memory.nbytes, _PORTABLE)
            except self._runtime.CUDARuntimeError:
                return
        weakref.finalize(memory, _unpin, self._runtime, address, os.getpid()).atexit = False

    def to_host(self, target: Bytes, address: int, stream: Stream) -> None:
        """Put a copy from device memory into pinned memory on a stream."""
        kind = self._runtime.memcpyDeviceToHost
        with self._device:
            self._runtime.memcpyAsync(target.ctypes.data, address, target.nbytes, kind, stream)

    def to_device(self, address: int, source: Bytes, stream: Stream) -> None:
        """Put a copy from pinned memory into device memory on a stream."""
        kind = self._runtime.memcpyHostToDevice
        with self._device:
            self._runtime.memcpyAsync(address, source.ctypes.data, source.nbytes, kind, stream)

    def like(self, array: DeviceArray, shape: tuple[int, ...]) -> Any:
        """Return a new array of the same library, device and element type."""
        family = library_of(array.owner)
        if family in _MAKERS:
            return _MAKERS[family](importlib.import_module(family), array, shape)
        with self._device:
            return self._cupy.empty(shape, array.dtype.storage)


def _handle_of(event: Event) -> int:
    assert isinstance(event, CudaEvent)
    return int(event.event.ptr)


_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device of this process."""


def _unpin(runtime: Any, address: int, process: int) -> None:
    if os.getpid() != process:  # a fork, which has nothing of the GPU
        return
    try:
        runtime.hostUnregister(address)
    except runtime.CUDARuntimeError:
        return  # the driver has ended, and with it what was registered


def empty(node_rank: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return an uninitialised array on the GPU of a node's rank: CuPy's, or torch's by its dtype.

    Its memory is an allocation of its own, not a piece of a pool, so that it can be opened by other
    processes as a whole.

    Raises: CommError without a GPU; OutOfMemory where it has none left.
    """
    cupy = load_cupy()
    runtime = cupy.cuda.runtime
    family, _, storage = element_of(dtype)
    ordinal = ordinal_of(node_rank, runtime.getDeviceCount())
    plain = _opened(ordinal).peering.allocate(shape, storage)
    if family == "numpy":
        return plain
    return importlib.import_module(family).from_dlpack(plain).view(dtype)
