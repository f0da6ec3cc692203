"""Cut a collective over large buffers into the same collective over small ones, window by window.

Each window is a whole collective of its own, over a part of every rank's elements, so that a part
can be copied in while the one before is exchanged and the one before that is copied out. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .chunks import bounds

Copy = tuple[int, int, int]
"""(offset in the window, offset in the whole, count), all in elements."""


@dataclass(frozen=True)
class Window:
    """One part of a collective on one rank.

    shape: of what this rank passes.  into: copies of its elements into the window.
    out: copies of the window's result into this rank's result.
    """

    shape: tuple[int, ...]
    into: tuple[Copy, ...]
    out: tuple[Copy, ...]

    @property
    def count(self) -> int:
        """Return the elements that this rank passes."""
        return self.shape[0] if len(self.shape) == 1 else self.shape[0] * self.shape[1]

    @property
    def result(self) -> int:
        """Return the elements of its result."""
        return max((start + count for start, _, count in self.out), default=0)


def _parts(count: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield (low, high) up to count, at least once: a collective of no elements is one, too."""
    for low in range(0, max(count, 1), max(most, 1)):
        yield low, min(low + max(most, 1), count)


def _present(*copies: Copy) -> tuple[Copy, ...]:
    return tuple(copy for copy in copies if copy[2])


def elementwise(count: int, most: int, sends: bool, takes: bool) -> list[Window]:
    """Cut an allreduce, reduce or broadcast; most: elements of a window.

    sends, takes: whether this rank's elements count, and whether it gets the result.
    """
    return [
        Window(
            (high - low,),
            _present((0, low, high - low)) if sends else (),
            _present((0, low, high - low)) if takes else (),
        )
        for low, high in _parts(count, most)
    ]


def gathered(count: int, size: int, most: int, takes: bool) -> list[Window]:
    """Cut an allgather or gather of count elements from each rank."""
    return [
        Window(
            (high - low,),
            _present((0, low, high - low)),
            _present(*((r * (high - low), r * count + low, high - low) for r in range(size)))
            if takes
            else (),
        )
        for low, high in _parts(count, most // size)
    ]


def exchanged(row: int, size: int, most: int) -> list[Window]:
    """Cut an alltoall of `size` rows of `row` elements."""
    windows = []
    for low, high in _parts(row, most // size):
        width = high - low
        copies = _present(*((r * width, r * row + low, width) for r in range(size)))
        windows.append(Window((size, width), copies, copies))
    return windows


def scattered(count: int, size: int, rank: int, most: int) -> list[Window]:
    """Cut a reduce_scatter: part of every rank's piece, which `chunks.bounds` shares out alike.

    Pieces differ by one element at most, the longer ones first, and so do their parts.
    """
    pieces = [bounds(count, size, peer) for peer in range(size)]
    windows = []
    for low, high in _parts(pieces[0][1] - pieces[0][0], most // size):
        into, at, mine = [], 0, 0
        for peer, (begin, end) in enumerate(pieces):
            first, last = min(begin + low, end), min(begin + high, end)
            into.append((at, first, last - first))
            at += last - first
            mine = last - first if peer == rank else mine
        windows.append(Window((at,), _present(*into), _present((0, low, mine))))
    return windows
