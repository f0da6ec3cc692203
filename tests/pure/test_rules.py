"""Rules are evaluated alike wherever they are asked, and told apart where they are none."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from own_schedules import Inverted

from ringfold.comm.collective import ALLGATHER, ALLREDUCE
from ringfold.comm.cost import price
from ringfold.comm.errors import ScheduleError
from ringfold.comm.evaluation import draw
from ringfold.comm.listed import side_by_side
from ringfold.comm.nesting import across, inside
from ringfold.comm.places import renumber
from ringfold.comm.program import Op, lower, part_of
from ringfold.comm.schedule import NOBODY, Chunks, Peers, Ranks, Rotated, Round, Schedule, Shift
from ringfold.comm.topology import Cluster, Link
from ringfold.comm.transform import reverse
from ringfold.comm.verify import verify

FLAT = Cluster(Link(1e-6, 1e9))

JUDGES = (verify, draw, lambda schedule: price(schedule, 64, FLAT), lambda s: part_of(s, 1))
"""All that evaluate a schedule."""


def refusals(schedule: Schedule) -> list[str]:
    """Return what each of those that evaluate it says against a schedule."""
    told = []
    for judge in JUDGES:
        with pytest.raises(ScheduleError) as caught:
            judge(schedule)
        told.append(str(caught.value))
    return told


def gather(size: int, *rounds: Round) -> Schedule:
    """Return the ring's allgather with other first rounds."""
    ring = [Round(Shift(1), Rotated(-step)) for step in range(size - 1)]
    return Schedule(ALLGATHER, size, size, (*rounds, *ring[len(rounds) :]))


def test_what_is_proven_is_lowered() -> None:
    """Of an int, `~` gives -2 for True, which is true again: both rounds sent the same chunk."""
    halves = (Round(Shift(1), Inverted(False), True), Round(Shift(1), Inverted(True)))
    schedule = Schedule(ALLREDUCE, 2, 2, halves)
    verify(schedule)
    assert draw(schedule) == "0: 0>1:1+ 1>0:0+\n1: 0>1:0 1>0:1"
    assert lower(part_of(schedule, 0), 2).rows.tolist() == [
        [0, Op.SEND, 1, 1, 1],
        [0, Op.RECV_REDUCE, 1, 0, 1],
        [1, Op.SEND, 1, 0, 1],
        [1, Op.RECV, 1, 1, 1],
    ]


@dataclass(frozen=True)
class Rolled(Peers):
    """A ring, by moving the array of all ranks: no formula of a rank by itself."""

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return np.roll(rank, -1)

    def src(self, rank: Ranks, size: int) -> Ranks:
        return np.roll(rank, 1)


def test_a_rule_of_the_whole_array_is_lowered_as_it_is_proven() -> None:
    """Asked about one rank, it would send to itself."""
    ring, rolled = gather(4), gather(4, *[Round(Rolled(), Rotated(-step)) for step in range(3)])
    assert verify(rolled) == verify(ring)
    for rank in range(4):
        assert (part_of(rolled, rank).rows == part_of(ring, rank).rows).all()


@dataclass(frozen=True)
class Counting(Peers):
    """Pair the first four ranks, by how many it is asked about."""

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return np.where(rank < 4, rank ^ (1 if rank.size == size else 2), NOBODY)

    def src(self, rank: Ranks, size: int) -> Ranks:
        return self.dst(rank, size)

    def members(self, size: int) -> Ranks:
        return np.arange(4)


def test_a_rule_that_tells_its_members_of_other_peers_is_refused() -> None:
    """That each send has its receive was judged by the one, what is sent by the other."""
    with pytest.raises(ScheduleError, match="round 0: Counting tells its members of other peers"):
        verify(Schedule(ALLREDUCE, 6, 1, (Round(Counting(), Rotated(0), True),)))


@dataclass(frozen=True)
class ShiftedInPlace(Shift):
    """Write to the array that it is asked about."""

    def dst(self, rank: Ranks, size: int) -> Ranks:
        rank += self.by
        rank %= size
        return rank


@dataclass(frozen=True)
class RotatedInPlace(Rotated):
    """The same."""

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        rank += self.offset
        rank %= num_chunks
        return rank, rank * 0 + 1


@pytest.mark.parametrize(
    "bad", [Round(ShiftedInPlace(1), Rotated(0)), Round(Shift(1), RotatedInPlace(-1))]
)
def test_a_rule_that_writes_to_the_ranks_is_named(bad: Round) -> None:
    """It moved the prover's own ranks, so that other messages were proven than were sent."""
    named = "ShiftedInPlace.dst" if isinstance(bad.peers, ShiftedInPlace) else "RotatedInPlace.span"
    for text in refusals(gather(3, Round(Shift(1), Rotated(0)), bad)):
        assert text.startswith(f"round 1: {named} cannot be evaluated at an array of 3 ranks")
        assert "read-only" in text and "a new array instead of a changed one" in text
    with pytest.raises(ScheduleError, match=f"{named} cannot be evaluated"):
        side_by_side(ALLGATHER, 6, [((0, 2, 4), gather(3, bad))], 3)


@dataclass(frozen=True)
class Run(Chunks):
    """Send such a run from every rank."""

    first: int
    length: int

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return rank * 0 + self.first, rank * 0 + self.length


@dataclass(frozen=True)
class Aimed(Shift):
    """Send from rank 2 to such a rank, from nobody else."""

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return np.where(rank == 2, self.by, NOBODY)

    def src(self, rank: Ranks, size: int) -> Ranks:
        return NOBODY


@pytest.mark.parametrize(
    "bad, said",
    [
        (Round(Aimed(4), Rotated(0)), "rank 2: sends to rank 4 of 4"),
        (Round(Aimed(-2), Rotated(0)), "rank 2: sends to rank -2 of 4"),
        (Round(Shift(1), Run(4, 1)), "rank 0, chunk 4: sends 1 chunks from 4 of 4"),
        (Round(Shift(1), Run(-1, 1)), "rank 0, chunk -1: sends 1 chunks from -1 of 4"),
        (Round(Shift(1), Run(0, 5)), "rank 0, chunk 0: sends 5 chunks from 0 of 4"),
        (Round(Shift(1), Run(0, -1)), "rank 0, chunk 0: sends -1 chunks from 0 of 4"),
    ],
)
def test_messages_to_ranks_and_of_chunks_that_there_are_not_are_refused(
    bad: Round, said: str
) -> None:
    """They were priced, or ended a price with an IndexError; a negative length sent nothing."""
    schedule = gather(4, Round(Shift(1), Rotated(0)), bad)
    assert set(refusals(schedule)) == {f"round 1, {said}"}


@dataclass(frozen=True)
class Tells(Rotated):
    """Give the first, and the length, that it is told."""

    first: Any = field(default=0, compare=False)
    length: Any = field(default=1, compare=False)

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return self.first, self.length


@dataclass(frozen=True)
class Leads(Shift):
    """Send to whom it is told."""

    to: Any = field(default=0, compare=False)

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return self.to


class Sinkless(Peers):
    """Say nothing at all of whom ranks send to."""

    def src(self, rank: Ranks, size: int) -> Ranks:
        return rank


NUMBERS = "expected a whole number for each of 4 ranks, or one for all"

NONE_OF_4: list[tuple[Any, str]] = [
    (None, f"None, {NUMBERS}"),
    ("1", f"'1', {NUMBERS}"),
    ([1, 2, None, 3], f"[1, 2, None, 3], {NUMBERS}"),
    ([[1], [2, 3]], f"[[1], [2, 3]], {NUMBERS}"),
    (np.arange(3), f"an array of shape (3,), {NUMBERS}"),
    (np.arange(4)[:, None], f"an array of shape (4, 1), {NUMBERS}"),
    (np.arange(4) / 2, f"0.5 for rank 1, {NUMBERS}; `//` divides to whole numbers"),
    (-np.arange(4) / 4, f"-0.25 for rank 1, {NUMBERS}"),
    (0.5, f"0.5, {NUMBERS}"),
    (np.full(4, np.nan), f"nan for rank 0, {NUMBERS}"),
    (np.full(4, 1e20), f"1e+20 for rank 0, {NUMBERS}"),
    (np.full(4, 2**63, np.uint64), f"9223372036854775808 for rank 0, {NUMBERS}"),
    (10**20, f"100000000000000000000, {NUMBERS}"),
]


@pytest.mark.parametrize("told, said", NONE_OF_4, ids=[said for _, said in NONE_OF_4])
def test_what_is_no_whole_number_for_each_rank_is_named(told: Any, said: str) -> None:
    """Halves and NaN were cut to integers; of others NumPy's words were told, and a false hint."""
    for round, name in (
        (Round(Leads(1, told), Rotated(0)), "Leads.dst"),
        (Round(Shift(1), Tells(0, told)), "Tells.span, for its first,"),
        (Round(Shift(1), Tells(0, 0, told)), "Tells.span, for its length,"),
    ):
        for text in refusals(gather(4, round)):
            assert text.startswith(f"round 0: {name} returned {said}") and "np.where" not in text


@pytest.mark.parametrize(
    "round, name",
    [
        (Round(Leads(1, None), Rotated(0)), "Leads.dst"),
        (Round(Shift(1), Tells(0, None)), "Tells.span, for its first,"),
    ],
)
def test_a_rule_within_a_rule_is_named(round: Round, name: str) -> None:
    """It was the outer one, of the package, with what NumPy says of None."""
    flat = gather(4, round)
    within = Schedule(ALLGATHER, 8, 8, inside(flat, 4))
    between = Schedule(ALLGATHER, 8, 8, across(flat, 2, 8))
    order = renumber(Schedule(ALLREDUCE, 4, 4, flat.rounds), (3, 2, 1, 0))
    for schedule in (within, between, order):
        assert {text.partition(" returned ")[0] for text in refusals(schedule)} == {
            f"round 0: {name}"
        }


def test_whole_numbers_of_any_type_are_taken() -> None:
    """Of small integers, floats and objects too, as lists, one for all and truths."""
    for told in ([1, 2, 3, 0], np.array([1.0, 2.0, 3.0, 0.0]), np.array([1, 2, 3, 0], np.uint8)):
        for length in (1, 1.0, True, [1], np.ones(4, object)):
            first = Round(Leads(1, told), Tells(0, np.arange(4), length))
            assert verify(gather(4, first)) == verify(gather(4))


def test_a_missing_method_is_named() -> None:
    """That np.where is to be used instead of `if` was told instead."""
    for text in refusals(gather(4, Round(Sinkless(), Rotated(0)))):
        assert text == (
            "round 0: Sinkless.dst cannot be evaluated at an array of 4 ranks "
            "(NotImplementedError: Sinkless has no `dst`)"
        )


@dataclass(frozen=True)
class Absent(Shift):
    """Fail to say who takes part."""

    def members(self, size: int) -> Ranks:
        raise KeyError("nobody")


def test_members_that_cannot_be_told_are_named() -> None:
    with pytest.raises(ScheduleError) as caught:
        verify(gather(3, Round(Absent(1), Rotated(0))))
    assert str(caught.value).startswith("round 0: the members of Absent cannot be told (KeyError")


@dataclass(frozen=True)
class Lengthless(Rotated):
    """Forget the length."""

    parts: int = 0

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        first = (rank + self.offset) % num_chunks
        return (first,) * self.parts if self.parts else first  # type: ignore[return-value]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "parts, shown", [(0, "a ndarray"), (1, "a tuple of 1"), (3, "a tuple of 3")]
)
def test_a_span_that_is_no_pair_is_named(parts: int, shown: str, size: int) -> None:
    """Of two ranks the firsts were taken for (first, length); of more, "too many to unpack"."""
    flat = gather(size, Round(Shift(1), Lengthless(0, parts)))
    said = f"round 0: Lengthless.span returned {shown}, expected two parts: (first, length)"
    assert set(refusals(flat)) == {said}
    inner = inside(flat, flat.num_chunks)
    assert set(refusals(Schedule(ALLGATHER, 2 * size, 2 * size, inner))) == {said}
    order = renumber(Schedule(ALLREDUCE, size, size, flat.rounds), range(size)[::-1])
    assert set(refusals(order)) == {said}
    assert said.removeprefix("round 0") in refusals(reverse(flat))[0]


def test_numpys_truth_is_that_of_a_round() -> None:
    """verify ended with a TypeError about an integer, where a price was told."""
    flags = np.arange(2) < 1
    rounds = [Round(Shift(1), Inverted(bool(at)), flags[at]) for at in range(2)]
    verify(Schedule(ALLREDUCE, 2, 2, tuple(rounds)))
    assert [round.reduce for round in rounds] == [True, False]
    assert all(type(round.reduce) is bool for round in rounds)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((Shift(1), Rotated(0), 1), "reduce: expected a bool, got 1"),
        ((Shift(1), Rotated(0), "sum"), "reduce: expected a bool, got 'sum'"),
        ((Shift(1), Rotated(0), np.array([True])), "reduce: expected a bool, got array"),
        ((Rotated(0), Shift(1)), r"peers: expected a Peers rule, got Rotated\(offset=0\)"),
        ((Shift(1), Rotated), "chunks: expected a Chunks rule, got <class"),
    ],
)
def test_what_makes_no_round_is_refused(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        Round(*arguments)
