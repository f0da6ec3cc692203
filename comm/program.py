"""Lower a schedule to one rank's program: a small integer table that a transport interprets.

What a rank does in chunks is evaluated once (`part_of`), and laid out for each number of elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..kernels.message_words import Op
from .chunks import begin, nested_begin, ranges
from .collective import ALLTOALL
from .evaluation import moves
from .schedule import Schedule

__all__ = ["Op", "Part", "Program", "lower", "part_of", "with_accumulator"]


@dataclass(frozen=True)
class Program:
    """One rank's part of a schedule.

    rows: int64 table of (round, op, peer, offset, count), in order of round; offsets and counts in
    elements. Sends read the source buffer, everything else works on the target; they are the same
    buffer except in an alltoall.
    """

    rows: npt.NDArray[np.int64]

    @cached_property
    def address(self) -> int:
        """Return where the table begins."""
        return int(self.rows.__array_interface__["data"][0])

    @cached_property
    def most_added(self) -> int:
        """Return the elements of the largest piece that is added to something; 0 where none is."""
        return int(self.rows[self.rows[:, 1] == Op.RECV_REDUCE, 4].max(initial=0))

    @cached_property
    def adds(self) -> bool:
        """Tell whether anything is added, or widened and narrowed."""
        return bool((self.rows[:, 1] >= Op.RECV_REDUCE).any())

    @cached_property
    def moving(self) -> Program:
        """Return the same messages, of which nothing is added."""
        rows = self.rows.copy()
        rows[rows[:, 1] == Op.RECV_REDUCE, 1] = Op.RECV
        return Program(rows)

    def rounds(self) -> list[list[tuple[Op, int, int, int]]]:
        """Return the rows as (op, peer, offset, count), grouped by round."""
        grouped: list[list[tuple[Op, int, int, int]]] = []
        last = -1
        for index, op, peer, offset, count in self.rows.tolist():
            if index != last:
                grouped.append([])
                last = index
            grouped[-1].append((Op(op), peer, offset, count))
        return grouped


@dataclass(frozen=True)
class Part:
    """One rank's part of a schedule, for any number of elements.

    rows: int64 table of (round, op, peer, first, length), a row for every message, in chunks.
    """

    schedule: Schedule
    rows: npt.NDArray[np.int64]


def part_of(schedule: Schedule, rank: int) -> Part:
    """Return what one rank sends and receives, of the very moves that are proven."""
    rows: list[tuple[int, int, int, int, int]] = []
    for index, round in enumerate(schedule.rounds):
        step = moves(round, schedule.size, schedule.num_chunks, index)
        receive = Op.RECV_REDUCE if round.reduce else Op.RECV
        for op, ends, peers in ((Op.SEND, step.src, step.dst), (receive, step.dst, step.src)):
            for at in np.flatnonzero(ends == rank):
                run = (int(step.first[at]), int(step.length[at]))
                rows.append((index, op, int(peers[at]), *run))
    return Part(schedule, np.array(rows, dtype=np.int64).reshape(-1, 5))


def lower(part: Part, count: int) -> Program:
    """Lay a rank's part out for a flat buffer of `count` elements.

    Pieces without elements move nothing, on either side.
    """
    rows = [
        (index, op, peer, offset, size)
        for index, op, peer, first, length in part.rows.tolist()
        for offset, size in _pieces(part.schedule, first, length, count, sending=op == Op.SEND)
    ]
    return Program(np.array(rows, dtype=np.int64).reshape(-1, 5))


def _pieces(
    schedule: Schedule, first: int, length: int, count: int, sending: bool
) -> list[tuple[int, int]]:
    """Return (offset, count) of the contiguous pieces that a run of chunks is."""
    size, num_chunks = schedule.size, schedule.num_chunks
    pieces = []
    for low, high in ranges(first, length, num_chunks):
        if schedule.collective is ALLTOALL:
            # A row's cells lie side by side in the source, a column's in the target.
            begins = [cell % size if sending else cell // size for cell in range(low, high)]
            pieces += [(begin(count, size, at), begin(count, size, at + 1)) for at in begins]
        elif schedule.collective.owned:
            low, high = (nested_begin(count, size, num_chunks, edge) for edge in (low, high))
            pieces.append((low, high))
        else:
            pieces.append((begin(count, num_chunks, low), begin(count, num_chunks, high)))
    return [(offset, end - offset) for offset, end in pieces if end > offset]


def with_accumulator(program: Program) -> Program:
    """Insert WIDEN before a piece's first addition, and NARROW before it is used again.

    For schedules that add raw contributions, and to a piece as a whole until it is used
    (Proof.raw_reduce): half-width data travels at half width, and every sum is added in float32 and
    rounded once.
    """
    rows: list[list[int]] = []
    open_pieces: list[tuple[int, int]] = []
    for index, op, peer, offset, count in program.rows.tolist():
        if op == Op.RECV_REDUCE:
            if (offset, count) not in open_pieces:
                open_pieces.append((offset, count))
                rows.append([index, Op.WIDEN, -1, offset, count])
        else:
            for piece in list(open_pieces):
                if piece[0] < offset + count and offset < piece[0] + piece[1]:
                    open_pieces.remove(piece)
                    rows.append([index, Op.NARROW, -1, *piece])
        rows.append([index, op, peer, offset, count])
    last = int(program.rows[-1, 0]) + 1 if len(program.rows) else 0
    rows += [[last, Op.NARROW, -1, *piece] for piece in open_pieces]
    return Program(np.array(rows, dtype=np.int64).reshape(-1, 5))
