"""Pack gradients into a bucket of GPU memory and back: one launch of a kernel for all of them.

Whether all was finite is found on the way; the answer can be asked for once the host waits for the
bucket anyway. Where no kernel can be compiled and run the same is done by torch's operations, a few
for each tensor, and whether all was finite stays unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .tensors import dtype_name

if TYPE_CHECKING:
    from ..kernels.device.launch import Launcher
    from ..kernels.device.table import ByProducts, Tiles

__all__ = [
    "DevicePacker",
    "Members",
    "launcher_of",
    "pack_by_torch",
    "pack_on_device",
    "unpack_by_torch",
    "unpack_on_device",
]

Members = Sequence[tuple[Tensor, int]]
"""Tensors of one dtype, with their offsets in the bucket."""

_TABLES = 256
"""Tables of addresses that are kept: gradients lie where they lay the step before, mostly."""


class DevicePacker:
    """Launch the kernels of one device, on whatever stream is the caller's."""

    def __init__(self, stream_of: Callable[[], int], ordinal: int, **grid: int) -> None:
        """stream_of: returns the caller's current stream.  grid: what a `Launcher` takes of it."""
        self._stream_of, self._ordinal, self._grid = stream_of, ordinal, grid
        self._tables: dict[object, Tiles] = {}
        self._learned: dict[object, ByProducts] = {}

    def pack(self, members: Members, flat: Tensor, scale: float) -> Callable[[], bool]:
        """Write all members times scale to their places; return what tells whether all are finite.

        What it returns waits for the stream, and is to be asked before the bucket is packed again.
        """
        from ..kernels.device.pack import pack
        from ..kernels.device.table import ByProducts, Span

        launcher = self.launcher()
        key = flat.data_ptr(), flat.numel(), launcher.stream
        learned = self._learned.get(key)
        if learned is None:
            if len(self._learned) >= _TABLES:
                self._learned.clear()
            learned = self._learned[key] = ByProducts.of(launcher)
        bucket = Span(flat.data_ptr(), flat.numel())
        tiles = self._tiles(members, flat, launcher)
        pack(tiles, bucket, launcher, scale=scale, learned=learned)
        return lambda: learned.read(launcher).finite

    def unpack(self, members: Members, flat: Tensor) -> None:
        """Write all members from their places."""
        from ..kernels.device.pack import unpack
        from ..kernels.device.table import Span

        launcher = self.launcher()
        bucket = Span(flat.data_ptr(), flat.numel())
        unpack(self._tiles(members, flat, launcher), bucket, launcher)

    def launcher(self) -> Launcher:
        """Return where kernels run: the caller's current stream."""
        from ..kernels.device.launch import Launcher

        return Launcher(self._ordinal, self._stream_of(), **self._grid)

    def _tiles(self, members: Members, flat: Tensor, launcher: Launcher) -> Tiles:
        """Return the members' table in device memory; it refers to addresses, and keeps none."""
        from ..kernels.device.table import Tiles
        from ..kernels.table import PointerTable

        first = members[0][0]
        dtypes = dtype_name(first.dtype), dtype_name(flat.dtype)
        addresses = tuple(tensor.data_ptr() for tensor, _ in members)
        counts = tuple(tensor.numel() for tensor, _ in members)
        offsets = tuple(offset for _, offset in members)
        key = addresses, counts, offsets, dtypes, launcher.stream
        tiles = self._tables.get(key)
        if tiles is None:
            if len(self._tables) >= _TABLES:
                self._tables.clear()
            table = PointerTable(
                addresses=np.array(addresses, np.int64),
                counts=np.array(counts, np.int64),
                offsets=np.array(offsets, np.int64),
                itemsize=first.element_size(),
            )
            tiles = self._tables[key] = Tiles.of(table, *dtypes, launcher)
        return tiles


@cache
def _packer(ordinal: int) -> DevicePacker | None:
    """Return a device's packer; None where no kernel can be compiled and run."""
    from ..kernels.device.usable import why_not

    if why_not(ordinal):
        return None
    return DevicePacker(lambda: int(torch.cuda.current_stream(ordinal).cuda_stream) or 1, ordinal)


def launcher_of(device: torch.device) -> Launcher | None:
    """Return where kernels run on the caller's stream; None for no GPU, or without kernels."""
    packer = _packer(device.index or 0) if device.type == "cuda" else None
    return None if packer is None else packer.launcher()


def pack_on_device(
    members: Members, flat: Tensor, scale: float
) -> bool | Callable[[], bool] | None:
    """Pack by the kernels where there are any; see `DevicePacker.pack`."""
    packer = _packer(flat.device.index or 0)
    return (
        pack_by_torch(members, flat, scale) if packer is None else packer.pack(members, flat, scale)
    )


def unpack_on_device(members: Members, flat: Tensor) -> None:
    """Unpack by the kernels where there are any."""
    packer = _packer(flat.device.index or 0)
    if packer is None:
        unpack_by_torch(members, flat)
    else:
        packer.unpack(members, flat)


def pack_by_torch(members: Members, flat: Tensor, scale: float) -> bool | None:
    """Do as the kernels do, in torch's own operations, on the caller's stream.

    Does not look whether all is finite, since the host would have to wait for the answer.
    """
    for tensor, offset in members:
        place = flat[offset : offset + tensor.numel()]
        source = tensor.reshape(-1)
        if scale != 1.0:
            source = source.to(_arithmetic(tensor, flat)) * scale
        place.copy_(_rounded(source, flat))
    return None


def unpack_by_torch(members: Members, flat: Tensor) -> None:
    """Do as the kernels do, in torch's own operations, on the caller's stream."""
    for tensor, offset in members:
        piece = flat[offset : offset + tensor.numel()]
        tensor.copy_(_rounded(piece, tensor).view(tensor.shape))


def _arithmetic(tensor: Tensor, flat: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (tensor.dtype, flat.dtype) else torch.float32


def _rounded(source: Tensor, target: Tensor) -> Tensor:
    """From float64 to a half width by way of float32, as the kernels do."""
    narrow = source.dtype == torch.float64 and target.element_size() == 2
    return source.to(torch.float32) if narrow else source
