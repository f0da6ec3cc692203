"""Binomial trees: whoever has the data passes it on, so the number of holders doubles each round.

Source: Chan, Heimlich, Purkayastha, van de Geijn, "Collective communication: theory, practice, and
experience" (2007), section 4.1 (minimum-spanning-tree algorithms).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..collective import BROADCAST, SCATTER
from ..schedule import NOBODY, All, Chunks, Peers, Ranks, Round, Schedule
from ..transform import compose, reverse


@dataclass(frozen=True)
class Branch(Peers):
    """Send to the rank `distance` further from the root, from every second place of that width."""

    distance: int
    root: int

    def dst(self, rank: Ranks, size: int) -> Ranks:
        place = (rank - self.root) % size
        sends = (place % (2 * self.distance) == 0) & (place + self.distance < size)
        return np.where(sends, (rank + self.distance) % size, NOBODY)

    def src(self, rank: Ranks, size: int) -> Ranks:
        place = (rank - self.root) % size
        receives = place % (2 * self.distance) == self.distance
        return np.where(receives, (rank - self.distance) % size, NOBODY)


@dataclass(frozen=True)
class Subtree(Chunks):
    """Send the chunks of all ranks in the subtree that starts `distance` further on."""

    distance: int
    root: int

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        place = (rank - self.root) % size + self.distance
        length = np.clip(size - place, 0, self.distance)
        return (place + self.root) % size, length


def _distances(size: int) -> tuple[int, ...]:
    return tuple(1 << bit for bit in reversed(range((size - 1).bit_length())))


def tree_broadcast(size: int, root: int = 0) -> Schedule:
    """Send the whole buffer down a binomial tree.

    Rounds: ceil(log2(size)).  Bytes sent by the root: n ceil(log2(size)).
    """
    rounds = tuple(Round(Branch(distance, root), All()) for distance in _distances(size))
    return Schedule(BROADCAST, size, num_chunks=1, rounds=rounds, root=root)


def tree_reduce(size: int, root: int = 0) -> Schedule:
    """Add the whole buffer up a binomial tree: broadcast run backwards.

    Rounds: ceil(log2(size)).  Bytes sent per rank: n (the root: none).
    """
    return reverse(tree_broadcast(size, root))


def tree_allreduce(size: int) -> Schedule:
    """Reduce to rank 0, then broadcast from it.

    Rounds: 2 ceil(log2(size)).  Bytes sent by rank 0: n ceil(log2(size)).
    """
    return compose(tree_reduce(size), tree_broadcast(size))


def tree_scatter(size: int, root: int = 0) -> Schedule:
    """Send every subtree its part down a binomial tree.

    Rounds: ceil(log2(size)).  Bytes sent by the root: n (size - 1) / size.
    """
    rounds = tuple(
        Round(Branch(distance, root), Subtree(distance, root)) for distance in _distances(size)
    )
    return Schedule(SCATTER, size, num_chunks=size, rounds=rounds, root=root)


def tree_gather(size: int, root: int = 0) -> Schedule:
    """Collect every subtree's parts up a binomial tree: scatter run backwards.

    Rounds: ceil(log2(size)).  Bytes sent per rank: at most n / 2 (the root: none).
    """
    return reverse(tree_scatter(size, root))
