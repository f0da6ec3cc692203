"""docs/algorithms.md says what the schedules do."""

from fractions import Fraction
from pathlib import Path

import pytest

from ringfold.comm.algorithms import BUILDERS, build
from ringfold.comm.cost import price
from ringfold.comm.topology import Cluster, Link

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
