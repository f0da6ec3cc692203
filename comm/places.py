"""Lift a schedule for few ranks to any subset of a group; the others sit out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .answers import dst_of, span_of, src_of
from .claims import kind_of
from .collective import ALLTOALL
from .errors import ScheduleError
from .schedule import NOBODY, Chunks, Peers, Ranks, Round, Schedule

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Places:
    """A subset of a group's ranks, and the place of each in it; many rounds share one."""

    ranks: tuple[int, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.ranks)

    @cached_property
    def table(self) -> Integers:
        """Return them in order of their places."""
        return np.asarray(self.ranks, dtype=np.int64)

    @cached_property
    def _order(self) -> Integers:
        return np.argsort(self.table)

    @cached_property
    def members(self) -> Integers:
        """Return them in rising order."""
        return self.table[self._order]

    def of(self, rank: Ranks) -> tuple[Ranks, Ranks]:
        """Return (whether a rank is one of them, its place; 0 for one that is none)."""
        at = np.minimum(np.searchsorted(self.members, rank), len(self.ranks) - 1)
        inside = self.members[at] == rank
        return inside, np.where(inside, self._order[at], 0)


@dataclass(frozen=True)
class Among(Peers):
    """Run a rule for few ranks on a subset of a group; the others sit out."""

    rule: Peers
    places: Places

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return self._rank(rank, dst_of)

    def src(self, rank: Ranks, size: int) -> Ranks:
        return self._rank(rank, src_of)

    def _rank(self, rank: Ranks, asked: Callable[[Peers, Integers, int], Integers]) -> Ranks:
        inside, place = self.places.of(rank)
        peer = asked(self.rule, place, len(self.places.ranks))
        return np.where(inside & (peer != NOBODY), self.places.table[peer], NOBODY)

    def alike(self) -> Peers:
        return replace(self, rule=kind_of(self.rule))

    def members(self, size: int) -> Integers:
        return self.places.members


@dataclass(frozen=True)
class AmongChunks(Chunks):
    """Send what a rule says for a few ranks and `num_flat` chunks, of `scale` chunks each."""

    rule: Chunks
    places: Places
    num_flat: int
    scale: int

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        inside, place = self.places.of(rank)
        first, length = span_of(self.rule, place, len(self.places.ranks), self.num_flat)
        return first * self.scale, np.where(inside, length * self.scale, 0)

    def alike(self) -> Chunks:
        return replace(self, rule=kind_of(self.rule))


def among(ranks: Sequence[int], flat: Schedule, num_chunks: int) -> tuple[Round, ...]:
    """Lift a schedule to some of a group's ranks, which play its ranks 0, 1, ..., on all chunks.

    Raises: ScheduleError for another number of ranks than the schedule's, or one named twice.
    """
    if len(ranks) != flat.size or len(set(ranks)) != flat.size:
        raise ScheduleError(f"expected {flat.size} ranks, each once, got {_shown(ranks)}")
    places, scale = Places(tuple(ranks)), scale_of(flat, num_chunks)
    return tuple(
        Round(
            Among(round.peers, places),
            AmongChunks(round.chunks, places, flat.num_chunks, scale),
            round.reduce,
        )
        for round in flat.rounds
    )


def renumber(schedule: Schedule, order: Sequence[int]) -> Schedule:
    """Let rank order[i] do what rank i does in `schedule`; order is a permutation of the ranks.

    Raises: ScheduleError where chunks belong to ranks, which this does not move, or where order
    is no permutation.
    """
    if schedule.collective.owned or schedule.collective is ALLTOALL:
        raise ScheduleError(f"cannot renumber a {schedule.collective.name}: chunks belong to ranks")
    order = tuple(order)
    if set(order) != set(range(schedule.size)):
        raise ScheduleError(
            f"expected the ranks 0..{schedule.size - 1} in any order, got {_shown(order)}"
        )
    if order == tuple(range(schedule.size)):
        return schedule
    rounds = among(order, schedule, schedule.num_chunks)
    return replace(schedule, rounds=rounds, root=order[schedule.root])


def _shown(ranks: Sequence[int]) -> str:
    return f"{list(ranks)!r:.80}"


def scale_of(flat: Schedule, num_chunks: int) -> int:
    """Return how many of num_chunks chunks make one of a schedule's."""
    scale, rest = divmod(num_chunks, flat.num_chunks)
    if rest:
        raise ScheduleError(f"{num_chunks} chunks do not divide into {flat.num_chunks}")
    return scale
