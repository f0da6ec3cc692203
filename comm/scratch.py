"""Device memory that operations borrow."""

from __future__ import annotations

from typing import Any

from .device import DeviceArithmetic, Event

Piece = tuple[int, int, Any]
"""(address, bytes, owner) of scratch memory."""


class Scratch:
    """Registered device memory, lent to one operation after the other.

    A piece is lent again when what still uses it has ended.
    """

    def __init__(self, arithmetic: DeviceArithmetic) -> None:
        self._arithmetic = arithmetic
        self._free: dict[int, list[tuple[Piece, Event]]] = {}

    def take(self, nbytes: int) -> Piece:
        """Return memory of at least nbytes, which messages and kernels may write at once."""
        size = 1 << max(nbytes - 1, 255).bit_length()
        free = self._free.setdefault(size, [])
        for index, (piece, event) in enumerate(free):
            if event.ended():
                del free[index]
                return piece
        address, owner = self._arithmetic.allocate(size)
        return address, size, owner

    def give(self, piece: Piece, event: Event) -> None:
        """Take a piece back; event: behind its last use."""
        self._free[piece[1]].append((piece, event))
