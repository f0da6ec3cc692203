"""What a rule claims to be alike is proven, as a price believes it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from ringfold.comm.algorithms.pairwise import Spoke
from ringfold.comm.collective import ALLGATHER, ALLREDUCE, BROADCAST
from ringfold.comm.cost import price
from ringfold.comm.errors import ScheduleError
from ringfold.comm.nesting import inside
from ringfold.comm.places import renumber
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
from ringfold.comm.topology import Cluster, Link
from ringfold.comm.transform import reverse
from ringfold.comm.verify import verify

FLAT = Cluster(Link(1e-6, 1e9))
NODES = Cluster(Link(1e-6, 1e9), ranks_per_node=2)


def refusal(judge: Any, schedule: Schedule) -> ScheduleError:
    with pytest.raises(ScheduleError) as caught:
        judge(schedule)
    return caught.value


@dataclass(frozen=True)
class Behind(Chunks):
    """Send the last n chunks that a rank has; all alike, which they are not."""

    n: int

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return (rank - self.n + 1) % size, rank * 0 + self.n

    def alike(self) -> Chunks:
        return Behind(1)


def test_chunks_of_another_length_are_not_alike() -> None:
    """Bruck's allgather was proven, and priced as if every round sent one chunk."""
    rounds = [Round(Shift(step), Behind(min(step, 5 - step))) for step in (1, 2, 4)]
    error = refusal(verify, Schedule(ALLGATHER, 5, 5, tuple(rounds)))
    assert (error.round, error.rank) == (1, 0)
    assert "sends 2 chunks, and 1 with Behind(n=1), which Behind.alike calls alike" in str(error)


@dataclass(frozen=True)
class Hop(Peers):
    """Send from one rank to the next; alike is what it is told."""

    source: int
    kind: Any = field(default=None, compare=False)

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return np.where(rank == self.source, rank + 1, NOBODY)

    def src(self, rank: Ranks, size: int) -> Ranks:
        return np.where(rank == self.source + 1, rank - 1, NOBODY)

    def alike(self) -> Peers:
        kind: Peers = self.kind or self
        return kind


@dataclass(frozen=True)
class ToOne(Peers):
    """Let all send to one."""

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return rank * 0

    def src(self, rank: Ranks, size: int) -> Ranks:
        return rank * 0


def test_peers_of_whom_others_send_are_not_alike() -> None:
    """The busiest rank was told to send all that the chain sends."""
    chain = Schedule(BROADCAST, 3, 1, (Round(Hop(0), All()), Round(Hop(1, Hop(0)), All())))
    error = refusal(verify, chain)
    assert (error.round, error.rank) == (1, 0)
    assert "sends 0 chunks, and 1 with Hop(source=0" in str(error)
    assert "which Hop.alike calls alike" in str(error)
    verify(Schedule(BROADCAST, 3, 1, (Round(Hop(0, Hop(0)), All()), Round(Hop(1), All()))))


@dataclass(frozen=True)
class Ring(Shift):
    """A shift that claims to be like what ranks cannot run."""

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return super().dst(rank, size)

    def alike(self) -> Peers:
        return ToOne()


def test_what_ranks_could_not_run_is_alike_to_none() -> None:
    """Three senders shared one rank's card, in the price alone."""
    rounds = (Round(Ring(1), Rotated(0)), Round(Shift(1), Rotated(-1)))
    error = refusal(verify, Schedule(ALLGATHER, 3, 3, rounds))
    assert error.round == 0 and "ToOne(), which is called alike" in str(error)


@dataclass(frozen=True)
class Uneven(Chunks):
    """Compare equal to those of another length."""

    n: int = field(compare=False)

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return (rank - self.n + 1) % size, rank * 0 + self.n


def test_rules_that_are_equal_send_as_much() -> None:
    """Rounds that are equal are priced once."""
    rounds = (Round(Shift(1), Uneven(1)), Round(Shift(2), Uneven(2)))
    error = refusal(verify, Schedule(ALLGATHER, 4, 4, rounds))
    assert (error.round, error.rank) == (1, 0)


class Pair:
    """A span to be mixed in, which is no rule by itself."""

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return 2 * rank % num_chunks, rank * 0 + 2


class Out:
    """A direction to be mixed in; only rank 0 sends."""

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return np.where(rank == 0, 1, NOBODY)

    def src(self, rank: Ranks, size: int) -> Ranks:
        return np.where(rank == 1, 0, NOBODY)


class AsOne:
    """A claim to be mixed in."""

    def alike(self) -> Chunks:
        return Pairs(0)


@dataclass(frozen=True)
class Pairs(Pair, Rotated):
    """Send two chunks, by what it is mixed with."""


@dataclass(frozen=True)
class OutOnce(Out, Spoke):
    """Send from rank 0, by what it is mixed with."""


@dataclass(frozen=True)
class Claimed(AsOne, Pairs):
    """Say what it is alike to, by what it is mixed with."""


@dataclass(frozen=True)
class Further(Pairs):
    """Derived again."""


@dataclass(frozen=True)
class Unchanged(Rotated, Pair):
    """Mixed in behind, the span counts for nothing."""


def test_claims_are_of_the_methods_that_count() -> None:
    """A claim outlived methods that were mixed in: 1,000 bytes were priced for 2,000."""
    gather = Schedule(ALLGATHER, 2, 4, (Round(Shift(1), Pairs(0)),))
    verify(gather)
    assert price(gather, 4000, FLAT).bytes_sent == 2000
    assert Pairs(1).alike() == Pairs(1) and Further(1).alike() == Further(1)
    assert Claimed(1).alike() == Pairs(0) and Unchanged(1).alike() == Rotated(0)
    out = OutOnce(3, 2)
    assert out.alike() == out and out.members(4).tolist() == [0, 1, 2, 3]


@dataclass(frozen=True)
class Claims(Rotated):
    """Call alike whatever it is told."""

    kind: str = ""

    def alike(self) -> Chunks:
        if not self.kind:
            raise KeyError("nothing")
        return {"none": None, "peers": Shift(1), "list": Listless([0])}[self.kind]  # type: ignore


@dataclass(frozen=True)
class Listless(Chunks):
    """Not hashable, for its field."""

    by: list[int]

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return rank, rank * 0 + 1


@pytest.mark.parametrize(
    "kind, said",
    [
        ("none", "Claims.alike returned None, expected a Chunks rule"),
        ("peers", "Claims.alike returned Shift(by=1), expected a Chunks rule"),
        ("", "Claims.alike raised KeyError: 'nothing'"),
        ("list", "the rule Listless cannot be hashed (unhashable type: 'list')"),
    ],
)
def test_what_is_called_alike_is_a_rule(kind: str, said: str) -> None:
    """A price ended with a TypeError or an AttributeError that named neither rule nor round."""
    rounds = (Round(Shift(1), Rotated(0)), Round(Shift(1), Claims(-1, kind)))
    gather = Schedule(ALLGATHER, 3, 3, rounds)
    within = Schedule(ALLGATHER, 6, 6, inside(gather, 3))
    for judge in (verify, lambda s: price(s, 64, FLAT), lambda s: price(s, 64, NODES)):
        assert str(refusal(judge, gather)).startswith(f"round 1: {said}")
    for schedule in (
        within,
        renumber(Schedule(ALLREDUCE, 3, 3, rounds), (1, 0, 2)),
        reverse(gather),
    ):
        told = str(refusal(lambda s: price(s, 64, FLAT), schedule))
        at = 0 if schedule.collective.name == "reduce_scatter" else 1
        shown = said.replace("Listless", told.split()[4]) if kind == "list" else said
        assert told.startswith(f"round {at}: {shown}")


@dataclass(frozen=True)
class Loose(Hop):
    """Not hashable, for its field."""

    of: Any = field(default_factory=list)


def test_peers_that_are_called_alike_can_be_remembered() -> None:
    """Of chunks it was tested; of peers a TypeError without rule and round would have passed."""
    chain = Schedule(BROADCAST, 3, 1, (Round(Hop(0), All()), Round(Hop(1, Loose(1)), All())))
    for judge in (verify, lambda s: price(s, 64, FLAT)):
        said = "round 1: the rule Loose cannot be hashed (unhashable type: 'list')"
        assert str(refusal(judge, chain)).startswith(said)


@dataclass(frozen=True)
class Counted(Listless):
    """Not hashable, but alike to what is."""

    def alike(self) -> Chunks:
        return Rotated(0)


@dataclass(frozen=True)
class Shifted(Loose):
    """The same of peers."""

    def alike(self) -> Peers:
        return Hop(self.source)


@pytest.mark.parametrize("judge", [verify, lambda s: price(s, 64, FLAT)])
def test_rules_are_to_be_remembered_themselves(judge: Any) -> None:
    """Not only what they are alike to: a proven schedule is the key of what is known of it."""
    gather = Schedule(ALLGATHER, 2, 2, (Round(Shift(1), Counted([])),))
    assert "round 0: the rule Counted cannot be hashed" in str(refusal(judge, gather))
    chain = Schedule(BROADCAST, 2, 1, (Round(Shifted(0), All()),))
    assert "round 0: the rule Shifted cannot be hashed" in str(refusal(judge, chain))
