"""Measure what a reduction costs, to plan buckets by."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from .buckets import Pace

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["measure_pace"]

_SMALL, _LARGE = 8, 1 << 20
_TRIES = 4


def measure_pace(comm: Communicator) -> Pace:
    """Time a small and a large allreduce, the best of a few; collective, some milliseconds."""
    seconds = {}
    for nbytes in (_SMALL, _LARGE):
        x = np.zeros(nbytes // 4, dtype=np.float32)
        tries = []
        for _ in range(_TRIES):
            comm.barrier()
            start = time.perf_counter()
            comm.allreduce(x)
            tries.append(time.perf_counter() - start)
        seconds[nbytes] = min(tries)
    slope = (seconds[_LARGE] - seconds[_SMALL]) / (_LARGE - _SMALL)
    return Pace(seconds[_SMALL], max(slope, 0.0))
