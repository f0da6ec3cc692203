"""The judge says no: every mutation of a sound schedule is refused, at its place."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfold.comm.algorithms import BUILDERS, build, names
from ringfold.comm.collective import (
    ALLREDUCE,
    ALLTOALL,
    BARRIER,
    BROADCAST,
    REDUCE,
    REDUCE_SCATTER,
    Collective,
)
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
from ringfold.comm.verify import verify


def ring(size: int) -> Schedule:
    return build("allreduce", "ring", size)


def mutated(schedule: Schedule, index: int, **changes: object) -> Schedule:
    rounds = list(schedule.rounds)
    rounds[index] = replace(rounds[index], **changes)  # type: ignore[arg-type]
    return replace(schedule, rounds=tuple(rounds))


def test_a_schedule_of_no_collective_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a Collective, .*, got 'allreduce'"):
        Schedule("allreduce", 4, 1, ())  # type: ignore[arg-type]


def refusal(schedule: Schedule) -> ScheduleError:
    with pytest.raises(ScheduleError) as caught:
        verify(schedule)
    return caught.value


def test_a_contribution_added_twice_is_refused() -> None:
    error = refusal(mutated(ring(4), 1, chunks=Rotated(0)))
    assert (error.round, error.rank, error.chunk) == (1, 1, 0)
    assert "round 1, rank 1, chunk 0: would add the contribution of rank 0 twice" in str(error)


def test_a_contribution_overwritten_is_refused() -> None:
    error = refusal(mutated(ring(4), 0, reduce=False))
    assert (error.round, error.rank, error.chunk) == (0, 1, 0)
    assert "loses, the contribution of rank 1" in str(error)


def test_a_missing_round_is_refused() -> None:
    whole = ring(4)
    error = refusal(replace(whole, rounds=whole.rounds[:-1]))
    assert error.round == 4 and "ends without the contribution of rank" in str(error)


def test_a_missing_reduction_is_refused() -> None:
    whole = ring(4)
    assert "twice" in str(refusal(replace(whole, rounds=whole.rounds[:3] + whole.rounds[:1])))


def test_messages_that_differ_have_other_digests() -> None:
    digests = {verify(build("allreduce", name, 4)).digest for name in names("allreduce")}
    rooted = {verify(build("reduce", "tree", 4, root)).digest for root in range(4)}
    assert len(digests) == len(names("allreduce")) and len(rooted) == 4
    # Another rule, but the same messages.
    same = [replace(round, chunks=Same(round.chunks)) for round in ring(4).rounds]
    assert verify(replace(ring(4), rounds=tuple(same))).digest == verify(ring(4)).digest


@dataclass(frozen=True)
class Same(Chunks):
    """Send what another rule says."""

    of: Chunks

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return self.of.span(rank, size, num_chunks)


def test_a_chunk_sent_before_it_is_held_is_refused() -> None:
    tree = build("broadcast", "tree", 4)
    error = refusal(replace(tree, rounds=tree.rounds[::-1]))
    assert (error.round, error.rank) == (0, 2)
    assert "sends to rank 3 a chunk that it does not hold" in str(error)


def test_adding_to_a_chunk_that_is_not_held_is_refused() -> None:
    """As of a broadcast: it was proven, and left the others' arrays as they were."""
    for name, place in (("broadcast", (0, 1, 0)), ("allgather", (0, 1, 0)), ("scatter", (0, 1, 1))):
        error = refusal(mutated(build(name, "pairwise", 3), 0, reduce=True))
        assert (error.round, error.rank, error.chunk) == place
        assert "would add to a chunk that it does not hold" in str(error)


def test_another_order_of_additions_is_refused() -> None:
    """Dissemination: rank 0 adds (1+2)+(3+0) where rank 3 adds (0+1)+(2+3)."""
    rounds = tuple(Round(Shift(step), All(), reduce=True) for step in (1, 2))
    error = refusal(Schedule(ALLREDUCE, 4, 1, rounds))
    assert (error.round, error.rank, error.chunk) == (1, 1, 0)
    assert "adds in another order than rank 0" in str(error)
    # A barrier adds nothing that rounds, and may do just that.
    verify(Schedule(BARRIER, 4, 1, rounds))


@dataclass(frozen=True)
class Lonely(Peers):
    """One rank sends to one other."""

    source: int
    target: int

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return np.where(np.asarray(rank) == self.source, self.target, NOBODY)

    def src(self, rank: Ranks, size: int) -> Ranks:
        return np.where(np.asarray(rank) == self.target, self.source, NOBODY)


@dataclass(frozen=True)
class Hopeful(Peers):
    """Send ahead, but receive from ahead as well: nobody's send is received."""

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return (rank + 1) % size

    def src(self, rank: Ranks, size: int) -> Ranks:
        return (rank + 1) % size


@dataclass(frozen=True)
class Pairs(Peers):
    """Exchange with the rank that differs in one bit."""

    bit: int

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return np.asarray(rank) ^ self.bit

    def src(self, rank: Ranks, size: int) -> Ranks:
        return np.asarray(rank) ^ self.bit


def test_a_receive_without_its_send_is_refused() -> None:
    error = refusal(mutated(ring(4), 2, peers=Hopeful()))
    assert (error.round, error.rank) == (2, 0)
    assert "sends to rank 1, which receives from rank 2: one of them would wait" in str(error)


def test_peers_outside_the_group_and_oneself_are_refused() -> None:
    error = refusal(mutated(ring(3), 0, peers=Lonely(0, 3)))
    assert (error.round, error.rank) == (0, 0) and "sends to rank 3 of 3" in str(error)
    assert "sends to itself" in str(refusal(mutated(ring(3), 0, peers=Shift(3))))


def test_a_copy_onto_what_is_being_sent_is_refused() -> None:
    swap = Schedule(BROADCAST, 2, 1, (Round(Pairs(1), All()),))
    assert "does not hold" in str(refusal(swap))
    both = Schedule(ALLREDUCE, 2, 1, (Round(Pairs(1), All(), True), Round(Pairs(1), All())))
    assert "sends in the same round" in str(refusal(both))


@dataclass(frozen=True)
class From(Chunks):
    """Send `length` chunks, from the rank's own entry of a table on."""

    first: tuple[int, ...]
    length: int

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return np.asarray(self.first)[rank], np.asarray(rank) * 0 + self.length


def test_adding_to_what_is_still_to_be_sent_is_refused() -> None:
    """It would be sent with what has been added: wrong sums, from the second segment on."""
    error = refusal(Schedule(ALLREDUCE, 2, 2, (Round(Pairs(1), From((0, 1), 2), True),)))
    assert (error.round, error.rank, error.chunk) == (0, 1, 0)
    assert "receives chunks 0..1 from rank 0, to be added, while it sends 1..0" in str(error)
    partly = refusal(Schedule(ALLREDUCE, 2, 4, (Round(Pairs(1), From((0, 1), 2), True),)))
    assert (partly.round, partly.rank, partly.chunk) == (0, 0, 1)
    # What begins alike is added as it has been sent; what is not sent at all, whenever it comes.
    verify(Schedule(ALLREDUCE, 2, 4, (Round(Pairs(1), From((3, 3), 4), True),)))
    apart, back = Round(Pairs(1), From((0, 2), 2), True), Round(Pairs(1), From((2, 0), 2))
    verify(Schedule(ALLREDUCE, 2, 4, (apart, back)))


def one(source: int, target: int, first: int, length: int, reduce: bool = True) -> Round:
    """One message."""
    return Round(Lonely(source, target), From((first,) * 3, length), reduce)


def test_sums_of_half_width_are_added_to_as_a_whole_until_they_are_used() -> None:
    """Else a sum was widened twice: a contribution, or a mean's division, was lost."""

    def raw(collective: Collective, *rounds: Round) -> bool:
        return verify(Schedule(collective, 3, 2, rounds)).raw_reduce

    whole, halves = one(2, 0, 0, 2), (one(2, 0, 0, 1), one(2, 0, 1, 1))
    assert raw(REDUCE, one(1, 0, 0, 2), whole)
    assert raw(REDUCE, one(1, 0, 0, 1), one(1, 0, 1, 1), *halves)
    assert not raw(REDUCE, one(1, 0, 0, 2), *halves)
    assert not raw(REDUCE, *halves, one(1, 0, 0, 2))
    assert not raw(REDUCE, one(1, 0, 1, 2), whole)  # the same chunks, but not the same pieces
    assert not raw(REDUCE, one(2, 1, 0, 2), one(1, 0, 0, 2))  # a partial sum
    copies = (one(0, 1, 0, 2, False), one(0, 2, 0, 2, False))
    assert raw(ALLREDUCE, one(1, 0, 0, 2), whole, *copies)
    early = one(0, 1, 1, 1, False)
    assert not raw(ALLREDUCE, one(1, 0, 0, 2), early, whole, *copies)


def test_an_alltoall_that_forwards_is_refused() -> None:
    """Whichever rank does so: it alone found that out, when the others had begun."""

    def cell(source: int, target: int, index: int) -> Round:
        return one(source, target, index, 1, reduce=False)

    for via in range(3):
        start, end = (via + 1) % 3, (via + 2) % 3
        straight = [
            cell(row, column, 3 * row + column)
            for row in range(3)
            for column in range(3)
            if row != column and (row, column) != (start, end)
        ]
        carried = 3 * start + end
        error = refusal(
            Schedule(
                ALLTOALL, 3, 9, (cell(start, via, carried), cell(via, end, carried), *straight)
            )
        )
        assert (error.round, error.rank, error.chunk) == (0, start, carried)
        assert f"forwards a chunk to rank {via}; an alltoall can be run only where" in str(error)
        verify(Schedule(ALLTOALL, 3, 9, (cell(start, end, carried), *straight)))


@pytest.mark.parametrize(
    "collective, size, num_chunks, root, text",
    [
        (ALLREDUCE, 0, 1, 0, "size >= 1"),
        (ALLREDUCE, 2, 0, 0, "num_chunks >= 1"),
        (BROADCAST, 2, 1, 2, "root 2 is outside 0..1"),
        (REDUCE_SCATTER, 3, 4, 0, "multiple of size 3, got 4"),
        (ALLTOALL, 3, 3, 0, "size . size = 9, got 3"),
        (ALLREDUCE, 3, 1.5, 0, "num_chunks must be a whole number, got 1.5"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    collective: object, size: int, num_chunks: int, root: int, text: str
) -> None:
    with pytest.raises(ScheduleError, match=text.replace("..", r"\.\.")):
        Schedule(collective, size, num_chunks, (), root)  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="round 1: expected a Round, got 5"):
        Schedule(ALLREDUCE, 2, 1, (ring(2).rounds[0], 5))  # type: ignore[arg-type]


@given(st.sampled_from(sorted(BUILDERS)), st.integers(2, 9), st.data())
def test_no_round_can_be_left_out(name: tuple[str, str], size: int, draw: st.DataObject) -> None:
    schedule = build(*name, size)
    index = draw.draw(st.integers(0, len(schedule.rounds) - 1))
    rounds = schedule.rounds[:index] + schedule.rounds[index + 1 :]
    assert refusal(replace(schedule, rounds=rounds)).rank is not None


@given(st.sampled_from(sorted(BUILDERS)), st.integers(2, 9), st.data())
def test_no_reduction_can_become_a_copy(
    name: tuple[str, str], size: int, draw: st.DataObject
) -> None:
    schedule = build(*name, size)
    reducing = [index for index, round in enumerate(schedule.rounds) if round.reduce]
    if not reducing or name[0] == "barrier":
        return
    refusal(mutated(schedule, draw.draw(st.sampled_from(reducing)), reduce=False))
