"""Every price has a closed form."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest

from ringfold.comm.algorithms import BUILDERS, build
from ringfold.comm.algorithms.pairwise import Spoke
from ringfold.comm.collective import COLLECTIVES
from ringfold.comm.cost import price, seconds_of
from ringfold.comm.errors import ScheduleError
from ringfold.comm.evaluation import moves
from ringfold.comm.schedule import Chunks, Peers, Ranks, Reverse, Rotated, Schedule, Shift
from ringfold.comm.topology import Cluster, Link, Nodes
from ringfold.comm.verify import verify

LATENCY, BANDWIDTH, ADD = 5e-6, 25e9, 10e9
FLAT = Cluster(Link(LATENCY, BANDWIDTH))
PAIRS = Nodes.blocks(4, 2)
ADDING = Cluster(Link(LATENCY, BANDWIDTH), reduce_bandwidth=ADD)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 17, 33, 64])
def test_the_ring_costs_its_formula(size: int) -> None:
    nbytes = 4 * size * 1000
    chunk = nbytes / size
    rounds = 2 * (size - 1)
    expected = rounds * (LATENCY + chunk / BANDWIDTH)
    assert price(build("allreduce", "ring", size), nbytes, FLAT).seconds == pytest.approx(expected)
    expected += (size - 1) * chunk / ADD
    found = price(build("allreduce", "ring", size), nbytes, ADDING)
    assert found.seconds == pytest.approx(expected) and found.rounds == rounds


@pytest.mark.parametrize("size, rounds", [(1, 0), (2, 1), (3, 3), (4, 2), (5, 4), (8, 3), (64, 6)])
def test_doubling_costs_its_formula(size: int, rounds: int) -> None:
    nbytes = 40_000
    found = price(build("allreduce", "recursive_doubling", size), nbytes, FLAT)
    assert found.seconds == pytest.approx(rounds * (LATENCY + nbytes / BANDWIDTH))


@pytest.mark.parametrize("size", [2, 3, 5, 8, 64])
def test_the_pipelined_chain_costs_its_formula(size: int) -> None:
    nbytes = 4 * size * 1000
    found = price(build("broadcast", "ring", size), nbytes, FLAT)
    expected = 2 * (size - 1) * (LATENCY + nbytes / size / BANDWIDTH)
    assert found.seconds == pytest.approx(expected)


def test_chunks_are_priced_at_their_largest() -> None:
    found = price(build("allreduce", "ring", 4), 4 * 5, FLAT)
    assert found.bytes_sent == 6 * 8
    assert price(build("allreduce", "ring", 4), 4, FLAT).bytes_sent == 6 * 4
    assert price(build("allreduce", "ring", 4), 0, FLAT).seconds == pytest.approx(6 * LATENCY)


def test_bytes_beyond_64_bits_do_not_go_round() -> None:
    found = price(build("broadcast", "tree", 1024), 1 << 60, FLAT)
    assert found.bytes_sent == 10 << 60
    with pytest.raises(ValueError, match="of 1152921504606846976 at most"):
        price(build("broadcast", "tree", 4), (1 << 60) + 1, FLAT)


def test_ranks_of_a_node_share_its_card() -> None:
    """Four ranks a node, shift by four: all four messages of a node leave through one card."""
    schedule = build("alltoall", "pairwise", 8)
    nbytes = 4 * 64 * 1000
    cell = nbytes / 64
    intra = Link(1e-6, 100e9)
    shared = Cluster(Link(LATENCY, BANDWIDTH), intra, ranks_per_node=4)
    found = price(schedule, nbytes, shared).seconds
    # Shifts 1, 2, 3 and 5, 6, 7 send 1, 2, 3 and 3, 2, 1 messages out of a node; shift 4 sends 4.
    leaving = [1, 2, 3, 4, 3, 2, 1]
    expected = sum(LATENCY + cell * many / BANDWIDTH for many in leaving)
    assert found == pytest.approx(expected)
    cards = Cluster(Link(LATENCY, BANDWIDTH), intra, ranks_per_node=4, cards_per_node=4)
    expected = 7 * (LATENCY + cell / BANDWIDTH)
    assert price(schedule, nbytes, cards).seconds == pytest.approx(expected)
    inside = price(build("alltoall", "pairwise", 4), 4 * 16 * 1000, shared).seconds
    assert inside == pytest.approx(3 * (1e-6 + 4000 / 100e9))


def one_by_one(schedule: Schedule, nbytes: int, cluster: Cluster, nodes: Nodes) -> float:
    """Price message by message, by a dictionary of who is where."""
    node = {rank: at for at, members in enumerate(nodes.members) for rank in members}
    chunk = -(-nbytes // 4 // schedule.num_chunks) * 4
    assert cluster.intra is not None
    total = 0.0
    for round in schedule.rounds:
        sent = list(moves(round, schedule.size, schedule.num_chunks))
        leaving = [(node[src], node[dst]) for src, dst, _, _ in sent if node[src] != node[dst]]
        slowest = 0.0
        for src, dst, _, length in sent:
            own, other = node[src], node[dst]
            link, share = cluster.intra, 1.0
            if own != other:
                out, into = (sum(a == own for a, _ in leaving), sum(b == other for _, b in leaving))
                link, share = cluster.inter, max(max(out, into) / cluster.cards_per_node, 1.0)
            nbytes_moved = length * chunk
            seconds = link.latency + nbytes_moved * share / link.bandwidth
            if round.reduce:
                seconds += nbytes_moved / cluster.reduce_bandwidth
            slowest = max(slowest, seconds)
        total += slowest
    return total


LAYOUTS = {
    "blocks": Nodes.blocks(8, 4),
    "last one smaller": Nodes.blocks(8, 3),
    "round robin": Nodes.labelled([0, 1] * 4),
    "unequal": Nodes.labelled([0] + [1] * 7),
    "scattered": Nodes.labelled([2, 0, 2, 1, 1, 2, 0, 1]),
    "apart": Nodes.blocks(8, 1),
    "one": Nodes.blocks(8, 8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_messages_take_the_links_and_share_the_cards_of_the_nodes_there_are(layout: str) -> None:
    """Any nodes were priced as blocks of as many neighbours as the largest one holds."""
    nodes = LAYOUTS[layout]
    for cards in (1, 2):
        links = Link(LATENCY, BANDWIDTH), Link(1e-6, 100e9)
        cluster = Cluster(*links, cards_per_node=cards, reduce_bandwidth=ADD, nodes=nodes)
        for name in BUILDERS:
            schedule = build(*name, 8, 3 if COLLECTIVES[name[0]].rooted else 0, nodes)
            nbytes = 4 * schedule.num_chunks * 100
            found = price(schedule, nbytes, cluster).seconds
            assert found == pytest.approx(one_by_one(schedule, nbytes, cluster, nodes)), name
            if nodes == Nodes.blocks(8, 4):
                closed = replace(cluster, nodes=None, ranks_per_node=4)
                assert found == price(schedule, nbytes, closed).seconds


@pytest.mark.parametrize("name", BUILDERS, ids=":".join)
def test_many_sizes_at_once_cost_what_each_costs(name: tuple[str, str]) -> None:
    sizes = (0, 1, 4, 100, 1 << 20, 1 << 60)
    scattered = replace(ADDING, intra=Link(1e-6, 100e9), nodes=LAYOUTS["scattered"])
    for cluster in (FLAT, Cluster(FLAT.inter, Link(1e-6, 100e9), ranks_per_node=2), scattered):
        schedule = build(*name, 8, 3 if COLLECTIVES[name[0]].rooted else 0, cluster.nodes)
        right = [price(schedule, nbytes, cluster).seconds for nbytes in sizes]
        assert seconds_of(schedule, sizes, cluster) == pytest.approx(right)


@dataclass(frozen=True)
class Several(Rotated):
    """Send some neighbouring chunks."""

    count: int = 2

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return (self.count * (rank + self.offset)) % num_chunks, rank * 0 + self.count


@dataclass(frozen=True)
class All(Several):
    """Derived again, with a kind of its own."""

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return rank * 0 + self.offset % num_chunks, rank * 0 + num_chunks

    def alike(self) -> Chunks:
        return All(0)


def test_a_rule_derived_from_another_is_priced_as_itself() -> None:
    """It was priced as the rule that it is derived from: half the bytes."""
    ring = build("allreduce", "ring", 4)
    double = replace(
        ring,
        num_chunks=8,
        rounds=tuple(
            replace(round, chunks=Several(round.chunks.offset))  # type: ignore[attr-defined]
            for round in ring.rounds
        ),
    )
    verify(double)
    nbytes = 4 * 8 * 1000
    assert price(double, nbytes, FLAT).bytes_sent == price(ring, nbytes, FLAT).bytes_sent
    assert price(double, nbytes, FLAT).priced == len(ring.rounds)
    assert All(1).alike() == All(0) and Rotated(1).alike() == Rotated(0)


@dataclass(frozen=True)
class Listless(Shift):
    """Not hashable, for its field."""

    by: list[int]  # type: ignore[assignment]


class Branching(Shift):
    """Not for arrays."""

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return rank + 1 if rank + 1 < size else 0


def test_rules_that_cannot_be_remembered_or_evaluated_are_named() -> None:
    ring = build("allreduce", "ring", 4)
    for rule, text in (
        (Branching(1), "round 3: Branching.dst cannot be evaluated at an array of 4 ranks "),
        (Listless([1, 2]), "round 3: the rule Listless cannot be hashed (unhashable type: 'list')"),
    ):
        rounds = list(ring.rounds)
        rounds[3] = replace(rounds[3], peers=rule)
        for judge in (verify, lambda schedule: price(schedule, 64, FLAT)):
            with pytest.raises(ScheduleError) as caught:
                judge(replace(ring, rounds=tuple(rounds)))
            assert str(caught.value).startswith(text) and caught.value.round == 3


@dataclass(frozen=True)
class Shy(Spoke):
    """Say of a few ranks alone that they take part."""

    told: tuple[int, ...] = (0,)

    def members(self, size: int) -> npt.NDArray[np.int64]:
        return self.told  # type: ignore[return-value]


@dataclass(frozen=True)
class Widened(Spoke):
    """Not for few, and does not say so."""

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return (rank + self.step) % size

    def src(self, rank: Ranks, size: int) -> Ranks:
        return (rank - self.step) % size


def test_members_are_all_that_take_part() -> None:
    assert Spoke(3, 6).members(8).tolist() == [1, 6] == Reverse(Spoke(3, 6)).members(8).tolist()
    assert Widened(1, 0).members(4).tolist() == [0, 1, 2, 3] == Shift(1).members(4).tolist()
    star = build("broadcast", "pairwise", 4)
    rounds = tuple(replace(star.rounds[k], peers=Shy(k + 1, 0)) for k in range(3))
    with pytest.raises(ScheduleError, match="takes part, and is none of the members of Shy") as no:
        verify(replace(star, rounds=rounds))
    assert (no.value.round, no.value.rank) == (0, 1)
    for told in ((0, 4), (1, 0), (0, 0), (0.5,), ((0, 1),)):
        worse = replace(star.rounds[0], peers=Shy(1, 0, told))  # type: ignore[arg-type]
        with pytest.raises(ScheduleError, match=r"round 0: the members of Shy are .* in order"):
            verify(replace(star, rounds=(worse, *star.rounds[1:])))


@pytest.mark.parametrize("name, sent", [("reduce", 400_000), ("gather", 40)])
def test_many_ranks_that_meet_one_are_priced_by_who_takes_part(name: str, sent: int) -> None:
    found = price(build(name, "pairwise", 10_000), 400_000, FLAT)
    assert (found.rounds, found.bytes_sent) == (9_999, sent)
    assert found.seconds == pytest.approx(9_999 * (LATENCY + sent / BANDWIDTH))


def test_a_hundred_thousand_ranks_are_priced_from_two_rounds() -> None:
    found = price(build("allreduce", "ring", 100_000), 1 << 30, FLAT)
    assert (found.rounds, found.priced) == (199_998, 2)


def test_pairwise_is_priced_from_two_rounds_as_well() -> None:
    found = price(build("allreduce", "pairwise", 20_000), 1 << 30, FLAT)
    assert (found.rounds, found.priced) == (39_998, 2)
    ring = price(build("allreduce", "ring", 20_000), 1 << 30, FLAT)
    assert found.seconds == pytest.approx(ring.seconds) and found.bytes_sent == ring.bytes_sent


@dataclass(frozen=True)
class ItsOwnKind(Peers):
    """Do what another rule does, like no other."""

    of: Peers

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return self.of.dst(rank, size)

    def src(self, rank: Ranks, size: int) -> Ranks:
        return self.of.src(rank, size)


@pytest.mark.parametrize("name", BUILDERS, ids=":".join)
def test_rounds_that_are_alike_cost_the_same(name: tuple[str, str]) -> None:
    for size in (2, 5, 8):
        schedule = build(*name, size, size - 1 if COLLECTIVES[name[0]].rooted else 0)
        one_by_one = replace(
            schedule,
            rounds=tuple(
                replace(round, peers=ItsOwnKind(round.peers)) for round in schedule.rounds
            ),
        )
        for cluster in (ADDING, Cluster(FLAT.inter, Link(1e-6, 100e9), ranks_per_node=2)):
            found, right = (price(one, 4000 * size, cluster) for one in (schedule, one_by_one))
            assert found.seconds == pytest.approx(right.seconds)
            assert (found.rounds, found.bytes_sent) == (right.rounds, right.bytes_sent)
    assert ItsOwnKind(Shift(2)).alike() == ItsOwnKind(Shift(2))
    assert Branching(2).alike() == Branching(2) and Shift(2).alike() == Shift(1)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Link(-1, 1), "latency"),
        (lambda: Link(0, 0), "bandwidth"),
        (lambda: Cluster(Link(0, 1), ranks_per_node=0), "ranks_per_node"),
        (lambda: Cluster(Link(0, 1), reduce_bandwidth=0), "reduce_bandwidth"),
        (
            lambda: Cluster(Link(0, 1), ranks_per_node=2, nodes=PAIRS),
            "nodes or ranks_per_node",
        ),
        (
            lambda: price(build("barrier", "dissemination", 2), 0, replace(FLAT, nodes=PAIRS)),
            "the nodes hold 4 ranks, the schedule is for 2",
        ),
        (lambda: price(build("barrier", "dissemination", 2), -1, FLAT), "nbytes"),
        (lambda: price(build("allreduce", "ring", 2), 8, FLAT, itemsize=0), "itemsize >= 1"),
    ],
)
def test_impossible_numbers_are_refused(make: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()  # type: ignore[operator]
