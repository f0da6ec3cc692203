"""Masks of dropout on the host: NumPy draws the words, in compiled code of its own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .storage import Array

Key = tuple[int, int]
"""Two words of 64 bits."""


def random_words(key: Key, sample: int, count: int) -> npt.NDArray[np.uint32]:
    """Return `count` words of Philox 4x64-10 (Salmon et al. 2011, section 3.3).

    The counter's third word is the sample, so that the streams of two samples meet after 2**128
    draws.
    """
    counter = np.array([0, 0, sample, 0], dtype=np.uint64)
    drawn = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=counter)
    words: npt.NDArray[np.uint32] = drawn.random_raw(-(-count // 2)).astype("<u8").view("<u4")
    return words[:count]


def mask(target: Array, rows: int, sample: int, key: Key, least: int) -> None:
    """Write, for each row, which of a sample's random words are `least` or more.

    target: `rows` rows of equal length, flat; row r is of sample + r.
    """
    if rows:
        for number, row in enumerate(target.reshape(rows, -1)):
            row[:] = random_words(key, sample + number, row.size) >= np.uint64(least)
