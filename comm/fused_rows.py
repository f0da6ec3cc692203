"""Rows of programs over shared memory: the pieces that fused collectives are lowered to.

Pure functions; addresses come in when a program is bound to a group (`comm.board`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..kernels.records import LINE_BYTES, ROW_WORDS, Row, Where
from .chunks import bounds

Rows = npt.NDArray[np.int64]
OneRow = tuple[int, ...]
MEET: OneRow = (Row.MEET, 0, 0, 0, 0, 0, 0, 0)
PAUSE: OneRow = (Row.PAUSE, 0, 0, 0, 0, 0, 0, 0)
STAGES = (Where.STAGE_0, Where.STAGE_1)

STAGE_BYTES = 1 << 18
"""Of one staging place; two of them and two results of a part fit the second-level cache."""

INPUT, OUTPUT = 0, 1
"""Entries of Where.OWN: this rank's buffer, and where its result goes."""


@dataclass(frozen=True)
class Shape:
    """What a program depends on.

    count: elements of the flat buffer that the schedule covers (allgather: of all ranks together).
    stage_bytes: of one staging place.
    """

    rank: int
    size: int
    count: int
    itemsize: int
    root: int = 0
    stage_bytes: int = STAGE_BYTES

    @property
    def nbytes(self) -> int:
        """Return the bytes of the flat buffer."""
        return self.count * self.itemsize


def part(count: int, itemsize: int, size: int, rank: int) -> tuple[int, int]:
    """Return the elements [low, high) that a rank folds: whole cache lines, shared out evenly."""
    line = max(1, LINE_BYTES // itemsize)
    low, high = bounds(-(-count // line), size, rank)
    return min(low * line, count), min(high * line, count)


def copied(
    target: int, entry: int, offset: int, source: int, origin: int, start: int, nbytes: int
) -> list[OneRow]:
    """Copy nbytes from (source, origin) at start to (target, entry) at offset; no row for none."""
    if not nbytes:
        return []
    return [(Row.COPY, target, entry, offset, source, origin, start, nbytes)]


def folded(
    target: int, entry: int, offset: int, source: int, start: int, count: int
) -> list[OneRow]:
    """Fold count elements of all entries of source, at start, into (target, entry) at offset."""
    return [(Row.FOLD, target, entry, offset, source, 0, start, count)] if count else []


def table(rows: list[OneRow]) -> Rows:
    """Return rows as the interpreter takes them."""
    return np.array(rows, np.int64).reshape(-1, ROW_WORDS)


def named(target: int, entry: int, source: int, origin: int, start: int) -> OneRow:
    """Let (target, entry) name what lies at start in (source, origin)."""
    return (Row.POINT, target, entry, 0, source, origin, start, 0)


def fetched(
    target: int, entry: int, offset: int, peer: int, start: int, nbytes: int
) -> list[OneRow]:
    """Copy nbytes out of a peer's own memory, which is not mapped here; no row for none."""
    if not nbytes:
        return []
    return [(Row.READ, target, entry, offset, Where.PEERS, peer, start, nbytes)]


def others_of(shape: Shape) -> list[int]:
    """Return the peers, from the next on, so that not all ranks turn to the same."""
    return [(shape.rank + step) % shape.size for step in range(1, shape.size)]


def chunks_of(total: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (low, high) of all steps up to total."""
    for low in range(0, total, step):
        yield low, min(low + step, total)
