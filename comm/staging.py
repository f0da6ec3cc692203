"""Pinned host memory that device memory passes through, lent to one operation after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .device import Bytes, Device, Event
from .dtypes import DType

_LEAST = 1 << 12


@dataclass(frozen=True)
class Place:
    """A piece of pinned memory, known by the bytes that can be lent of it."""

    memory: Bytes

    def part(self, start: int, nbytes: int) -> Bytes:
        """Return bytes [start, start + nbytes)."""
        return self.memory[start : start + nbytes]


@dataclass(frozen=True)
class Typed:
    """Host elements of a type that NumPy may lack, as `buffer.wrap` takes them."""

    view: np.ndarray[Any, Any]
    dtype: DType


class Staging:
    """The pinned memory of one rank for one device.

    A place that comes back is lent again only when the copies that still use it have ended; one
    that an operation broken off has not given back is kept.
    """

    def __init__(self, device: Device, allocate: Callable[[int], Bytes]) -> None:
        """allocate: return host memory of so many bytes; best where the node's ranks map it."""
        self._device = device
        self._allocate = allocate
        self._free: dict[int, list[tuple[Place, Event | None]]] = {}
        self._lent: dict[int, Place] = {}

    def take(self, nbytes: int) -> Place:
        """Return a place of nbytes or more, which the host may write at once."""
        size = max(_LEAST, 1 << max(nbytes - 1, 0).bit_length())
        free = self._free.setdefault(size, [])
        for index, (place, event) in enumerate(free):
            if event is None or event.ended():
                self._lent[id(place)] = place
                del free[index]
                return place
        memory = self._allocate(size)
        self._device.pin(memory)
        place = Place(memory)
        self._lent[id(place)] = place
        return place

    def give(self, place: Place, event: Event | None) -> None:
        """Take a place back; event: behind its last use, None where that has ended."""
        self._free[place.memory.size].append((place, event))
        self._lent.pop(id(place), None)
