"""Run schedules side by side on groups of ranks of any size: tables, where no formula tells.

A table has an entry for every rank, evaluated from the rules of the flat schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .collective import Collective
from .errors import ScheduleError
from .evaluation import all_ranks, peers_of, spans
from .places import scale_of
from .schedule import NOBODY, Chunks, Peers, Ranks, Round, Schedule


@dataclass(frozen=True)
class Listed(Peers):
    """Give every rank's peers as a table."""

    to: tuple[int, ...]
    origin: tuple[int, ...]

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return np.asarray(self.to)[rank]

    def src(self, rank: Ranks, size: int) -> Ranks:
        return np.asarray(self.origin)[rank]


@dataclass(frozen=True)
class ListedChunks(Chunks):
    """Give every rank's run of chunks as a table."""

    first: tuple[int, ...]
    length: tuple[int, ...]

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return np.asarray(self.first)[rank], np.asarray(self.length)[rank]


Part = tuple[Sequence[int], Schedule]
"""(the ranks that play ranks 0, 1, ... of a schedule, that schedule)."""


def side_by_side(
    collective: Collective, size: int, parts: Sequence[Part], num_chunks: int
) -> tuple[Round, ...]:
    """Run schedules on groups of ranks that do not overlap, round by round, as tables.

    Every part works on all num_chunks chunks; a shorter one is idle at the end.
    Raises: ScheduleError where one part would add and another copy in the same round, or where
    parts overlap, or have another number of ranks than their schedules.
    """
    for ranks, flat in parts:
        if len(ranks) != flat.size:
            raise ScheduleError(f"a part of {len(ranks)} ranks has a schedule for {flat.size}")
    taken = [rank for ranks, _ in parts for rank in ranks]
    if len(set(taken)) < len(taken) or not set(taken) <= set(range(size)):
        raise ScheduleError(f"expected parts of ranks 0..{size - 1}, each in one part at most")
    rounds = []
    for index in range(max((len(flat.rounds) for _, flat in parts), default=0)):
        to, origin = np.full((2, size), NOBODY, dtype=np.int64)
        first, length = np.zeros((2, size), dtype=np.int64)
        running = [(ranks, flat) for ranks, flat in parts if index < len(flat.rounds)]
        kinds = {flat.rounds[index].reduce for _, flat in running}
        if len(kinds) > 1:
            raise ScheduleError(f"parts of a {collective.name} both add and copy", round=index)
        for ranks, flat in running:
            round = flat.rounds[index]
            table = np.asarray(ranks, dtype=np.int64)
            own = all_ranks(flat.size)
            peers = peers_of(round.peers, own, flat.size, index)
            for there, peer in zip((to, origin), peers, strict=True):
                there[table] = np.where(peer == NOBODY, NOBODY, table[peer])
            start, run = spans(round.chunks, own, flat.size, flat.num_chunks, index)
            first[table] = start * scale_of(flat, num_chunks)
            length[table] = run * scale_of(flat, num_chunks)
        tables = [tuple(found.tolist()) for found in (to, origin, first, length)]
        rounds.append(Round(Listed(*tables[:2]), ListedChunks(*tables[2:]), reduce=kinds.pop()))
    return tuple(rounds)
