"""Device memory that operations borrow."""

from __future__ import annotations

import math
from typing import Any

from .device import DeviceArithmetic, Event, Stream
from .dtypes import DType

Piece = tuple[int, int, Any]
"""(address, bytes, owner) of scratch memory."""


class Place:
    """A part of device memory as an array, whose work goes to one stream.

    piece: of scratch memory that it takes up, if any.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: DType,
        stream: Stream,
        piece: Piece | None = None,
    ) -> None:
        self.address, self.shape, self.piece = address, shape, piece
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": dtype.storage.str,
            "data": (address, False),
            "strides": None,
            "stream": stream,
        }


class Scratch:
    """Registered device memory, lent to one operation after the other.

    A piece is lent again when what still uses it has ended; one that an operation broken off has
    not given back is kept, as kernels and peers may be at it.
    """

    def __init__(self, arithmetic: DeviceArithmetic) -> None:
        self._arithmetic = arithmetic
        self._free: dict[int, list[tuple[Piece, Event]]] = {}
        self._lent: dict[int, Piece] = {}

    def take(self, nbytes: int) -> Piece:
        """Return memory of at least nbytes, which messages and kernels may write at once."""
        size = 1 << max(nbytes - 1, 255).bit_length()
        free = self._free.setdefault(size, [])
        for index, (piece, event) in enumerate(free):
            if event.ended():
                self._lent[piece[0]] = piece
                del free[index]
                return piece
        address, owner = self._arithmetic.allocate(size)
        piece = self._lent[address] = address, size, owner
        return piece

    def array(self, shape: tuple[int, ...], dtype: DType, stream: Stream) -> Place:
        """Return memory for an array; its piece is to be given back."""
        piece = self.take(math.prod(shape) * dtype.itemsize)
        return Place(piece[0], shape, dtype, stream, piece)

    def give(self, piece: Piece, event: Event) -> None:
        """Take a piece back; event: behind its last use."""
        self._free[piece[1]].append((piece, event))
        self._lent.pop(piece[0], None)
