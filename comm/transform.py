"""Schedules made from schedules."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .answers import span_of, src_of
from .claims import kind_of
from .collective import (
    ALLGATHER,
    ALLREDUCE,
    BROADCAST,
    GATHER,
    REDUCE,
    REDUCE_SCATTER,
    SCATTER,
    Collective,
)
from .errors import ScheduleError
from .schedule import NOBODY, Chunks, Peers, Ranks, Reverse, Round, Schedule

DUALS: dict[Collective, tuple[Collective, bool]] = {
    BROADCAST: (REDUCE, True),
    ALLGATHER: (REDUCE_SCATTER, True),
    SCATTER: (GATHER, False),
    GATHER: (SCATTER, False),
}
"""collective -> (what it becomes when time runs backwards, whether that one reduces)."""


@dataclass(frozen=True)
class Received(Chunks):
    """Send the chunks that `chunks` had this rank receive from its source under `peers`."""

    peers: Peers
    chunks: Chunks

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        src = src_of(self.peers, rank, size)
        first, length = span_of(self.chunks, np.maximum(src, 0), size, num_chunks)
        return first, np.where(src == NOBODY, 0, length)

    def alike(self) -> Chunks:
        return replace(self, chunks=kind_of(self.chunks))


def reverse(schedule: Schedule) -> Schedule:
    """Run a schedule backwards in time: every message goes back where it came from.

    Turns broadcast into reduce, allgather into reduce_scatter, scatter into gather and back; sound
    where no rank was sent a chunk that it already had, which `verify` proves per schedule.

    Source: Chan, Heimlich, Purkayastha, van de Geijn, "Collective communication: theory, practice,
    and experience" (2007), section 3 on dual operations.

    Raises: ScheduleError for a collective that has no dual.
    """
    if schedule.collective not in DUALS:
        raise ScheduleError(f"{schedule.collective.name} has no dual to reverse it into")
    collective, reduces = DUALS[schedule.collective]
    rounds = tuple(
        Round(Reverse(round.peers), Received(round.peers, round.chunks), reduce=reduces)
        for round in reversed(schedule.rounds)
    )
    return replace(schedule, collective=collective, rounds=rounds)


def compose(reduce_part: Schedule, gather_part: Schedule) -> Schedule:
    """Join a reduce_scatter with an allgather, or a reduce with a broadcast, to an allreduce.

    Raises: ScheduleError where the two do not meet: other collectives, sizes, chunks or roots.
    """
    meets = {(REDUCE_SCATTER, ALLGATHER), (REDUCE, BROADCAST)}
    kinds = (reduce_part.collective, gather_part.collective)
    if kinds not in meets:
        raise ScheduleError(
            f"cannot compose {kinds[0].name} with {kinds[1].name}: expected reduce_scatter "
            "with allgather, or reduce with broadcast"
        )
    for name in ("size", "num_chunks", "root"):
        left, right = getattr(reduce_part, name), getattr(gather_part, name)
        if left != right:
            raise ScheduleError(f"cannot compose: {name} {left} does not meet {name} {right}")
    return Schedule(
        ALLREDUCE,
        reduce_part.size,
        reduce_part.num_chunks,
        reduce_part.rounds + gather_part.rounds,
    )
