"""What memory allows: every rank adds two halves of a buffer of its own and writes both again.

An allreduce of n bytes reads n and writes n on every rank, however it is done in place in shared
memory: each rank reads its part of all ranks' buffers, and writes the result to all of them. So
does this, with nobody to wait for, at the same moment on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray


@numba.njit(["void(float32[::1], float32[::1])"], nogil=True, error_model="numpy")
def add_and_rewrite(one: Any, two: Any) -> None:
    for i in range(one.size):
        total = one[i] + two[i]
        one[i] = total
        two[i] = total


def triad(buffer: NDArray[Any]) -> tuple[Callable[[], NDArray[Any]], Callable[[Any], int]]:
    """Return the operation on a float32 buffer, and its check after the buffer held ones."""
    half = buffer.size // 2
    # Halves at the same offset within pages would evict each other's lines from the cache.
    apart = half + 512 if half > 1 << 16 else half
    count = min(half, buffer.size - apart)
    one, two = buffer[:count], buffer[apart : apart + count]

    def run() -> NDArray[Any]:
        add_and_rewrite(one, two)
        return buffer

    def wrong(result: Any) -> int:
        return int((one != np.float32(2)).sum() + (two != np.float32(2)).sum())

    return run, wrong
