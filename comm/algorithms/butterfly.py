"""Hypercube algorithms: the partner is 1, 2, 4, ... away; the fewest rounds.

Sizes that are no power of two are folded: with `extra` ranks above the power of two, the first
2 * extra ranks pair up, the odd one of a pair stands for both, and the even one waits.

Source: Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH"
(2005), sections 4.1 and 4.5; dissemination: Hensgen, Finkel, Manber, "Two algorithms for barrier
synchronization" (1988), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..collective import ALLGATHER, ALLREDUCE, BARRIER
from ..schedule import (
    NOBODY,
    All,
    AllBut,
    Chunks,
    Peers,
    Ranks,
    Reverse,
    Rotated,
    Round,
    Schedule,
    Shift,
)
from ..transform import reverse


def fold(size: int) -> tuple[int, int]:
    """Return (power, extra): the largest power of two up to size, and what is above it."""
    power = 1 << (size.bit_length() - 1)
    return power, size - power


def folded(rank: Ranks, size: int) -> Ranks:
    """Return a rank's number among the power-of-two ranks, NOBODY for one that waits."""
    _, extra = fold(size)
    paired = np.where(rank % 2 == 1, rank // 2, NOBODY)
    return np.where(rank < 2 * extra, paired, rank - extra)


def unfolded(number: Ranks, size: int) -> Ranks:
    """Return the rank that carries `number` among the power-of-two ranks."""
    _, extra = fold(size)
    return np.where(number < extra, 2 * number + 1, number + extra)


@dataclass(frozen=True)
class FoldIn(Peers):
    """Pair the ranks above a power of two: the even one sends to the odd one after it."""

    def dst(self, rank: Ranks, size: int) -> Ranks:
        _, extra = fold(size)
        return np.where((rank < 2 * extra) & (rank % 2 == 0), rank + 1, NOBODY)

    def src(self, rank: Ranks, size: int) -> Ranks:
        _, extra = fold(size)
        return np.where((rank < 2 * extra) & (rank % 2 == 1), rank - 1, NOBODY)


@dataclass(frozen=True)
class Butterfly(Peers):
    """Exchange with the rank whose folded number differs in the bit `distance`."""

    distance: int

    def dst(self, rank: Ranks, size: int) -> Ranks:
        number = folded(rank, size)
        partner = unfolded(np.maximum(number, 0) ^ self.distance, size)
        return np.where(number == NOBODY, NOBODY, partner)

    def src(self, rank: Ranks, size: int) -> Ranks:
        return self.dst(rank, size)


@dataclass(frozen=True)
class Block(Chunks):
    """Send the aligned block of `width` chunks that holds the folded number, or its `flip` twin.

    Chunks are numbered as the folded ranks: num_chunks is the power of two.
    """

    width: int
    flip: int = 0

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        number = np.maximum(folded(rank, size), 0) ^ self.flip
        return number // self.width * self.width, number * 0 + self.width


@dataclass(frozen=True)
class Carried(Chunks):
    """Send the chunks of all ranks that the aligned block of `width` folded numbers stands for.

    Chunks are numbered as the ranks; a pair's two chunks lie side by side, so a block is a run.
    """

    width: int

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        _, extra = fold(size)
        low = np.maximum(folded(rank, size), 0) // self.width * self.width
        first = low + np.minimum(low, extra)
        high = low + self.width
        return first, high + np.minimum(high, extra) - first


def distances(size: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... below the largest power of two up to size."""
    power, _ = fold(size)
    return tuple(1 << bit for bit in range(power.bit_length() - 1))


def with_fold(size: int, inner: tuple[Round, ...]) -> tuple[Round, ...]:
    """Put the folding rounds of an allreduce around rounds of the power-of-two ranks."""
    if fold(size)[1] == 0:
        return inner
    return (
        Round(FoldIn(), All(), reduce=True),
        *inner,
        Round(Reverse(FoldIn()), All()),
    )


def doubling_allreduce(size: int) -> Schedule:
    """Exchange and add the whole buffer with the partners 1, 2, 4, ... away.

    Rounds: log2(size), and 2 more when folded.  Bytes sent per rank: n log2(size), and n more.
    """
    inner = tuple(Round(Butterfly(distance), All(), reduce=True) for distance in distances(size))
    return Schedule(ALLREDUCE, size, num_chunks=1, rounds=with_fold(size, inner))


def halving_doubling_allreduce(size: int) -> Schedule:
    """Halve the part a rank answers for until it is one chunk, then double it back.

    Rounds: 2 log2(size), and 2 more when folded.  Bytes sent per rank: 2 n (p - 1) / p for p the
    power of two, and n more.
    """
    power, _ = fold(size)
    halve = [
        Round(Butterfly(distance), Block(distance, flip=distance), reduce=True)
        for distance in reversed(distances(size))
    ]
    double = [Round(Butterfly(distance), Block(distance)) for distance in distances(size)]
    return Schedule(ALLREDUCE, size, num_chunks=power, rounds=with_fold(size, (*halve, *double)))


def doubling_allgather(size: int) -> Schedule:
    """Exchange all that was gathered so far with the partners 1, 2, 4, ... away.

    Rounds: log2(size), and 2 more when folded.  Bytes sent per rank: n (size - 1) / size for a
    power of two.
    """
    rounds = [Round(Butterfly(distance), Carried(distance)) for distance in distances(size)]
    if fold(size)[1]:
        # The waiting rank has its own chunk already: sending it back would make the reversed
        # schedule, the reduce-scatter, add it twice.
        rounds = [Round(FoldIn(), Rotated(0)), *rounds, Round(Reverse(FoldIn()), AllBut(-1))]
    return Schedule(ALLGATHER, size, num_chunks=size, rounds=tuple(rounds))


def halving_reduce_scatter(size: int) -> Schedule:
    """Send away the half that the partner answers for, and add what comes: allgather backwards.

    Rounds: log2(size), and 2 more when folded.  Bytes sent per rank: n (size - 1) / size for a
    power of two.
    """
    return reverse(doubling_allgather(size))


def dissemination_barrier(size: int) -> Schedule:
    """Tell the rank 1, 2, 4, ... ahead who is known to have come.

    Rounds: ceil(log2(size)).
    """
    rounds = [Round(Shift(1 << bit), All(), reduce=True) for bit in range((size - 1).bit_length())]
    return Schedule(BARRIER, size, num_chunks=1, rounds=tuple(rounds))
