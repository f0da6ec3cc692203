"""A GPU's memory that other processes open, and theirs that is opened here.

Source: CUDA Runtime API, section Device Management, cudaIpc*. A handle stands for a whole
allocation, no process can open its own, and memory must not be freed that others have open. Nobody
tells when they no longer have, so what was shown to others is used again here, and never freed:
by what is half as large or more, and by anything smaller before the device is said to be full.
"""

from __future__ import annotations

import gc
import math
import os
import secrets
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..device import Exported
from ..errors import CommError, OutOfMemory

BLOCK_BYTES = 2 << 20
"""Smaller allocations may be pieces of one block, and a handle opens the block, with what else is
in it (CUDA C++ Programming Guide, Interprocess Communication)."""


@dataclass
class Piece:
    """An allocation of CUDA's.

    token: by which others know it.  handle: by which they open it; empty until it was shown.
    """

    base: int
    nbytes: int
    token: int
    handle: bytes = b""


def give_back(cupy: Any) -> None:
    """Let libraries give unused memory of the current device back to CUDA, as CuPy and torch do.

    They do so where an allocation of theirs fails, and cannot know of others'.
    """
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    torch = sys.modules.get("torch")  # which has none where nobody has imported it
    if torch is not None:
        torch.cuda.empty_cache()


class Allocation:
    """A piece in use, which is given back when nobody refers to this."""

    def __init__(self, piece: Piece, returned: Any) -> None:
        self.piece = piece
        weakref.finalize(self, returned, piece).atexit = False


class CudaMemory:
    """The memory of one GPU of this process."""

    def __init__(self, cupy: Any, ordinal: int) -> None:
        self._cupy, self._runtime = cupy, cupy.cuda.runtime
        self._device = cupy.cuda.Device(ordinal)
        self._process = os.getpid()
        self._allocations: weakref.WeakSet[Allocation] = weakref.WeakSet()
        self._spare: deque[Piece] = deque()
        self._opened: dict[bytes, tuple[int, int]] = {}  # address, and how often it was opened
        self._lock = threading.Lock()
        self._listing = threading.Lock()  # of allocations and spare pieces; never held over a call

    @contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Let CUDA's errors be CommErrors that say what could not be done."""
        try:
            with self._device:
                yield
        except self._runtime.CUDARuntimeError as error:
            raise CommError(f"{what}: {error}") from error

    def allocate(self, nbytes: int) -> Allocation:
        """Return memory in whole blocks of its own.

        Raises: OutOfMemory where there is none left; CommError where the device refuses it.
        """
        size = max(1, -(-nbytes // BLOCK_BYTES)) * BLOCK_BYTES
        with self.told(f"{nbytes} bytes of GPU memory cannot be had"):
            piece = self._again(size, 2 * size) or self._new(size) or self._again(size)
        if piece is None:
            raise OutOfMemory(self._full(nbytes))
        made = Allocation(piece, self._return)
        with self._listing:
            self._allocations.add(made)
        return made

    def _new(self, size: int) -> Piece | None:
        """Return memory of CUDA's; None where nothing is left that libraries do not use."""
        base = self._malloc(size)
        if base is None:
            give_back(self._cupy)
            base = self._malloc(size)
        return None if base is None else Piece(base, size, secrets.randbits(62) | 1)

    def _malloc(self, size: int) -> int | None:
        try:
            return int(self._runtime.malloc(size))
        except self._runtime.CUDARuntimeError as error:
            if error.status != self._runtime.errorMemoryAllocation:
                raise
        return None

    def _again(self, size: int, most: float = math.inf) -> Piece | None:
        """Return a spare piece for new use."""
        piece = self._unused(size, most)
        if piece is not None:
            # Streams follow what other ranks still do with it, and all of them end here.
            self._runtime.deviceSynchronize()
        return piece

    def _unused(self, size: int, most: float = math.inf) -> Piece | None:
        """Return the smallest spare piece of `size` to `most` bytes."""
        best: Piece | None = None
        with self._listing:
            for _ in range(len(self._spare)):  # which grows meanwhile, see `_return`
                piece = self._spare.popleft()
                if not size <= piece.nbytes <= most:
                    self._spare.append(piece)
                elif best is None:
                    best = piece
                else:
                    best, other = sorted((best, piece), key=lambda one: one.nbytes)
                    self._spare.append(other)
        return best

    def _full(self, nbytes: int) -> str:
        with self._listing:
            spare = sum(self._spare[at].nbytes for at in range(len(self._spare)))
            used = sum(one.piece.nbytes for one in self._allocations)
        return (
            f"no {nbytes} bytes of GPU memory are left, with what CuPy and torch have given back: "
            f"{used} bytes are in use as registered memory, and {spare}, which other ranks may "
            "have open, are kept for what fits there"
        )

    def _return(self, piece: Piece) -> None:
        # Called by the garbage collector, at any moment and in any thread; so it takes no lock. A
        # fork of this process has nothing of the GPU.
        if os.getpid() != self._process:
            return
        if piece.handle:
            self._spare.append(piece)
        else:
            self._runtime.free(piece.base)

    def export(self, address: int, nbytes: int) -> Exported | None:
        """Return how others open memory; None for memory that was not allocated here."""
        with self._listing:  # other threads allocate meanwhile
            allocations = list(self._allocations)
        for one in allocations:
            piece = one.piece
            offset = address - piece.base
            if offset >= 0 and offset + nbytes <= piece.nbytes:
                if not piece.handle:
                    with self.told("memory cannot be shared"):
                        piece.handle = bytes(self._runtime.ipcGetMemHandle(piece.base))
                return Exported(piece.handle, piece.token, offset)
        return None

    def open(self, handle: bytes) -> int:
        """Return the address here of another process's allocation; each is opened once."""
        with self._lock:
            address, uses = self._opened.get(handle, (0, 0))
            if not uses:
                with self.told("another rank's memory cannot be opened"):
                    address = int(self._runtime.ipcOpenMemHandle(handle))
            self._opened[handle] = address, uses + 1
            return address

    def close(self, address: int) -> None:
        """Give back what `open` returned."""
        with self._lock:
            handle = next(one for one, (at, _) in self._opened.items() if at == address)
            _, uses = self._opened.pop(handle)
            if uses > 1:
                self._opened[handle] = address, uses - 1
            else:
                with self.told("another rank's memory cannot be given back"):
                    # Operations have ended for the host, and kernels may still read there.
                    self._runtime.deviceSynchronize()
                    self._runtime.ipcCloseMemHandle(address)
