"""Memory that the ranks of a node map into each other: anonymous, and gone with its processes.

A rank's memory is one file without a name, as large as the machine's memory but sparse, so that
buffers come and go without another word to the peers. A peer opens it through /proc.
"""

from __future__ import annotations

import bisect
import mmap
import os
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import CommError
from .trace import TRACE_BYTES

Returned = Callable[[], bool]
"""Tells whether its receiver has done with what was lent to a message."""

_PAGE = mmap.PAGESIZE
BELL_AT = 64
"""Where the rank's bell lies, see kernels.bell; a cache line of its own behind the token's."""
_TRACE_AT = _PAGE
_HEAD = 4 * _PAGE + -(-TRACE_BYTES // _PAGE) * _PAGE
_STAGGER = 2048
"""Buffers of different ranks that lie at the same place of a page slow each other down."""

_VIRTUAL_LIMIT = 1 << 45
"""Bytes of address space that all memories of a node may take together."""


@dataclass(frozen=True)
class Handle:
    """What a peer needs to map a memory: process, descriptor, bytes, and proof that it is this."""

    pid: int
    descriptor: int
    nbytes: int
    token: int

    def words(self) -> npt.NDArray[np.int64]:
        """Return the handle as four int64."""
        return np.array([self.pid, self.descriptor, self.nbytes, self.token], np.int64)


class Mapped:
    """A file in this process's address space, as long as somebody refers to it."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_NORESERVE", 0)
        self._map = mmap.mmap(descriptor, nbytes, flags)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self.address = int(self.bytes.ctypes.data)

    @property
    def token(self) -> npt.NDArray[np.int64]:
        """Return the first word, by which a memory is known."""
        return self.bytes[:8].view(np.int64)

    @property
    def trace(self) -> npt.NDArray[np.uint8]:
        """Return the place of the ring of the rank's last operations; see trace.Ring."""
        return self.bytes[_TRACE_AT : _TRACE_AT + TRACE_BYTES]

    def forget(self, low: int, high: int) -> None:
        """Give the pages in [low, high) back to the system; they are zeros when next touched."""
        self._map.madvise(mmap.MADV_REMOVE, low, high - low)


class Mapping:
    """A peer's memory, mapped here. `address`: where.  trace: of its last operations."""

    def __init__(self, handle: Handle) -> None:
        """Map the memory of a process on this node.

        Raises: CommError where it cannot be reached, or where something else is found.
        """
        path = f"/proc/{handle.pid}/fd/{handle.descriptor}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise CommError(
                f"the memory of process {handle.pid} cannot be opened: {error}"
            ) from error
        try:
            if os.fstat(descriptor).st_size != handle.nbytes:
                raise CommError(f"process {handle.pid} is another process here")
            self._mapped = Mapped(descriptor, handle.nbytes)
            self.trace = self._mapped.trace
        except OSError as error:
            raise CommError(
                f"the memory of process {handle.pid} cannot be mapped: {error}"
            ) from error
        finally:
            os.close(descriptor)
        if int(self._mapped.token[0]) != handle.token:
            raise CommError(f"process {handle.pid} is another process here")
        self.address = self._mapped.address


class Memory:
    """One rank's memory, from which its buffers and its groups' staging areas are taken.

    handle: for the peers.
    trace: the place of the rank's ring of operations.
    """

    def __init__(self, rank: int, num_ranks: int) -> None:
        """Create the memory of one of num_ranks ranks of a node.

        Raises: OSError where the system gives none.
        """
        physical = os.sysconf("SC_PHYS_PAGES") * _PAGE
        self.nbytes = min(physical, _VIRTUAL_LIMIT // max(num_ranks, 1)) // _PAGE * _PAGE
        self._descriptor = os.memfd_create("ringfold", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        os.ftruncate(self._descriptor, self.nbytes)
        self._mapped = Mapped(self._descriptor, self.nbytes)
        self.address = self._mapped.address
        self.trace = self._mapped.trace
        token = secrets.randbits(62)
        self._mapped.token[0] = token
        self.handle = Handle(os.getpid(), self._descriptor, self.nbytes, token)
        self._shift = rank * _STAGGER % _PAGE
        self._free = [(_HEAD, self.nbytes)]
        self._lock = threading.RLock()
        self._returned: deque[tuple[int, int]] = deque()
        self._kept: deque[tuple[Returned, object]] = deque()
        _MEMORIES.add(self)

    def allocate(self, nbytes: int) -> Block:
        """Return a block of zeros, aligned to 64 bytes; it is taken until it is released.

        Raises: MemoryError where no space is left.
        """
        needed = -(-(nbytes + self._shift) // _PAGE) * _PAGE
        with self._lock:  # threads may ask at once, `empty` and messages
            self._take_back()
            for index, (low, high) in enumerate(self._free):
                if high - low >= needed:
                    self._free[index : index + 1] = (
                        [(low + needed, high)] if low + needed < high else []
                    )
                    return Block(self, low, low + needed, low + self._shift, nbytes)
        raise MemoryError(f"no {nbytes} bytes are left of {self.nbytes} of shared memory")

    def lend(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return a block as an array; it is free again when nobody refers to the array."""
        block = self.allocate(nbytes)
        lent = np.asarray(block)
        weakref.finalize(block, self._release, block.low, block.high).atexit = False
        return lent

    def keep(self, lent: Iterable[tuple[Returned, object]]) -> None:
        """Hold what was lent to peers by who is gone, or has given up, until it is returned."""
        # Called by the garbage collector, as `_release` is.
        self._kept.extend(lent)

    def release(self, block: Block) -> None:
        """Take a block back, which nobody on this node may use any more."""
        self._release(block.low, block.high)

    def _release(self, low: int, high: int) -> None:
        # Called by the garbage collector, at any moment and in any thread; also in a fork of the
        # rank's process, whose pages these are as well.
        if os.getpid() != self.handle.pid:
            return
        self._mapped.forget(low, high)
        self._returned.append((low, high))

    def _take_back(self) -> None:
        for _ in range(len(self._kept)):
            returned, _ = self._kept[0]  # held, until it is known to be returned
            if returned():
                self._kept.popleft()
            else:
                self._kept.rotate(-1)
        while self._returned:
            bisect.insort(self._free, self._returned.popleft())
        merged: list[tuple[int, int]] = []
        for low, high in self._free:
            if merged and merged[-1][1] == low:
                low = merged.pop()[0]
            merged.append((low, high))
        self._free = merged

    def place(self, address: int, nbytes: int) -> int | None:
        """Return the offset of a piece of this memory, None for memory elsewhere."""
        offset = address - self.address
        return offset if offset >= 0 and offset + nbytes <= self.nbytes else None


class Block:
    """A piece of a rank's memory, for NumPy through the array interface.

    low, high: the pages that it takes.  offset: where its bytes begin.
    """

    def __init__(self, memory: Memory, low: int, high: int, offset: int, nbytes: int) -> None:
        self.low, self.high, self.offset = low, high, offset
        self.__array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (memory.address + offset, False),
            "version": 3,
        }


_MEMORIES: weakref.WeakSet[Memory] = weakref.WeakSet()
"""All memories of this process, to know a foreign one by its address."""


def owner_of(address: int) -> Memory | None:
    """Return the memory of this process that holds an address."""
    return next((memory for memory in _MEMORIES if memory.place(address, 1) is not None), None)
