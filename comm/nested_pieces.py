"""Cut a collective that is nested over nodes into pieces, and share each out within a node.

Pure. A piece is what the ranks of a node work on between two meetings. Every rank has it in memory
that the others read. To each place belongs one part of it, which that place's lane - the ranks of
that place on all nodes - moves between the nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .chunks import bounds
from .fused_rows import part
from .windows import Copy

Part = tuple[int, int]
"""Elements [low, high)."""


@dataclass(frozen=True)
class Piece:
    """One piece, on every rank of a node alike.

    count: its elements.  start: where it begins in the array, or in the result of a rank.
    into: copies of an array's elements into the piece.  parts: of each place, in its order.
    """

    index: int
    count: int
    start: int
    into: tuple[Copy, ...]
    parts: tuple[Part, ...]


def steps(count: int, most: int) -> Iterator[Part]:
    """Cut elements into runs of `most` at the most; at least one element each."""
    for low in range(0, count, max(1, most)):
        yield low, min(low + max(1, most), count)


def elementwise(count: int, itemsize: int, width: int, most: int) -> Iterator[Piece]:
    """Cut an allreduce, reduce or broadcast into runs of `most` elements, each shared out evenly.

    width: ranks of a node.
    """
    for index, (low, high) in enumerate(steps(count, most)):
        parts = (part(high - low, itemsize, width, place) for place in range(width))
        yield Piece(index, high - low, low, ((0, low, high - low),), tuple(parts))


def scattered(count: int, lanes: Sequence[Sequence[int]], most: int) -> Iterator[Piece]:
    """Cut a reduce_scatter: a run of every rank's chunk, those of a lane's ranks together.

    lanes: the ranks of each place's lane, ascending. So a reduce_scatter over the lane cuts a part
    into just these runs: they differ by one element at most, the longer ones first.
    """
    size = sum(len(lane) for lane in lanes)
    for index, (low, high) in enumerate(steps(-(-count // size), most // size)):
        into: list[Copy] = []
        parts: list[Part] = []
        at = 0
        for lane in lanes:
            before = at
            for rank in lane:
                begin, end = bounds(count, size, rank)
                first, last = min(begin + low, end), min(begin + high, end)
                into.append((at, first, last - first))
                at += last - first
            parts.append((before, at))
        present = tuple(copy for copy in into if copy[2])
        yield Piece(index, at, low, present, tuple(parts))
