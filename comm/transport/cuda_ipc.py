"""CUDA's memory and events as other processes open them, and kernels that fold such memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..arithmetic import divisors
from ..device import Event, Stream
from ..dtypes import DTYPES
from ..errors import CommError
from .cuda_memory import CudaMemory

_TABLES = 256
"""Tables of addresses that are kept: one for each buffer that is reduced again and again."""


class OpenedEvent:
    """Another process's event."""

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class CudaPeering:
    """What one GPU of this process offers to other processes."""

    def __init__(
        self,
        cupy: Any,
        ordinal: int,
        memory: CudaMemory,
        event_of: Callable[[Any], Event],
        handle_of: Any,
    ) -> None:
        """event_of: wrap an event as the device does.  handle_of: unwrap it, to CUDA's handle."""
        self._cupy, self._runtime, self._ordinal = cupy, cupy.cuda.runtime, ordinal
        self._memory = memory
        self.export, self.open, self.close = memory.export, memory.open, memory.close
        self._told = memory.told
        self._event_of, self._handle_of = event_of, handle_of
        self._tables: dict[tuple[tuple[int, ...], Stream], tuple[Any, Any]] = {}

    @cached_property
    def card(self) -> str:
        """Return a card's place on the bus; where there is none, what no other process says."""
        try:
            return str(self._runtime.deviceGetPCIBusId(self._ordinal))
        except self._runtime.CUDARuntimeError:
            return f"device {self._ordinal} of process {os.getpid()}"

    def allocate(self, shape: tuple[int, ...], storage: np.dtype[Any]) -> Any:
        """Return a CuPy array in registered memory."""
        allocation = self._memory.allocate(int(np.prod(shape, dtype=np.int64)) * storage.itemsize)
        piece = allocation.piece
        held = self._cupy.cuda.UnownedMemory(piece.base, piece.nbytes, allocation, self._ordinal)
        return self._cupy.ndarray(shape, storage, self._cupy.cuda.MemoryPointer(held, 0))

    def make_event(self) -> tuple[Event, bytes]:
        """Return an event that other processes can open, and its handle."""
        with self._told("no event can be shared"):
            event = self._cupy.cuda.Event(block=False, disable_timing=True, interprocess=True)
            return self._event_of(event), bytes(self._runtime.ipcGetEventHandle(event.ptr))

    def open_event(self, handle: bytes) -> Event:
        """Return another process's event."""
        with self._told("another rank's event cannot be opened"):
            return self._event_of(OpenedEvent(int(self._runtime.ipcOpenEventHandle(handle))))

    def close_event(self, event: Event) -> None:
        """Give back what `open_event` returned, before its owner may let go of it.

        A stream may still wait for it: cudaEventDestroy returns at once then, and what the event
        takes is released when that has come. With one that its owner has destroyed, nothing may be
        done (CUDA Runtime API, Event Management and cudaIpcOpenEventHandle).
        """
        with self._told("another rank's event cannot be given back"):
            self._runtime.eventDestroy(self._handle_of(event))

    def place(self, event: Event, stream: Stream) -> None:
        """Put an event of `make_event` on a stream, anew."""
        with self._cupy.cuda.Device(self._ordinal):
            self._runtime.eventRecord(self._handle_of(event), stream)

    def fold(
        self,
        op: str,
        dtype: str,
        sources: Sequence[int],
        targets: Sequence[int],
        count: int,
        stream: Stream,
    ) -> Callable[[], Any]:
        """Return what puts a kernel on a stream: fold all sources, in order, into all targets.

        Half widths are added in float32 and rounded once, as on the host.
        """
        from ...kernels.device.fold import prepare_fold

        before, after = divisors(op, DTYPES[dtype], len(sources))
        (read, launcher), (written, _) = (
            self._placed(tuple(addresses), stream) for addresses in (sources, targets)
        )
        return prepare_fold(op, dtype, read, written, count, launcher, first=before, last=after)

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Put a copy on a stream; the two may lie on different GPUs."""
        runtime = self._runtime
        with self._told("another rank's memory cannot be copied"):
            runtime.memcpyAsync(target, source, nbytes, runtime.memcpyDefault, stream)

    def _placed(self, addresses: tuple[int, ...], stream: Stream) -> tuple[Any, Any]:
        """Return a table of addresses in device memory, which is kept for the next time."""
        from ...kernels.device.fold import Peers
        from ...kernels.device.launch import Launcher

        stream = int(stream)  # which keeps none, as this would for longer than who has it
        known = self._tables.get((addresses, stream))
        if known is None:
            if len(self._tables) >= _TABLES:
                self._tables.clear()
            launcher = Launcher(self._ordinal, stream)
            known = self._tables[addresses, stream] = Peers.of(addresses, launcher), launcher
        return known

    def trial(self, count: int) -> tuple[Any, Callable[[int], bool]]:
        """Return registered ones of float32, and what waits and tells whether all are a number."""
        from ...kernels.device.usable import why_not

        why = why_not(self._ordinal)
        if why:
            raise CommError(f"there are no kernels: {why}")
        with self._told("no memory can be had"):
            x = self.allocate((count,), np.dtype(np.float32))
            with self._cupy.cuda.Device(self._ordinal):
                x[...] = 1

        def all_are(number: int) -> bool:
            with self._cupy.cuda.Device(self._ordinal):
                return bool((x == number).all())

        return x, all_are
