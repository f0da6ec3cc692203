"""Device memory: what a user's array says of itself, and what is asked of the device it lies on.

A device is an object behind one small protocol; `transport.device` has CuPy's. Work on a device is
ordered by streams: what is put on one stream runs in that order, some time later, and an event
tells when. The host may touch memory that a stream writes only once an event has ended that was
recorded behind the write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .dtypes import DTYPES, DType, dtype_named

Bytes = npt.NDArray[np.uint8]
Stream = int
"""A stream's handle, as CUDA counts them: 1 is the legacy default stream.

A device's are of a class of their own, which keeps the stream.
"""

LEGACY_STREAM = 1


@dataclass(frozen=True)
class DeviceArray:
    """A user's array in device memory, contiguous, flattened in logical order.

    address: of its first byte; 0 where it has no elements.
    stream: what its owner says that it is ready behind; None where it says nothing.
    """

    owner: Any
    address: int
    shape: tuple[int, ...]
    dtype: DType
    stream: Stream | None

    @property
    def count(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all elements."""
        return self.count * self.dtype.itemsize


class Event(Protocol):
    """A place on a stream; ended once everything before it has run."""

    def ended(self) -> bool:
        """Look, without waiting.

        Raises: CommError where what the device was to do has failed.
        """
        ...


class Device(Protocol):
    """One device, as a rank uses it. Nothing here waits, except the making of memory and streams.

    name: such as "cuda:0".
    """

    name: str

    @property
    def peering(self) -> Peering | None:
        """Return what ranks need to share memory; None where the device has no way."""
        ...

    @property
    def arithmetic(self) -> DeviceArithmetic | None:
        """Return what computes in device memory; None where nothing does."""
        ...

    def caller(self, array: DeviceArray) -> Stream:
        """Return the stream that the caller's own work on an array goes to at this moment.

        As one of `make_stream`, it lives as long as its handle: keep the handle, not its number.
        """
        ...

    def make_stream(self) -> Stream:
        """Return a new stream, which the default stream does not wait for."""
        ...

    def record(self, stream: Stream) -> Event:
        """Put an event on a stream."""
        ...

    def follow(self, stream: Stream, event: Event) -> None:
        """Let all later work of a stream run behind an event."""
        ...

    def room(self, nbytes: int) -> tuple[int, Any]:
        """Return the address of new registered memory, and what owns it.

        An allocation of its own, as MPI libraries and other processes open whole ones.

        Raises: OutOfMemory where none is left.
        """
        ...

    def pin(self, memory: Bytes) -> None:
        """Make host memory fit, while it lives, for copies that the host does not wait for."""
        ...

    def to_host(self, target: Bytes, address: int, stream: Stream) -> None:
        """Put a copy from device memory into pinned memory on a stream."""
        ...

    def to_device(self, address: int, source: Bytes, stream: Stream) -> None:
        """Put a copy from pinned memory into device memory on a stream."""
        ...

    def like(self, array: DeviceArray, shape: tuple[int, ...]) -> Any:
        """Return a new array of the same library, device and element type, for the caller's use."""
        ...


Like = Callable[[Device, DeviceArray, tuple[int, ...]], Any]
"""Returns what takes a result: a new array of a shape, of another array's element type."""


def like(device: Device, array: DeviceArray, shape: tuple[int, ...]) -> Any:
    """Return a new array of the same library, for the caller's use."""
    return device.like(array, shape)


class DeviceArithmetic(Protocol):
    """Kernels that a device runs on memory of its own; addresses are of aligned elements.

    Everything is put on a stream; for no elements, nothing is.
    """

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Copy within the device."""
        ...

    def combine(
        self, op: str, dtype: str, target: int, incoming: int, count: int, stream: Stream
    ) -> None:
        """Let target = target op incoming, elementwise; in the type's own width."""
        ...

    def convert(
        self,
        source: int,
        source_dtype: str,
        target: int,
        target_dtype: str,
        count: int,
        divisor: float,
        stream: Stream,
    ) -> None:
        """Let target = source / divisor, in another float type or in place."""
        ...


HANDLE_BYTES = 64
"""Of memory and of events, as CUDA counts them."""


@dataclass(frozen=True)
class Exported:
    """Registered device memory as other processes can open it.

    handle: of the allocation.  token: by which it is known; not 0.  offset: of the array, in bytes.
    """

    handle: bytes
    token: int
    offset: int


class Peering(Protocol):
    """What a device offers to ranks that share memory with others."""

    @property
    def card(self) -> str:
        """Return the name of the physical device, alike in all processes of a node."""
        ...

    def export(self, address: int, nbytes: int) -> Exported | None:
        """Return how others open memory; None for memory that is not registered."""
        ...

    def open(self, handle: bytes) -> int:
        """Return the address here of another process's allocation."""
        ...

    def close(self, address: int) -> None:
        """Give back what `open` returned."""
        ...

    def make_event(self) -> tuple[Event, bytes]:
        """Return an event that other processes can open, and its handle."""
        ...

    def open_event(self, handle: bytes) -> Event:
        """Return another process's event."""
        ...

    def close_event(self, event: Event) -> None:
        """Give back what `open_event` returned, before its owner may let go of it."""
        ...

    def place(self, event: Event, stream: Stream) -> None:
        """Put an event of `make_event` on a stream, anew."""
        ...

    def fold(
        self,
        op: str,
        dtype: str,
        sources: Sequence[int],
        targets: Sequence[int],
        count: int,
        stream: Stream,
    ) -> Callable[[], Any]:
        """Return what puts a kernel on a stream, as often as it is called.

        It folds count elements at all sources, in order, into all targets: addresses, here or of
        another's memory; a target may be one of the sources.
        """
        ...

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Put a copy on a stream, from another's memory or here, to an address here."""
        ...

    def trial(self, count: int) -> tuple[Any, Callable[[int], bool]]:
        """Return registered float32 elements, all 1, and what tells whether all are a number.

        That waits for the device first.
        """
        ...


def on_device(x: Any) -> bool:
    """Tell whether x is an array in device memory. Reads no element, and imports nothing."""
    if type(x) is np.ndarray:
        return False
    said = getattr(x, "is_cuda", None)  # torch; its interface raises where a gradient is required
    return hasattr(x, "__cuda_array_interface__") if said is None else bool(said)


def library_of(x: Any) -> str:
    """Return the name of the library that x is an array of, also where a program derives from it.

    For what speaks no DLPack that is the package of its class.
    """
    kind = type(x)
    if kind is np.ndarray:
        return "numpy"
    base = next((base for base in reversed(kind.__mro__) if "__dlpack__" in vars(base)), kind)
    return base.__module__.partition(".")[0]


def bare(x: Any) -> Any:
    """Return x without its gradient.

    Raises: TypeError for a torch tensor in whose memory lie the negatives of its values: neither
    DLPack nor the CUDA array interface tells.
    """
    plain = x.detach() if hasattr(x, "detach") else x
    if hasattr(plain, "is_neg") and plain.is_neg():
        raise TypeError(
            "a tensor whose memory holds its values negated (torch's is_neg(), as of a conjugate's "
            "imaginary part) cannot be moved; pass resolve_neg() of it"
        )
    return plain


def renewed(array: DeviceArray) -> DeviceArray:
    """Return an array with what its owner says of its stream now."""
    stream = bare(array.owner).__cuda_array_interface__.get("stream")
    return array if stream == array.stream else replace(array, stream=stream)


def describe(x: Any, *, writable: bool, what: str = "x") -> DeviceArray:
    """Read what an array in device memory says of itself (CUDA Array Interface, version 3).

    writable: a result will be written into it.

    Raises: TypeError for an element type that the table lacks, and for masked or negated arrays;
    ValueError for arrays that are not contiguous, or read-only where a result is to be written.
    """
    try:
        plain = bare(x)
        interface: Mapping[str, Any] = plain.__cuda_array_interface__
        shape = tuple(int(length) for length in interface["shape"])
        dtype = _dtype(plain, interface["typestr"])
    except TypeError as error:
        raise TypeError(f"{what}: {error}") from None
    if interface.get("mask") is not None:
        raise TypeError(f"{what}: a masked array in device memory cannot be moved; fill it first")
    address, readonly = interface["data"]
    if writable and readonly:
        raise ValueError(f"{what}: the result is written in place, but the array is read-only")
    strides = interface.get("strides")
    if strides is not None and not _contiguous(shape, tuple(strides), dtype.itemsize):
        raise ValueError(
            f"{what}: shape {shape} with strides {tuple(strides)} bytes in device memory is not "
            "contiguous; pass a contiguous copy of it, and copy the result back"
        )
    stream = interface.get("stream")
    if stream == 0:
        raise ValueError(f"{what}: names stream 0, which the CUDA array interface leaves undefined")
    return DeviceArray(x, int(address or 0), shape, dtype, stream)


def _dtype(x: Any, typestr: str) -> DType:
    # NumPy has no bfloat16, so the interface's own word for it is only "two bytes".
    named = str(getattr(x, "dtype", "")).rpartition(".")[2]
    if named in DTYPES:
        return DTYPES[named]
    return dtype_named(np.dtype(typestr).name)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    step = itemsize
    if 0 in shape:
        return True
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != step:
            return False
        step *= length
    return True
