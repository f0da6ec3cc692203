"""Schedules in two levels: proven for any node groups, and cheaper where cards are shared."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfold.comm.algorithms import build
from ringfold.comm.algorithms.butterfly import halving_reduce_scatter
from ringfold.comm.algorithms.hierarchical import hierarchical_allreduce
from ringfold.comm.algorithms.ring import ring_allgather, ring_allreduce, ring_reduce_scatter
from ringfold.comm.algorithms.tree import tree_broadcast, tree_reduce
from ringfold.comm.collective import ALLREDUCE
from ringfold.comm.cost import price
from ringfold.comm.errors import ScheduleError
from ringfold.comm.evaluation import draw, moves
from ringfold.comm.listed import side_by_side
from ringfold.comm.nesting import AcrossChunks, InsideChunks, nest, nest_broadcast
from ringfold.comm.places import among, renumber
from ringfold.comm.schedule import Rotated, Schedule
from ringfold.comm.topology import Cluster, Link, Nodes
from ringfold.comm.transform import compose
from ringfold.comm.verify import verify

ROOTED = ("broadcast", "reduce")


def all_schedules(nodes: Nodes) -> list[Schedule]:
    roots = sorted({0, nodes.size // 2, nodes.size - 1})
    return [
        build("allreduce", "hierarchical", nodes.size, nodes=nodes),
        *(build(name, "hierarchical", nodes.size, r, nodes) for name in ROOTED for r in roots),
    ]


@pytest.mark.parametrize("num_nodes", range(1, 7))
@pytest.mark.parametrize("width", range(1, 6))
def test_equal_nodes_are_proven_side_by_side_and_interleaved(num_nodes: int, width: int) -> None:
    size = num_nodes * width
    blocks = Nodes.blocks(size, width)
    interleaved = Nodes.labelled([rank % num_nodes for rank in range(size)])
    for nodes in (blocks, interleaved):
        assert nodes.width == width and len(nodes.members) == num_nodes
        for schedule in all_schedules(nodes):
            verify(schedule)
        allreduce = build("allreduce", "hierarchical", size, nodes=nodes)
        assert len(allreduce.rounds) == 2 * (width - 1) + 2 * (num_nodes - 1)


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=14))
def test_any_node_groups_are_proven(labels: list[int]) -> None:
    for schedule in all_schedules(Nodes.labelled(labels)):
        verify(schedule)


def leaving(schedule: Schedule, nodes: Nodes) -> int:
    """Return the chunks that the busiest node sends to other nodes in all rounds."""
    node_of = np.empty(nodes.size, dtype=np.int64)
    for index, members in enumerate(nodes.members):
        node_of[list(members)] = index
    sent = np.zeros(len(nodes.members), dtype=np.int64)
    for round in schedule.rounds:
        step = moves(round, schedule.size, schedule.num_chunks)
        leaves = node_of[step.src] != node_of[step.dst]
        np.add.at(sent, node_of[step.src][leaves], step.length[leaves])
    return int(sent.max())


@given(labels=st.lists(st.integers(0, 3), min_size=2, max_size=12))
def test_a_node_sends_each_byte_as_often_as_one_rank_would(labels: list[int]) -> None:
    """2 n (N - 1) / N leave a node, however many ranks it holds and in what order."""
    nodes = Nodes.labelled(labels)
    count = len(nodes.members)
    schedule = build("allreduce", "hierarchical", nodes.size, nodes=nodes)
    assert leaving(schedule, nodes) * count == 2 * (count - 1) * schedule.num_chunks
    for name in ROOTED:
        schedule = build(name, "hierarchical", nodes.size, nodes=nodes)
        assert leaving(schedule, nodes) == (schedule.num_chunks if count > 1 else 0)


def test_interleaved_ranks_cost_the_flat_ring_a_card_each() -> None:
    nodes = Nodes.labelled([0, 1] * 4)
    ring = ring_allreduce(8)
    assert leaving(ring, nodes) == 4 * 14 and ring.num_chunks == 8  # 7 n
    ours = build("allreduce", "hierarchical", 8, nodes=nodes)
    assert leaving(ours, nodes) == ours.num_chunks  # n


@pytest.mark.parametrize("num_nodes, width", [(2, 2), (2, 8), (3, 4), (16, 8)])
def test_the_allreduce_costs_its_formula_and_wins_over_the_flat_ring(
    num_nodes: int, width: int
) -> None:
    latency, bandwidth, inside_latency, inside = 5e-6, 25e9, 1e-6, 100e9
    size = num_nodes * width
    nbytes = 4 * size * 1000
    cluster = Cluster(Link(latency, bandwidth), Link(inside_latency, inside), width)
    ours = build("allreduce", "hierarchical", size, nodes=Nodes.blocks(size, width))
    within = 2 * (width - 1) * (inside_latency + nbytes / width / inside)
    between = 2 * (num_nodes - 1) * (latency + nbytes / num_nodes / bandwidth)
    found = price(ours, nbytes, cluster)
    assert found.seconds == pytest.approx(within + between)
    assert found.bytes_sent == 2 * nbytes * (size - 1) // size
    assert found.seconds < price(ring_allreduce(size), nbytes, cluster).seconds


def test_a_hundred_thousand_ranks_are_priced_from_four_rounds() -> None:
    nodes = Nodes.blocks(100_000, 8)
    schedule = build("allreduce", "hierarchical", nodes.size, nodes=nodes)
    found = price(schedule, 1 << 30, Cluster(Link(5e-6, 25e9), ranks_per_node=8))
    assert (found.rounds, found.priced) == (2 * 7 + 2 * 12_499, 4)


@pytest.mark.parametrize(
    ("nodes", "priced"),
    [
        (Nodes.blocks(30_000, 7), 2 * 3 + 2),  # the last one holds five
        (Nodes.labelled([rank % 12_500 for rank in range(100_000)]), 4),
    ],
    ids=["unequal", "interleaved"],
)
def test_they_are_priced_as_soon_where_ranks_are_not_neighbours_or_nodes_unequal(
    nodes: Nodes, priced: int
) -> None:
    """Tables of all ranks for each of 8,582 rounds filled the memory."""
    schedule = build("allreduce", "hierarchical", nodes.size, nodes=nodes)
    assert price(schedule, 1 << 30, Cluster(Link(5e-6, 25e9), nodes=nodes)).priced == priced


def test_two_nodes_of_two_are_as_drawn() -> None:
    lines = [line.strip() for line in (hierarchical_allreduce.__doc__ or "").splitlines()]
    drawn = "\n".join(line for line in lines if ">" in line)
    assert draw(hierarchical_allreduce(4, Nodes.blocks(4, 2))) == drawn != ""


def test_unequal_nodes_send_a_leader_each() -> None:
    assert draw(hierarchical_allreduce(3, Nodes.labelled([7, 9, 7]))) == "\n".join(
        ["0: 2>0:0..1+", "1: 0>1:0+ 1>0:1+", "2: 0>1:1 1>0:0", "3: 0>2:0..1"]
    )


def test_what_a_lane_has_a_place_for_is_priced() -> None:
    """The round that stood for another in a price wrapped around, and so was refused."""
    between = compose(halving_reduce_scatter(5), ring_allgather(5))
    nested = nest(ring_reduce_scatter(2), between, ring_allgather(2))
    verify(nested)
    flat = price(between, 2000, Cluster(Link(1e-6, 1e9)))
    within = price(ring_reduce_scatter(2), 4000, Cluster(Link(1e-6, 1e9)))
    found = price(nested, 4000, Cluster(Link(1e-6, 1e9)))
    assert found.seconds == pytest.approx(flat.seconds + 2 * within.seconds)
    assert found.bytes_sent == flat.bytes_sent + 2 * within.bytes_sent


def test_a_nested_schedule_on_finer_chunks_claims_its_own_lengths() -> None:
    """A price looks at what is called alike, and that is counted in the same chunks."""
    halves = InsideChunks(Rotated(0), 2, 2, 2).span(np.arange(4), 4, 4)
    assert [found.tolist() for found in halves] == [[0, 2, 0, 2], [2] * 4]
    fine = AcrossChunks(Rotated(1), width=2, num_flat=2, scale=3, stride=6)
    first, length = fine.span(np.arange(4), 4, 12)
    assert (first.tolist(), length.tolist()) == ([3, 9, 0, 6], [3] * 4)
    assert fine.alike().span(np.arange(4), 4, 12)[1].tolist() == [3] * 4


def test_some_ranks_of_a_group_run_a_schedule_on_finer_chunks() -> None:
    """Its chunks are runs of theirs, with formulas as with tables; the others sit it out."""
    flat, ranks = ring_allreduce(3), (4, 1, 3)
    right = [
        sorted((ranks[src], ranks[dst], 2 * at, 2 * n) for src, dst, at, n in moves(round, 3, 3))
        for round in flat.rounds
    ]
    for rounds in (among(ranks, flat, 6), side_by_side(ALLREDUCE, 5, [(ranks, flat)], 6)):
        assert [list(moves(round, 5, 6)) for round in rounds] == right
    assert side_by_side(ALLREDUCE, 5, [], 6) == ()


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: nest(ring_reduce_scatter(2), ring_allreduce(2), ring_allgather(3)), "cannot nest"),
        (
            lambda: nest(
                ring_reduce_scatter(2),
                ring_allreduce(2),
                replace(ring_allgather(2), num_chunks=4),
            ),
            "num_chunks=2, .* does not meet .*num_chunks=4, .* in size and num_chunks",
        ),
        (
            lambda: draw(
                nest(
                    ring_reduce_scatter(2),
                    compose(ring_reduce_scatter(3), build("allgather", "recursive_doubling", 3)),
                    ring_allgather(2),
                )
            ),
            "round 5: a run of chunks that wraps around a lane's part has no place",
        ),
        (
            lambda: nest(ring_allgather(2), ring_allreduce(2), ring_allgather(2)),
            "cannot nest: .* expected a schedule for reduce_scatter in its place",
        ),
        (
            lambda: nest(ring_reduce_scatter(2), tree_broadcast(2), ring_allgather(2)),
            "expected a schedule for allreduce",
        ),
        (lambda: nest_broadcast(tree_broadcast(2), tree_reduce(2)), "a schedule for broadcast"),
        (lambda: renumber(ring_allgather(3), (1, 0, 2)), "chunks belong to ranks"),
        (
            lambda: renumber(build("alltoall", "pairwise", 3), (1, 0, 2)),
            "cannot renumber a alltoall: chunks belong to ranks",
        ),
        (lambda: renumber(ring_allreduce(3), (0, 0, 1)), r"ranks 0\.\.2 in any order, got \[0, 0"),
        (lambda: renumber(ring_allreduce(3), (0, 1)), "in any order"),
        (lambda: renumber(ring_allreduce(3), (0, 1, 7)), "in any order"),
        (lambda: renumber(ring_allreduce(3), (0, 2, 1, 1)), "3 ranks, each once"),
        (lambda: among((0, 1), ring_allreduce(3), 3), r"3 ranks, each once, got \[0, 1\]"),
        (lambda: among((4, 1, 4), ring_allreduce(3), 3), "3 ranks, each once"),
        (
            lambda: side_by_side(ALLREDUCE, 4, [((0, 1, 2), tree_reduce(2))], 1),
            "a part of 3 ranks has a schedule for 2",
        ),
        *(
            (
                lambda ranks=ranks: side_by_side(
                    ALLREDUCE, 4, [((0, 1), tree_reduce(2)), (ranks, tree_reduce(2))], 1
                ),
                r"parts of ranks 0\.\.3, each in one part at most",
            )
            for ranks in ((1, 2), (3, 3), (3, 4), (-1, 2))
        ),
        (
            lambda: side_by_side(
                ALLREDUCE, 4, [((0, 1), tree_reduce(2)), ((2, 3), tree_broadcast(2))], 1
            ),
            "both add and copy",
        ),
        (lambda: side_by_side(ALLREDUCE, 2, [((0, 1), ring_allreduce(2))], 3), "do not divide"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, text: str) -> None:
    with pytest.raises(ScheduleError, match=text):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("members", [((0, 1), (1, 2)), ((0,), (2,)), ((0, 1), ()), ((1,),)])
def test_nodes_hold_every_rank_once(members: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="exactly one node"):
        Nodes(members)


def test_nodes_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks_per_node must be 1 or more, got 0"):
        Nodes.blocks(4, 0)
    with pytest.raises(ValueError, match="the nodes hold 4 ranks, expected 6"):
        build("allreduce", "hierarchical", 6, nodes=Nodes.blocks(4, 2))


def test_nodes_say_what_they_are() -> None:
    assert str(Nodes.blocks(6, 2)) == "3 nodes of 2"
    assert str(Nodes.blocks(5, 2)) == "3 nodes of 2, 2, 1"
    assert [Nodes.blocks(*at).nested for at in ((4, 2), (4, 1), (4, 4), (5, 4))] == [
        True,
        False,
        False,
        True,
    ]
