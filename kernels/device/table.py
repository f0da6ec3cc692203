"""Memory as kernels take it: spans, and the tiles that a table is cut into for one launch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..storage import STORAGE, Array
from ..table import Packed, PointerTable, check_pair
from .launch import Launcher
from .primitives import simulating

TILE_ELEMENTS = 8192
"""Elements of a tile: a multiple of all vectors, so that a tensor's tiles are aligned alike."""

ROW_WORDS = 3
"""int64 of a tile: address of its first element, its place in the bucket, its elements."""


@dataclass(frozen=True)
class Span:
    """Contiguous device memory: the address of its first byte, and its elements.

    The address may be 0 where there are none.
    """

    address: int
    count: int

    def check(self, dtype: str, what: str) -> None:
        """Refuse an address that a kernel for `dtype` could not read; `what` names it."""
        itemsize = STORAGE[dtype].itemsize
        if self.count < 0:
            raise ValueError(f"{what}: expected 0 elements or more, got {self.count}")
        if self.count and not self.address:
            raise ValueError(f"{what}: null address for {self.count} elements")
        if self.count and self.address % itemsize:
            raise ValueError(
                f"{what}: address {self.address:#x} is not aligned to {itemsize} bytes of {dtype}"
            )


@dataclass(frozen=True)
class Placed:
    """An array in device memory, as long as this object lives."""

    span: Span
    owner: Any = field(repr=False)

    def read(self) -> Array:
        """Copy it to the host, and wait for that. Not ordered behind non-blocking streams."""
        if isinstance(self.owner, np.ndarray):
            return np.array(self.owner)
        host: Array = self.owner.copy_to_host()
        return host


def place(array: Array, launcher: Launcher) -> Placed:
    """Copy a host array to new device memory, on the launcher's stream; none for no elements."""
    host = np.ascontiguousarray(array)
    if simulating() or not host.size:
        owner = host.copy()
        return Placed(Span(owner.ctypes.data if owner.size else 0, owner.size), owner)
    from numba import cuda

    with cuda.gpus[launcher.device]:
        made = cuda.to_device(host, stream=launcher.external)
    return Placed(Span(int(made.device_ctypes_pointer.value or 0), host.size), made)


def cut(table: PointerTable, tile: int = TILE_ELEMENTS) -> npt.NDArray[np.int64]:
    """Cut a table's tensors into tiles of at most `tile` elements: shape (tiles, ROW_WORDS).

    Empty tensors have none, whatever their address.
    """
    if tile < 16 or tile % 16:
        raise ValueError(f"tile: expected a positive multiple of 16 elements, got {tile}")
    num_tiles = -(-table.counts // tile)
    tensor = np.repeat(np.arange(table.counts.size), num_tiles)
    start = (np.arange(tensor.size) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * tile
    rows = np.empty((tensor.size, ROW_WORDS), np.int64)
    rows[:, 0] = table.addresses[tensor] + start * table.itemsize
    rows[:, 1] = table.offsets[tensor] + start
    rows[:, 2] = np.minimum(tile, table.counts[tensor] - start)
    return rows


@dataclass(frozen=True)
class Tiles:
    """A pointer table in device memory, for one pair of dtypes; made once, used every step."""

    rows: Placed
    num_tiles: int
    extent: int
    tensor_dtype: str
    bucket_dtype: str
    owners: tuple[Any, ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls,
        table: PointerTable,
        tensor_dtype: str,
        bucket_dtype: str,
        launcher: Launcher,
        tile: int = TILE_ELEMENTS,
    ) -> Tiles:
        """Place a table whose addresses are of device memory.

        Raises: TypeError for a pair of dtypes outside PAIRS; ValueError for a tensor whose address
        is not aligned to its dtype.
        """
        check_pair(table, tensor_dtype, bucket_dtype)
        for index, (address, count) in enumerate(zip(table.addresses, table.counts, strict=True)):
            Span(int(address), int(count)).check(tensor_dtype, f"tensor {index}")
        rows = cut(table, tile)
        return cls(
            place(rows.reshape(-1), launcher),
            len(rows),
            table.extent,
            tensor_dtype,
            bucket_dtype,
            table.owners,
        )

    def check_bucket(self, bucket: Span) -> None:
        """Refuse a bucket that the table reaches beyond."""
        bucket.check(self.bucket_dtype, "bucket")
        if self.extent > bucket.count:
            raise ValueError(
                f"bucket of {bucket.count} elements is too small: the table reaches {self.extent}"
            )


@dataclass(frozen=True)
class ByProducts:
    """Device memory for what passes learn on the way; of one stream at a time.

    The first 16 bytes are the result, as two float64: square norm, and 1 where all was finite. Then
    a ticket, and one such pair for each block. A pass overwrites the result of the one before.
    """

    memory: Placed
    max_blocks: int

    @classmethod
    def of(cls, launcher: Launcher) -> ByProducts:
        """Make it for launches of this launcher's grid."""
        words = np.zeros(2 * (2 + launcher.max_blocks))
        words[:2] = _NOTHING
        return cls(place(words, launcher), launcher.max_blocks)

    def clear(self, launcher: Launcher) -> None:
        """Put on the stream what holds for no elements: finite, and a norm of 0."""
        if simulating():
            self.memory.owner[:2] = _NOTHING
            return
        from numba import cuda

        with cuda.gpus[launcher.device]:
            stream = launcher.external
            self.memory.owner[:2].copy_to_device(np.array(_NOTHING), stream=stream)

    def read(self, launcher: Launcher) -> Packed:
        """Return what the last pass learned, after waiting for the launcher's stream."""
        if simulating():
            norm, finite = self.memory.owner[:2]
            return Packed(bool(finite), float(norm))
        from numba import cuda

        with cuda.gpus[launcher.device]:
            stream = launcher.external
            host = self.memory.owner[:2].copy_to_host(stream=stream)
            stream.synchronize()
        return Packed(bool(host[1]), float(host[0]))


_NOTHING = (0.0, 1.0)
