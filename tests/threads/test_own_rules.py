"""A schedule of a user's gives the results that were proven, whatever its rules are made of."""

from dataclasses import dataclass

import numpy as np
import pytest
from own_schedules import Inverted

from ringfold import Communicator, run_local
from ringfold.comm.collective import ALLGATHER, ALLREDUCE, BARRIER, BROADCAST
from ringfold.comm.errors import ScheduleError
from ringfold.comm.schedule import (
    NOBODY,
    All,
    Chunks,
    Peers,
    Ranks,
    Rotated,
    Round,
    Schedule,
    Shift,
)


@dataclass(frozen=True)
class Link(Peers):
    """Send from one rank to the next; nobody else talks."""

    source: int

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return np.where(~(rank != self.source), rank + 1, NOBODY)

    def src(self, rank: Ranks, size: int) -> Ranks:
        return np.where(~(rank != self.source + 1), rank - 1, NOBODY)


@dataclass(frozen=True)
class Copied(Shift):
    """A shift that is told by methods of an array."""

    def dst(self, rank: Ranks, size: int) -> Ranks:
        ahead = rank.copy()
        ahead += self.by
        return ahead % size


@dataclass(frozen=True)
class InPlace(Rotated):
    """Write to the array that it is asked about."""

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        rank += self.offset
        rank %= num_chunks
        return rank, rank * 0 + 1


def test_a_rule_that_inverts_runs_as_it_is_proven() -> None:
    """Asked about an int, `~True` is -2 and true: wrong sums, or ranks that did not meet."""
    halves = (Round(Shift(1), Inverted(False), True), Round(Shift(1), Inverted(True)))
    chain = tuple(Round(Link(source), All()) for source in range(2))

    def add(comm: Communicator) -> list[float]:
        x = np.arange(4.0) * (comm.rank + 1)
        comm.allreduce(x, algorithm=Schedule(ALLREDUCE, 2, 2, halves))
        return x.tolist()

    def copy(comm: Communicator) -> list[float]:
        x = np.full(4, comm.rank + 1.0)
        comm.broadcast(x, algorithm=Schedule(BROADCAST, 3, 1, chain))
        return x.tolist()

    assert run_local(2, add) == [[0.0, 3.0, 6.0, 9.0]] * 2
    assert run_local(3, copy) == [[1.0] * 4] * 3


@dataclass(frozen=True)
class Second(Chunks):
    """Send the second chunk of two, or both."""

    length: int

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return 1, self.length


def test_a_barrier_of_ones_own_runs() -> None:
    """It was proven and priced, and barrier() took no algorithm."""
    rounds = tuple(Round(Shift(1), Second(length), True) for length in (1, 2, 1, 2))
    own = Schedule(BARRIER, 3, 2, rounds)
    come: list[tuple[int, int]] = []

    def meet(comm: Communicator) -> list[str]:
        told, count = [], 0
        for algorithm in ("dissemination", own, None):
            for call in (
                lambda algorithm=algorithm: comm.barrier(algorithm=algorithm),
                comm.plan("barrier", algorithm=algorithm),
            ):
                count += 1
                come.append((comm.rank, count))
                call()
                assert {rank for rank, when in list(come) if when == count} == {0, 1, 2}
            work = comm.barrier(algorithm=algorithm, blocking=False)
            work.wait()
            told.append(work.receipt.algorithm)
        for wrong, said in (
            (Schedule(BARRIER, 3, 2, rounds[:2]), "ends without the contribution of"),
            (Schedule(ALLREDUCE, 3, 2, ()), "the schedule's collective is allreduce"),
        ):
            with pytest.raises(ScheduleError, match=said):
                comm.barrier(algorithm=wrong)
        return told

    assert all(told[:2] == ["dissemination", "schedule"] for told in run_local(3, meet))


def test_a_rule_for_arrays_alone_runs() -> None:
    """It was proven, and the call ended with an AttributeError about an int."""
    rounds = tuple(Round(Copied(1), Rotated(-step)) for step in range(2))

    def gather(comm: Communicator) -> list[float]:
        own = np.array([comm.rank + 1.0])
        return comm.allgather(own, algorithm=Schedule(ALLGATHER, 3, 3, rounds)).ravel().tolist()

    assert run_local(3, gather) == [[1.0, 2.0, 3.0]] * 3


def test_a_rule_that_writes_to_the_ranks_is_refused_on_all() -> None:
    """It was proven with its rounds in a wrong order, and the result was what memory held."""
    rounds = tuple(Round(Shift(1), InPlace(-step)) for step in (0, 2, 1))

    def gather(comm: Communicator) -> None:
        with pytest.raises(ScheduleError, match=r"round 0: InPlace\.span cannot be evaluated"):
            comm.allgather(np.ones(2), algorithm=Schedule(ALLGATHER, 4, 4, rounds))

    run_local(4, gather)
