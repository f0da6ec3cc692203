"""Fitting the model's numbers, keeping them, and choosing by them."""

from contextvars import ContextVar
from dataclasses import replace

import numpy as np
import pytest

from ringfold import run_local
from ringfold.comm import cost, tune
from ringfold.comm.algorithms import build, names
from ringfold.comm.cost import price
from ringfold.comm.dtypes import DTYPES
from ringfold.comm.select import ANY, choose, priced
from ringfold.comm.topology import Cluster, Link, Nodes
from ringfold.comm.tune import Fitted, Machine, Tuning, costs, parse

LINK = Fitted(4, 2e-6, 5e9, 8e9, 0.1)
TABLE = Tuning(Machine.here("some MPI 1.0"), LINK, None, "2026-01-31")
F32 = DTYPES["float32"]


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_the_model_is_linear_in_its_three_numbers(size):
    cluster = Cluster(Link(3e-6, 4e9), reduce_bandwidth=7e9)
    for algorithm in tune.ALGORITHMS:
        for nbytes in tune.NBYTES:
            rounds, sent, added = costs(algorithm, size, nbytes)
            whole = price(build("allreduce", algorithm, size), nbytes, cluster).seconds
            assert rounds * 3e-6 + sent / 4e9 + added / 7e9 == pytest.approx(whole)


def test_a_fit_finds_the_numbers_that_made_the_times(monkeypatch):
    class Group:
        size = 4

    def simulated(comm, algorithm, nbytes, repeats):
        rounds, sent, added = costs(algorithm, 4, nbytes)
        return rounds * 2e-6 + sent / 5e9 + added / 8e9

    monkeypatch.setattr(tune, "_time", simulated)
    found = tune.fit(Group(), 1)
    assert found.latency == pytest.approx(2e-6)
    assert found.bandwidth == pytest.approx(5e9)
    assert found.reduce_bandwidth == pytest.approx(8e9)
    assert found.error < 1e-6


def test_what_would_be_negative_is_nothing():
    a = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(tune._nonnegative(a, np.array([1.0, -1.0, 0.0])), [0.5, 0.0])
    np.testing.assert_allclose(tune._nonnegative(a[:, ::-1], np.array([1.0, -1, 0])), [0.0, 0.5])
    np.testing.assert_allclose(tune._nonnegative(a, -np.ones(3)), [0.0, 0.0])


def test_a_table_comes_back_as_it_was():
    assert parse(TABLE.text(), "some MPI 1.0") == TABLE
    both = replace(TABLE, inter=LINK)
    assert parse(both.text(), "some MPI 1.0") == both


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"version": 2}',
        TABLE.text()[:-40],
        TABLE.text().replace("5000", "-5000"),
        TABLE.text().replace("5000", "9" * 400),
        TABLE.text().replace("5000000000.0", "Infinity"),
        "[" * 100_000,
    ],
)
def test_a_damaged_table_is_refused(text):
    with pytest.raises(ValueError, match="it is damaged"):
        parse(text, "some MPI 1.0")


class Placed:
    """A communicator whose ranks lie on the nodes that they are told."""

    def __init__(self, comm, labels):
        self._comm = comm
        self.node = comm.split(labels[comm.rank])

    def __getattr__(self, name):
        return getattr(self._comm, name)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 1, 0, 1, 1], [0, 1]], ids=str)
def test_one_rank_of_each_node_measures_the_link_between_them(labels, monkeypatch):
    """All ranks did at once, and told a share of their card, which a price shares again."""
    bandwidths = {"within": 5e10, "across": 1e9}
    measured = []

    def fit(group, repeats):
        who = group.allgather(np.array([world.get()])).ravel().tolist()
        way = "within" if len({labels[rank] for rank in who}) == 1 else "across"
        measured.append((way, tuple(who)))
        return replace(LINK, ranks=group.size, bandwidth=bandwidths[way])

    def main(comm):
        world.set(comm.rank)
        return tune.measure(Placed(comm, labels), 1)

    world = ContextVar("rank")
    monkeypatch.setattr(tune, "fit", fit)
    tables = run_local(len(labels), main)
    nodes = Nodes.labelled(labels)
    leaders = tuple(node[0] for node in nodes.members)
    assert {who for way, who in measured if way == "across"} == {leaders}
    assert {who for way, who in measured if way == "within"} == {
        node for node in nodes.members if len(node) > 1
    }
    assert tables == [tables[0]] * len(labels)
    assert (tables[0].inter.ranks, tables[0].inter.bandwidth) == (len(leaders), 1e9)


def test_a_table_that_cannot_be_read_is_ignored(capfd):
    """As where HOME is another user's; here neither root nor anybody may."""

    class Unreadable:
        def is_file(self):
            raise PermissionError(13, "Permission denied", str(self))

        def __str__(self):
            return "/there/tuning.json"

    def main(comm):
        return tune.load(comm, Unreadable(), "some MPI 1.0")

    assert run_local(2, main) == [None, None]
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("ringfold: /there/tuning.json is ignored: [Errno 13] Permission")


def test_a_machine_tells_its_processor():
    processor = Machine.here("some MPI 1.0").processor
    assert len(processor) > 1 and processor == processor.strip()


def test_another_machines_table_is_refused():
    with pytest.raises(ValueError, match=r"another machine.*some MPI 1.0.*other MPI"):
        parse(TABLE.text(), "other MPI")


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("collective", ["allreduce", "reduce_scatter", "allgather", "broadcast"])
def test_the_cheapest_is_chosen(collective, size):
    cluster = TABLE.cluster(None)
    rows = priced(collective, size, cluster)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    for nbytes in (1, 4096, 1 << 20, 1 << 30):
        algorithm, reason = choose(collective, nbytes, F32, None, size, TABLE)
        seconds = price(build(collective, algorithm, size), nbytes, cluster).seconds
        for other in ("ring", "pairwise"):
            assert seconds <= price(build(collective, other, size), nbytes, cluster).seconds * 1.01
        assert reason.startswith(f"tuned on 2026-01-31: {algorithm}")


def test_without_the_links_of_a_group_the_default_is_taken():
    nodes = Nodes.blocks(4, 2)
    assert "default table" in choose("allreduce", 8, F32, nodes, 4, TABLE)[1]
    assert "tuned" in choose("allreduce", 8, F32, nodes, 4, replace(TABLE, inter=LINK))[1]
    assert "default table" in choose("allreduce", 8, F32, None, 1 << 17, TABLE)[1]


@pytest.mark.parametrize(
    "labels",
    [[0, 1, 2, 3] * 8, [0] + [1] * 7, [0] * 2 + [1] * 6, [0, 0, 0, 0, 1, 1, 2, 2]],
    ids=["round robin", "1 and 7", "2 and 6", "4, 2 and 2"],
)
def test_the_cheapest_is_chosen_where_ranks_lie(labels):
    """On nodes of ranks that are no neighbours it was up to 16 times as slow as the best."""
    nodes = Nodes.labelled(labels)
    table = replace(
        TABLE, intra=Fitted(4, 5e-7, 1e10, 1e11, 0), inter=Fitted(2, 5e-6, 1e9, 1e11, 0)
    )
    cluster = Cluster(Link(5e-6, 1e9), Link(5e-7, 1e10), reduce_bandwidth=1e11, nodes=nodes)
    for collective in ("allreduce", "broadcast"):
        schedules = {
            name: build(collective, name, nodes.size, 0, nodes) for name in names(collective)
        }
        for nbytes in (1 << 10, 1 << 16, 1 << 20, 1 << 26):
            seconds = {
                name: price(schedule, nbytes, cluster).seconds
                for name, schedule in schedules.items()
            }
            algorithm, _ = choose(collective, nbytes, F32, nodes, nodes.size, table)
            assert seconds[algorithm] == pytest.approx(min(seconds.values()))


def test_a_table_is_priced_from_each_kind_of_round_once(monkeypatch):
    """Of 1024 ranks, the first choice took 2 to 6 s: rounds were evaluated for each of 31 sizes."""
    evaluated = []
    moves = cost.moves
    monkeypatch.setattr(cost, "moves", lambda *given: [evaluated.append(given), moves(*given)][1])
    cluster = Cluster(Link(3e-6, 4e9), Link(5e-7, 1e10), nodes=Nodes.blocks(24, 4))
    for collective in ("allreduce", "reduce"):
        schedules = [build(collective, name, 24, 0, cluster.nodes) for name in names(collective)]
        evaluated.clear()
        priced.__wrapped__(collective, 24, cluster)
        assert len(evaluated) == sum(len(cost.kinds(one, cluster)) for one in schedules)
    evaluated.clear()
    assert priced.__wrapped__("alltoall", 24, cluster) == ((ANY, "pairwise"),)
    assert evaluated == []  # there is one algorithm
