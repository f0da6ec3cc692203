"""The memory of buckets, the same in each pass as long as nobody else needs it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..comm.errors import OutOfMemory
from .buckets import Bucket
from .flatten import Flattened, Home, wire_of
from .flight import Load

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["Counters", "Homes"]


class Homes:
    """The memory of each bucket, the same in each pass as long as nobody else needs it.

    There are up to two for each, which take turns where a program keeps the gradients of one pass
    until after the next.

    wire: names the dtype of the memory, see `flatten.WIRES`; None for the gradients' own.
    """

    def __init__(self, comm: Communicator, wire: str | None = None) -> None:
        self._comm, self._wire = comm, wire
        self._known: dict[tuple[Bucket, int], list[Home]] = {}

    def flatten(self, bucket: Bucket, load: Load, num_flags: int = 0) -> Flattened:
        """Tie gradients to the memory of their bucket, with places for flags behind them."""
        homes = self._known.setdefault((bucket, num_flags), [])
        for place, home in enumerate(homes):  # the last first, where gradients may live now
            made = Flattened(load.gradients, home)
            if not made.takes_from_others:
                homes.insert(0, homes.pop(place))
                return made
        own = getattr(torch, bucket.dtype)
        dtype = getattr(torch, wire_of(bucket.dtype, self._wire))
        flat = _allocate(self._comm, bucket.count + num_flags, dtype, load.device)
        homes.insert(0, Home(flat, bucket.offsets, bucket.counts, own))
        del homes[2:]
        return Flattened(load.gradients, homes[0])

    def forget(self) -> None:
        self._known.clear()


class Counters:
    """Keep one array for the flags of each bucket, which the communicator knows from then on."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[Bucket, int], np.ndarray[Any, np.dtype[np.int32]]] = {}

    def fill(self, bucket: Bucket, load: Load) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Return the array of a bucket, with the flags of a pass."""
        flags = load.flags
        key = bucket, len(flags)
        array = self._arrays.get(key)
        if array is None:
            array = self._arrays[key] = np.empty(len(flags), np.int32)
        array[:] = flags
        return array

    def forget(self) -> None:
        self._arrays.clear()


def _allocate(comm: Communicator, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory of a device: registered by the communicator, or any where it has none.

    Ranks may differ in that. Where memory is not registered, messages pass through the host's.
    """
    if device.type not in ("cpu", "cuda"):
        return torch.empty(length, dtype=dtype, device=device)
    try:
        flat: Tensor = comm.empty(length, dtype, device=device.type)
    except OutOfMemory as error:  # which torch may still have, within what it uses in part
        why = f"rank {comm.rank}: a bucket is reduced through the host's memory: {error}"
        warnings.warn(why, RuntimeWarning, stacklevel=2)
        return torch.empty(length, dtype=dtype, device=device)
    return flat if flat.device == device else torch.empty(length, dtype=dtype, device=device)
