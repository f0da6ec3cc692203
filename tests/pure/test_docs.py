"""docs/algorithms.md says what the schedules do."""

import re
from fractions import Fraction
from math import ceil, log2
from pathlib import Path

import pytest

from ringfold.comm.algorithms import BUILDERS, build
from ringfold.comm.cost import price
from ringfold.comm.schedule import Schedule
from ringfold.comm.topology import Cluster, Link
from ringfold.comm.verify import verify

DOCS = Path(__file__).parents[2] / "docs"


def rows() -> dict[tuple[str, str], list[str]]:
    lines = (DOCS / "algorithms.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {(row[0], row[1]): row[2:] for row in cells}


def test_every_algorithm_is_listed() -> None:
    assert list(rows()) == list(BUILDERS)


@pytest.mark.parametrize("collective, algorithm", BUILDERS)
def test_rounds_and_bytes_are_those_of_the_schedule(collective: str, algorithm: str) -> None:
    for size, cell in zip((6, 8), rows()[collective, algorithm][2:], strict=True):
        schedule = build(collective, algorithm, size)
        nbytes = 4 * schedule.num_chunks * size
        sent = price(schedule, nbytes, Cluster(Link(0, 1))).bytes_sent
        share = Fraction(sent, nbytes // size if collective == "alltoall" else nbytes)
        bytes_sent = "token" if collective == "barrier" else f"{share} n"
        assert cell == f"{len(schedule.rounds)}, {bytes_sent}"


def test_the_tables_of_a_list_of_messages_are_proven() -> None:
    block = (DOCS / "algorithms.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Schedule] = {}
    exec(block, names)
    assert verify(names["schedule"]).messages == 2


def told(cell: str, p: int) -> Fraction:
    """Return what a formula of the table says for p ranks, in n."""
    q = 1 << (p.bit_length() - 1)
    holds = {"folded": p != q, "p odd": p % 2 == 1, "p = 2": p == 2}
    formula, *cases = cell.split("; ")
    for case, other in (text.split(": ") for text in cases):
        formula = other if holds[case] else formula
    formula, *added = re.split(", (?=[+] .* folded)", formula.removeprefix("up to "))
    if added and holds["folded"]:
        formula += " " + added[0].removesuffix(" folded")
    formula = re.sub(r"log2 ([pq])", r"log2(\1)", formula)
    formula = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula)  # as in 2 n (p - 1)
    names = {"p": Fraction(p), "q": Fraction(q), "N": Fraction(ceil(p / 2)), "n": Fraction(1)}
    return Fraction(eval(formula, {"log2": log2, "ceil": ceil, "max": max, **names}))


@pytest.mark.parametrize("collective, algorithm", BUILDERS)
def test_formulas_are_those_of_the_schedules(collective: str, algorithm: str) -> None:
    """Two sizes, both even, were compared: hierarchical sends more where a node has one rank."""
    rounds, nbytes = rows()[collective, algorithm][:2]
    for size in range(2, 34):
        schedule = build(collective, algorithm, size)
        assert len(schedule.rounds) == told(rounds, size), size
        if collective == "barrier":
            continue
        n = 4 * schedule.num_chunks * size
        sent = price(schedule, n, Cluster(Link(0, 1))).bytes_sent
        share = Fraction(sent, n // size if collective == "alltoall" else n)
        least = 0 if "up to" in nbytes and size & (size - 1) else told(nbytes, size)
        assert least <= share <= told(nbytes, size), size
