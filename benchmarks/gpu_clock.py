"""Time what a GPU does, without the time that the host takes to ask for it.

A kernel over 16 MiB takes a few microseconds, and a launch from Python takes the host tens of them.
So launches are put on the stream while something long runs there, and the device's own clock tells
when the first of them began and the last ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

HOLD_BYTES = 256 << 20
MOST_HOLDS = 400
"""A driver queues a thousand or so of launches before it lets the host wait."""


class Clock:
    """The clock of the current device, on its default stream."""

    def __init__(self, cupy: Any, launches: int = 20, batches: int = 5) -> None:
        """launches: of a batch, which is timed as a whole; the median of several batches counts."""
        self._cuda, self._launches, self._batches = cupy.cuda, launches, batches
        self._memory = cupy.empty(HOLD_BYTES, np.uint8)
        self._hold(1)
        self._hold_seconds = self._between(lambda: self._hold(10)) / 10

    def seconds(self, launch: Callable[[], Any]) -> float:
        """Return the seconds of one launch on the device; the first compiles, and is not timed."""
        launch()
        self._cuda.runtime.deviceSynchronize()
        start = time.perf_counter()
        self._batch(launch)
        asking = time.perf_counter() - start
        holds = min(MOST_HOLDS, 1 + int(2 * asking / self._hold_seconds))
        batches = []
        for _ in range(self._batches):
            self._cuda.runtime.deviceSynchronize()
            self._hold(holds)
            batches.append(self._between(lambda: self._batch(launch)))
        return float(np.median(batches)) / self._launches

    def _batch(self, launch: Callable[[], Any]) -> None:
        for _ in range(self._launches):
            launch()

    def _hold(self, number: int) -> None:
        for _ in range(number):
            self._cuda.runtime.memsetAsync(self._memory.data.ptr, 0, HOLD_BYTES, 0)

    def _between(self, call: Callable[[], Any]) -> float:
        """Return the device's seconds from before a call to behind what it put on the stream."""
        first, last = self._cuda.Event(), self._cuda.Event()
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(self._cuda.get_elapsed_time(first, last)) / 1e3
