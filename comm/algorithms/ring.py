"""Ring algorithms: every rank talks to its two neighbours only; the fewest bytes, the most rounds.

Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations"
(2009), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..collective import ALLGATHER, ALLREDUCE, BROADCAST, REDUCE_SCATTER
from ..schedule import Chunks, Ranks, Rotated, Round, Schedule, Shift
from ..transform import reverse


def ring_allreduce(size: int) -> Schedule:
    """Reduce-scatter once around the ring, then allgather once around it.

    Rounds: 2 (size - 1).  Bytes sent per rank: 2 n (size - 1) / size.

    Three ranks, one column per round:

        0: 0>1:0+ 1>2:1+ 2>0:2+
        1: 0>1:2+ 1>2:0+ 2>0:1+
        2: 0>1:1 1>2:2 2>0:0
        3: 0>1:0 1>2:1 2>0:2
    """
    ring = Shift(+1)
    reduce_scatter = [Round(ring, Rotated(-index), reduce=True) for index in range(size - 1)]
    allgather = [Round(ring, Rotated(1 - index), reduce=False) for index in range(size - 1)]
    return Schedule(ALLREDUCE, size, num_chunks=size, rounds=(*reduce_scatter, *allgather))


def ring_reduce_scatter(size: int) -> Schedule:
    """Pass partial sums around the ring so that chunk r is complete at rank r.

    Rounds: size - 1.  Bytes sent per rank: n (size - 1) / size.
    """
    ring = Shift(+1)
    rounds = [Round(ring, Rotated(-1 - index), reduce=True) for index in range(size - 1)]
    return Schedule(REDUCE_SCATTER, size, num_chunks=size, rounds=tuple(rounds))


def ring_allgather(size: int) -> Schedule:
    """Pass every rank's chunk once around the ring.

    Rounds: size - 1.  Bytes sent per rank: n (size - 1) / size.
    """
    ring = Shift(+1)
    rounds = [Round(ring, Rotated(-index)) for index in range(size - 1)]
    return Schedule(ALLGATHER, size, num_chunks=size, rounds=tuple(rounds))


@dataclass(frozen=True)
class Wave(Chunks):
    """Send chunk `index - distance from root` in round `index`: chunks follow each other down."""

    index: int
    root: int

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        distance = (rank - self.root) % size
        chunk = self.index - distance
        sends = (chunk >= 0) & (chunk < num_chunks) & (distance < size - 1)
        return np.where(sends, chunk, 0), np.where(sends, 1, 0)


def ring_broadcast(size: int, root: int = 0) -> Schedule:
    """Send `size` chunks down the chain root, root + 1, ..., each rank passing on what it has.

    Rounds: 2 (size - 1).  Bytes sent per rank: n (the last of the chain: none).
    """
    num_rounds = 2 * (size - 1)
    rounds = [Round(Shift(+1), Wave(index, root)) for index in range(num_rounds)]
    return Schedule(BROADCAST, size, num_chunks=size, rounds=tuple(rounds), root=root)


def ring_reduce(size: int, root: int = 0) -> Schedule:
    """Send partial sums of `size` chunks up the chain to the root: broadcast run backwards.

    Rounds: 2 (size - 1).  Bytes sent per rank: n (the root: none).
    """
    return reverse(ring_broadcast(size, root))
