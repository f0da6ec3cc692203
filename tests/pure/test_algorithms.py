"""Built-in algorithms: proven for every size, with the rounds and bytes their docstrings say."""

import inspect
from math import ceil, log2

import pytest

from ringfold.comm.algorithms import BUILDERS, build, names
from ringfold.comm.collective import COLLECTIVES
from ringfold.comm.cost import price
from ringfold.comm.evaluation import draw
from ringfold.comm.topology import Cluster, Link
from ringfold.comm.verify import verify

SIZES = [*range(1, 34), 64]
ANY = Cluster(Link(1e-6, 1e9))


def roots(collective: str, size: int) -> list[int]:
    return sorted({0, 1 % size, size // 2, size - 1}) if COLLECTIVES[collective].rooted else [0]


@pytest.mark.parametrize("collective, algorithm", BUILDERS)
def test_is_proven_for_every_size_and_root(collective: str, algorithm: str) -> None:
    for size in SIZES:
        for root in roots(collective, size):
            proof = verify(build(collective, algorithm, size, root))
            if algorithm == "pairwise" and COLLECTIVES[collective].reduces:
                # The executor sends half-width data raw on the strength of this.
                assert proof.raw_reduce


def power(size: int) -> int:
    return 1 << (size.bit_length() - 1)


def folding(size: int) -> int:
    return 2 if power(size) != size else 0


def up(size: int) -> int:
    return ceil(log2(size)) if size > 1 else 0


def down(size: int) -> int:
    return size.bit_length() - 1


def pairs(size: int) -> int:
    """Count the nodes where neighbours in pairs share one, as build() has it by default."""
    return (size + 1) // 2


def led(size: int, n: int) -> int:
    """Return the bytes that the leader of a pair sends, where the last node holds one rank."""
    return 2 * n * (pairs(size) - 1) // pairs(size) + n if size > 1 else 0


ROUNDS = {
    "allreduce:ring": lambda p: 2 * (p - 1),
    "allreduce:recursive_doubling": lambda p: down(p) + folding(p),
    "allreduce:halving_doubling": lambda p: 2 * down(p) + folding(p),
    "allreduce:tree": lambda p: 2 * up(p),
    "allreduce:pairwise": lambda p: 2 * (p - 1),
    "allreduce:hierarchical": lambda p: 2 * pairs(p) if p > 1 else 0,
    "reduce_scatter:ring": lambda p: p - 1,
    "reduce_scatter:recursive_halving": lambda p: down(p) + folding(p),
    "reduce_scatter:pairwise": lambda p: p - 1,
    "allgather:ring": lambda p: p - 1,
    "allgather:recursive_doubling": lambda p: down(p) + folding(p),
    "allgather:pairwise": lambda p: p - 1,
    "broadcast:ring": lambda p: 2 * (p - 1),
    "broadcast:tree": up,
    "broadcast:pairwise": lambda p: p - 1,
    "broadcast:hierarchical": lambda p: 2 * pairs(p) - 1 if p > 1 else 0,
    "reduce:ring": lambda p: 2 * (p - 1),
    "reduce:tree": up,
    "reduce:pairwise": lambda p: p - 1,
    "reduce:hierarchical": lambda p: 2 * pairs(p) - 1 if p > 1 else 0,
    "gather:tree": up,
    "gather:pairwise": lambda p: p - 1,
    "scatter:tree": up,
    "scatter:pairwise": lambda p: p - 1,
    "alltoall:pairwise": lambda p: p - 1,
    "barrier:dissemination": up,
}

BYTES = {  # of a buffer of n bytes that every chunk divides, sent by the rank that sends most
    "allreduce:ring": lambda p, n: 2 * n * (p - 1) // p,
    "allreduce:recursive_doubling": lambda p, n: n * (down(p) + (folding(p) > 0)),
    "allreduce:halving_doubling": lambda p, n: (
        2 * n * (power(p) - 1) // power(p) + (n if folding(p) else 0)
    ),
    "allreduce:tree": lambda p, n: n * up(p),
    "allreduce:pairwise": lambda p, n: 2 * n * (p - 1) // p,
    "allreduce:hierarchical": lambda p, n: led(p, n) if p % 2 else 2 * n * (p - 1) // p,
    "reduce_scatter:ring": lambda p, n: n * (p - 1) // p,
    "reduce_scatter:pairwise": lambda p, n: n * (p - 1) // p,
    "allgather:ring": lambda p, n: n * (p - 1) // p,
    "allgather:pairwise": lambda p, n: n * (p - 1) // p,
    "broadcast:ring": lambda p, n: n if p > 1 else 0,
    "broadcast:tree": lambda p, n: n * up(p),
    "broadcast:pairwise": lambda p, n: n * (p - 1),
    "broadcast:hierarchical": lambda p, n: n * min(p - 1, 2),
    "reduce:ring": lambda p, n: n if p > 1 else 0,
    "reduce:tree": lambda p, n: n if p > 1 else 0,
    "reduce:pairwise": lambda p, n: n if p > 1 else 0,
    "reduce:hierarchical": lambda p, n: n if p > 1 else 0,
    "scatter:tree": lambda p, n: n * (p - 1) // p,
    "scatter:pairwise": lambda p, n: n * (p - 1) // p,
    "gather:pairwise": lambda p, n: n // p if p > 1 else 0,
    "alltoall:pairwise": lambda p, n: n * (p - 1) // (p * p),
}


@pytest.mark.parametrize("name", [f"{left}:{right}" for left, right in BUILDERS])
def test_takes_the_rounds_of_its_closed_form(name: str) -> None:
    for size in SIZES:
        schedule = build(*name.split(":"), size)
        assert len(schedule.rounds) == ROUNDS[name](size), size


@pytest.mark.parametrize("name", BYTES)
def test_sends_the_bytes_of_its_closed_form(name: str) -> None:
    for size in SIZES:
        schedule = build(*name.split(":"), size)
        nbytes = 4 * schedule.num_chunks * 3 * size
        assert price(schedule, nbytes, ANY).bytes_sent == BYTES[name](size, nbytes), size


@pytest.mark.parametrize("collective", ["reduce_scatter", "allgather"])
def test_powers_of_two_halve_and_double_the_least_bytes(collective: str) -> None:
    algorithm = names(collective)[1]
    for size in (1, 2, 4, 8, 32):
        nbytes = 4 * size
        assert price(build(collective, algorithm, size), nbytes, ANY).bytes_sent == nbytes - 4


def drawing(function: object) -> str:
    """Return the indented lines of a docstring that draw rounds."""
    lines = (inspect.getdoc(function) or "").splitlines()
    return "\n".join(line.strip() for line in lines if line.startswith("    ") and ">" in line)


def test_the_ring_is_as_drawn() -> None:
    ring = BUILDERS["allreduce", "ring"]
    assert draw(ring(3)) == drawing(ring) != ""


def test_the_fold_is_as_drawn() -> None:
    assert draw(build("allreduce", "recursive_doubling", 3)) == "\n".join(
        ["0: 0>1:0+", "1: 1>2:0+ 2>1:0+", "2: 1>0:0"]
    )
    assert draw(build("allgather", "recursive_doubling", 3)) == "\n".join(
        ["0: 0>1:0", "1: 1>2:0..1 2>1:2", "2: 1>0:1..2"]
    )


def test_the_tree_is_as_drawn() -> None:
    assert draw(build("broadcast", "tree", 5, 3)) == "\n".join(
        ["0: 3>2:0", "1: 3>0:0", "2: 0>1:0 3>4:0"]
    )
    assert draw(build("scatter", "tree", 5)) == "\n".join(
        ["0: 0>4:4", "1: 0>2:2..3", "2: 0>1:1 2>3:3"]
    )


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no algorithm 'foo' for allreduce; there is: ring, "):
        build("allreduce", "foo", 2)
    with pytest.raises(ValueError, match=r"no collective 'allsum'; there is: allreduce, "):
        build("allsum", "ring", 2)
