"""Pairwise algorithms: every rank meets every other once, and data goes straight to its place.

A reducing message is always one rank's own contribution, never a partial sum; so half-width data
can travel at half width and be added in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..collective import ALLGATHER, ALLTOALL, BROADCAST, REDUCE_SCATTER, SCATTER
from ..schedule import NOBODY, All, Chunks, Peers, Ranks, Rotated, Round, Schedule, Shift
from ..transform import compose, reverse


def pairwise_reduce_scatter(size: int) -> Schedule:
    """Send every rank the chunk that it answers for.

    Rounds: size - 1.  Bytes sent per rank: n (size - 1) / size.
    """
    rounds = tuple(Round(Shift(away), Rotated(away), reduce=True) for away in range(1, size))
    return Schedule(REDUCE_SCATTER, size, num_chunks=size, rounds=rounds)


def pairwise_allgather(size: int) -> Schedule:
    """Send every rank one's own chunk.

    Rounds: size - 1.  Bytes sent per rank: n (size - 1) / size.
    """
    rounds = tuple(Round(Shift(away), Rotated(0)) for away in range(1, size))
    return Schedule(ALLGATHER, size, num_chunks=size, rounds=rounds)


def pairwise_allreduce(size: int) -> Schedule:
    """Send every rank the chunk that it answers for, then every rank one's own sum.

    Rounds: 2 (size - 1).  Bytes sent per rank: 2 n (size - 1) / size.
    """
    return compose(pairwise_reduce_scatter(size), pairwise_allgather(size))


@dataclass(frozen=True)
class Cell(Chunks):
    """Send the cell (rank, rank + away) of the size x size chunks of an alltoall."""

    away: int

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return rank * size + (rank + self.away) % size, rank * 0 + 1

    def alike(self) -> Chunks:
        return Cell(0)


def pairwise_alltoall(size: int) -> Schedule:
    """Exchange with the rank `away` ahead and the one `away` behind, for every distance.

    Rounds: size - 1.  Bytes sent per rank: n (size - 1) / size.
    """
    rounds = tuple(Round(Shift(away), Cell(away)) for away in range(1, size))
    return Schedule(ALLTOALL, size, num_chunks=size * size, rounds=rounds)


@dataclass(frozen=True)
class Spoke(Peers):
    """Send from the root to the rank `away` after it; nobody else talks."""

    away: int
    root: int

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return np.where(rank == self.root, (rank + self.away) % size, NOBODY)

    def src(self, rank: Ranks, size: int) -> Ranks:
        return np.where((rank - self.root) % size == self.away, self.root, NOBODY)

    def alike(self) -> Peers:
        return Spoke(1, self.root)

    def members(self, size: int) -> npt.NDArray[np.int64]:
        return np.array(sorted({self.root, (self.root + self.away) % size}))


def pairwise_broadcast(size: int, root: int = 0) -> Schedule:
    """Send the whole buffer from the root to one rank after the other.

    Rounds: size - 1.  Bytes sent by the root: n (size - 1).
    """
    rounds = tuple(Round(Spoke(away, root), All()) for away in range(1, size))
    return Schedule(BROADCAST, size, num_chunks=1, rounds=rounds, root=root)


def pairwise_reduce(size: int, root: int = 0) -> Schedule:
    """Add one rank's buffer after the other at the root: broadcast run backwards.

    Rounds: size - 1.  Bytes sent per rank: n (the root: none).
    """
    return reverse(pairwise_broadcast(size, root))


def pairwise_scatter(size: int, root: int = 0) -> Schedule:
    """Send every rank its chunk from the root, one rank after the other.

    Rounds: size - 1.  Bytes sent by the root: n (size - 1) / size.
    """
    rounds = tuple(Round(Spoke(away, root), Rotated(away)) for away in range(1, size))
    return Schedule(SCATTER, size, num_chunks=size, rounds=rounds, root=root)


def pairwise_gather(size: int, root: int = 0) -> Schedule:
    """Collect every rank's chunk at the root, one rank after the other: scatter run backwards.

    Rounds: size - 1.  Bytes sent per rank: n / size (the root: none).
    """
    return reverse(pairwise_scatter(size, root))
