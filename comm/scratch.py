"""Device memory that operations borrow."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .device import Device, Stream
from .dtypes import DType
from .pool import Pool

_LEAST = 256


class Room(NamedTuple):
    """Scratch memory: where it begins, and what owns it."""

    address: int
    owner: Any


class DevicePlace:
    """A part of device memory as an array, whose work goes to one stream.

    room: the scratch memory that it takes up, if any.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: DType,
        stream: Stream,
        room: Room | None = None,
    ) -> None:
        self.address, self.shape, self.room = address, shape, room
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": dtype.storage.str,
            "data": (address, False),
            "strides": None,
            "stream": stream,
        }


class Scratch(Pool[Room]):
    """Registered device memory, which messages and kernels may use."""

    def __init__(self, device: Device) -> None:
        super().__init__(_LEAST, lambda nbytes: Room(*device.room(nbytes)))

    def array(self, shape: tuple[int, ...], dtype: DType, stream: Stream) -> DevicePlace:
        """Return memory for an array; its room is to be given back."""
        room = self.take(math.prod(shape) * dtype.itemsize)
        return DevicePlace(room.address, shape, dtype, stream, room)
