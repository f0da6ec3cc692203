"""Ranks that call different things: every one of them is told what each called, and where."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from contract import guarded, reopened

from ringfold import Communicator, MismatchError
from ringfold.comm.algorithms import build

SECONDS = 5.0
HERE = Path(__file__).name


@pytest.fixture(scope="module", params=["shared", "messages"])
def group(comm: Communicator, request: pytest.FixtureRequest) -> Iterator[Communicator]:
    """The ranks over shared memory, and over messages."""
    if request.param == "shared":
        compile_what_is_timed(comm)
        yield comm
    else:
        with reopened(comm, shared=False) as messages:
            compile_what_is_timed(messages)
            yield messages


def compile_what_is_timed(comm: Communicator) -> None:
    for dtype in (np.float32, np.float64, np.int64):
        for op in ("sum", "max"):
            comm.allreduce(np.ones(100_000, dtype), op)


def lengths(comm: Communicator, odd: bool) -> None:
    with guarded(np.ones(5 + odd)) as x:
        comm.allreduce(x)


def lengths_by_little(comm: Communicator, odd: bool) -> None:
    with guarded(np.ones(100_000 - 2 * odd, np.float32)) as x:
        comm.allreduce(x)


def lengths_by_a_line(comm: Communicator, odd: bool) -> None:
    with guarded(np.ones(4096 - 6 * odd, np.float32)) as x:
        comm.allreduce(x)


def dtypes(comm: Communicator, odd: bool) -> None:
    comm.allreduce(np.ones(5, np.int64 if odd else np.float64))


def ops(comm: Communicator, odd: bool) -> None:
    comm.allreduce(np.ones(5), "max" if odd else "sum")


def root(comm: Communicator, odd: bool) -> None:
    comm.reduce(np.ones(5), root=int(odd))
    comm.barrier()


def roots_of_scatter(comm: Communicator, odd: bool) -> None:
    comm.scatter(np.ones((comm.size, 3)), root=comm.rank if odd else 0)
    comm.barrier()


def roots_by_name(comm: Communicator, odd: bool) -> None:
    comm.broadcast(np.ones(3), root=comm.rank if odd else 0, algorithm="tree")
    comm.barrier()


def order(comm: Communicator, odd: bool) -> None:
    if odd:
        comm.allgather(np.ones(3))
    comm.allreduce(np.ones(3))
    if not odd:
        comm.allgather(np.ones(3))


def missing(comm: Communicator, odd: bool) -> None:
    if not odd:
        comm.allreduce(np.ones(3))
    comm.barrier()


def parts(comm: Communicator, odd: bool) -> None:
    if odd:
        comm.allreduce(np.ones(3))
    else:
        comm.split(0)


def equal_in_all(comm: Communicator, odd: bool) -> None:
    works = [comm.allreduce(np.ones(n), blocking=False) for n in ((5, 3) if odd else (3, 5))]
    for work in works:
        work.wait()


def algorithms(comm: Communicator, odd: bool) -> None:
    comm.allreduce(np.ones(5), algorithm="ring" if odd else "tree")


def algorithm_of_one(comm: Communicator, odd: bool) -> None:
    comm.allreduce(np.ones(5), algorithm="ring" if odd else None)


def schedules(comm: Communicator, odd: bool) -> None:
    schedule = build("allreduce", "ring" if odd else "tree", comm.size)
    comm.allreduce(np.ones(5), algorithm=schedule)


CASES: dict[Callable[[Communicator, bool], None], tuple[str, str]] = {
    lengths: ("allreduce(sum, float64), 5 elements", "allreduce(sum, float64), 6 elements"),
    lengths_by_a_line: ("4096 elements", "4090 elements"),
    lengths_by_little: ("100000 elements", "99998 elements"),
    dtypes: ("allreduce(sum, float64)", "allreduce(sum, int64)"),
    ops: ("allreduce(sum, float64)", "allreduce(max, float64)"),
    root: ("root 0", "root 1"),
    roots_of_scatter: ("root 0", ", root "),
    roots_by_name: ("root 0", ", root "),
    order: ("allreduce(sum, float64)", "allgather(float64)"),
    missing: ("allreduce(sum, float64)", "barrier()"),
    parts: ("split()", "allreduce(sum, float64)"),
    equal_in_all: ("3 elements", "5 elements"),
    algorithms: ("5 elements, algorithm tree", "5 elements, algorithm ring"),
    schedules: ("5 elements, algorithm schedule ", "5 elements, algorithm schedule "),
    algorithm_of_one: ("5 elements, algorithm ", "5 elements, algorithm ring"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_rank_is_told_what_each_called(group: Communicator, case) -> None:
    if group.size == 1:
        pytest.skip("a rank agrees with itself")
    part = group.split(0)
    assert part is not None
    odd = part.rank == part.size - 1
    start = time.monotonic()
    with pytest.raises(MismatchError) as caught:
        case(part, odd)
    assert time.monotonic() - start < SECONDS
    text = str(caught.value)
    rows = re.findall(rf"rank (\d): ([^;]*), at \S*{HERE}:(\d+)", text)
    assert [int(rank) for rank, _, _ in rows] == list(range(part.size)), text
    most, other = CASES[case]
    assert all(most in row for _, row, _ in rows[:-1]), text
    assert other in rows[-1][1], text
    lines = [int(line) for _, _, line in rows]
    assert all(first == second for first, second in pairwise(lines[:-1])), text
    # All go on, in a group of their own.
    fresh = group.split(0)
    assert fresh is not None
    assert fresh.allreduce(np.array([1.0]))[0] == group.size
    fresh.close()


def test_a_group_goes_on_after_a_call_that_all_were_told_of(group: Communicator) -> None:
    if group.size == 1:
        pytest.skip("a rank agrees with itself")
    part = group.split(0)
    assert part is not None
    for odd_one in range(part.size):
        with pytest.raises(MismatchError):
            part.allreduce(np.ones(3 + (part.rank == odd_one)))
        assert part.allreduce(np.array([1.0]))[0] == part.size
    part.close()


def test_a_group_goes_on_after_calls_in_which_nobody_waited(group: Communicator) -> None:
    """Each rank scattered as the root of its own: nobody was ever told, in shared memory either."""
    part = group.split(0)
    assert part is not None
    rows = np.full((part.size, 3), part.rank)
    for _ in range(2 * (part.size > 1)):
        part.scatter(rows, root=part.rank, algorithm="tree")
        with pytest.raises(MismatchError, match=f"scatter.*root {part.size - 1}"):
            part.allreduce(np.ones(3))
        assert part.scatter(rows, root=0)[0] == 0
        assert part.allreduce(np.array([1.0]))[0] == part.size
    part.close()


def test_works_in_flight_behind_calls_in_which_nobody_waited(group: Communicator) -> None:
    """Each call tells what was called since the one before; in shared memory the first one does."""
    part = group.split(0)
    assert part is not None
    if part.size > 1:
        part.scatter(np.ones((part.size, 3)), root=part.rank, algorithm="tree")
        works = [part.allreduce(np.ones(3), blocking=False) for _ in range(3)]
        with pytest.raises(MismatchError):
            works[0].wait()
        with suppress(MismatchError):  # by messages they are behind it
            works[2].wait()
        assert part.allreduce(np.array([1.0]))[0] == part.size
        assert part.scatter(np.ones((part.size, 3)), root=0)[0] == 1
    part.close()


def test_ranks_that_have_lost_count_split_a_fresh_group(group: Communicator) -> None:
    if group.size == 1:
        pytest.skip("a rank agrees with itself")
    part = group.split(0)
    assert part is not None
    odd = part.rank == part.size - 1
    with pytest.raises(MismatchError):
        missing(part, odd)
    fresh = part.split(0)
    assert fresh is not None
    assert fresh.allreduce(np.array([1.0]))[0] == group.size
    fresh.close()


def test_the_texts_are_one(group: Communicator) -> None:
    if group.size == 1:
        pytest.skip("a rank agrees with itself")
    part = group.split(0)
    assert part is not None
    with pytest.raises(MismatchError) as caught:
        part.allreduce(np.ones(3 + part.rank))
    text = np.zeros(2000, np.uint8)
    encoded = str(caught.value).encode()
    text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    rows = group.allgather(text)
    assert (rows == rows[0]).all()
    part.close()


def test_a_call_that_was_refused_on_all_ranks_is_not_refused_again(group: Communicator) -> None:
    """A rank that had to wait for 0.3 s afterwards heard of the earlier call from the others."""
    part = group.split(0)
    assert part is not None
    if part.size > 1:
        with pytest.raises(MismatchError):
            lengths(part, part.rank == part.size - 1)
        if part.rank == 0:
            time.sleep(0.6)
        assert part.allreduce(np.ones(3))[0] == part.size
    part.close()
