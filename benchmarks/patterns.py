"""Data that differs by rank and by element, and what collectives have to make of it.

Element i of rank r is element i % 16,381 of the rank's tile, small whole numbers that every type
holds exactly. The length of a tile is prime, so that a chunk in the wrong place shows. A tile stays
in cache: filling a buffer from it leaves the cache to the buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE = 16_381
OPS: Mapping[str, Any] = {"sum": np.add, "min": np.minimum, "max": np.maximum}
ALL = -1
"""The source of a piece that is reduced over all ranks."""


@dataclass(frozen=True)
class Piece:
    """Part of a result: `count` elements from `offset` on of a rank's data, or of ALL reduced."""

    source: int
    offset: int
    count: int


Expected = Callable[[int, int, int], Sequence[Piece]]


def numbers(rank: int) -> NDArray[np.float32]:
    """Return the tile of a rank as float32."""
    return ((np.arange(TILE) * 7 + rank * 5) % 13 + 1).astype(np.float32)


@lru_cache(maxsize=64)
def tile(source: int, size: int, op: str, dtype: str) -> NDArray[Any]:
    """Return one rank's tile, or that of ALL reduced, in the storage of dtype."""
    if source == ALL:
        made = numbers(0)
        for rank in range(1, size):
            made = OPS[op](made, numbers(rank))
    else:
        made = numbers(source)
    return to_storage(made, dtype)


def to_storage(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Round to dtype; NumPy has no bfloat16, whose bits are returned."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    import torch

    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()


def storage(x: Any) -> NDArray[Any]:
    """Return the flat NumPy view of an array or a tensor; bits where NumPy lacks the dtype."""
    if isinstance(x, np.ndarray):
        return x.reshape(-1)
    import torch

    x = x.view(-1)
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def fill(target: NDArray[Any], values: NDArray[Any]) -> None:
    """Repeat a tile over the target."""
    whole = target.size // TILE * TILE
    target[:whole].reshape(-1, TILE)[:] = values
    target[whole:] = values[: target.size - whole]


def count_wrong(
    result: NDArray[Any], pieces: Sequence[Piece], size: int, op: str, dtype: str
) -> int:
    """Count the elements that differ from the pieces, laid end to end; bits have to be equal."""
    wrong = first = 0
    for piece in pieces:
        part = result[first : first + piece.count]
        values = np.roll(tile(piece.source, size, op, dtype), -piece.offset)
        whole = part.size // TILE * TILE
        wrong += int((part[:whole].reshape(-1, TILE) != values).sum())
        wrong += int((part[whole:] != values[: part.size - whole]).sum())
        wrong += piece.count - part.size
        first += piece.count
    return wrong if not pieces else wrong + result.size - min(first, result.size)


def at(only: int, piece: Piece, rank: int) -> Sequence[Piece]:
    return [piece] if rank == only else []


EXPECTED: Mapping[str, Expected] = {
    "allreduce": lambda rank, size, count: [Piece(ALL, 0, count)],
    "reduce": lambda rank, size, count: at(0, Piece(ALL, 0, count), rank),
    "broadcast": lambda rank, size, count: [Piece(0, 0, count)],
    "allgather": lambda rank, size, count: [Piece(r, 0, count // size) for r in range(size)],
    "reduce_scatter": lambda rank, size, count: [Piece(ALL, rank * (count // size), count // size)],
    "gather": lambda rank, size, count: (
        [Piece(r, 0, count // size) for r in range(size)] if rank == 0 else []
    ),
    "scatter": lambda rank, size, count: [Piece(0, rank * (count // size), count // size)],
    "alltoall": lambda rank, size, count: [
        Piece(r, rank * (count // size), count // size) for r in range(size)
    ],
    "send": lambda rank, size, count: [Piece(rank - 1, 0, count)] if rank % 2 else [],
    "sendrecv": lambda rank, size, count: [Piece((rank - 1) % size, 0, count)],
}
"""collective -> (rank, size, count of the whole buffer) -> what that rank's result is made of."""

PARTS = ("allgather", "reduce_scatter", "gather", "scatter", "alltoall")
"""Collectives whose whole buffer is `size` equal parts."""

REDUCING = ("allreduce", "reduce", "reduce_scatter")


def own_count(collective: str, size: int, count: int) -> int:
    """Return how many elements a rank puts in."""
    return count // size if collective in ("allgather", "gather") else count


def result_count(collective: str, rank: int, size: int, count: int) -> int:
    """Return how many elements a rank's separate result has; 0 for one in place, or none."""
    if collective in ("allreduce", "reduce", "broadcast", "send"):
        return 0
    return sum(piece.count for piece in EXPECTED[collective](rank, size, count))
