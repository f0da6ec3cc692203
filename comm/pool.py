"""Memory that is lent to one operation after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from .device import Event

Lent = TypeVar("Lent")


class Pool(Generic[Lent]):
    """Pieces of memory, each of a power of two bytes, which are made when none is free.

    A piece that comes back is lent again once what still uses it has ended. One that an operation
    broken off has not given back is kept, as kernels, copies and peers may be at it.
    """

    def __init__(self, least: int, make: Callable[[int], Lent]) -> None:
        """least: bytes of the smallest pieces, a power of two.  make: return a piece of a size."""
        self._least, self._make = least, make
        self._free: dict[int, list[tuple[Lent, Event | None]]] = {}
        self._made: dict[int, tuple[int, Lent]] = {}  # by id, with the size: keeps all of them

    def take(self, nbytes: int) -> Lent:
        """Return a piece of nbytes or more, which may be written at once."""
        size = 1 << (max(nbytes, self._least) - 1).bit_length()
        free = self._free.setdefault(size, [])
        for index, (piece, event) in enumerate(free):
            if event is None or event.ended():
                del free[index]
                return piece
        piece = self._make(size)
        self._made[id(piece)] = size, piece
        return piece

    def give(self, piece: Lent, event: Event | None) -> None:
        """Take a piece back; event: behind its last use, None where that has ended."""
        size, _ = self._made[id(piece)]
        self._free[size].append((piece, event))
