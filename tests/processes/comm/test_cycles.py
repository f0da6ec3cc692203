"""Ranks that wait for each other in different calls are told so at once."""

import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from contract import reopened

from ringfold import Communicator, MismatchError

SECONDS = 20.0
HERE = Path(__file__).name


@pytest.fixture(autouse=True)
def several(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank waits for nobody")


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "messages"])
def test_groups_in_another_order(comm: Communicator, *, shared: bool) -> None:
    with reopened(comm, shared=shared) as world, world.split(0) as one, world.split(0, -1) as two:
        for group in (one, two):
            group.allreduce(np.ones(100))
        start = time.monotonic()
        with pytest.raises(
            MismatchError, match="ranks wait for each other, in different"
        ) as caught:
            if one.rank == 0:
                one.allreduce(np.ones(100))
            two.allreduce(np.ones(100))
            one.allreduce(np.ones(100))
        assert time.monotonic() - start < SECONDS
    text = str(caught.value)
    for group in (one, two):
        row = rf"rank \d for rank \d in {re.escape(group.name)}, in [^;]* at [^;]*{HERE}:\d+ \(#"
        assert re.search(row, text), text


def receive_first(group: Communicator, ahead: int, behind: int) -> None:
    group.recv(np.ones(9), behind)
    group.send(np.ones(9), ahead)


def send_first(group: Communicator, ahead: int, behind: int) -> None:
    large = np.ones(3_000_000)
    group.send(large, ahead)
    group.recv(large, behind)


def reduce_first(group: Communicator, ahead: int, behind: int) -> None:
    if group.rank == 0:
        group.recv(np.ones(9), 1)
    group.allreduce(np.ones(9))
    if group.rank == 1:
        group.send(np.ones(9), 0)


@pytest.mark.parametrize(
    ("calls", "shared"),
    [(receive_first, True), (send_first, False), (reduce_first, False)],
)
def test_messages(
    comm: Communicator, calls: Callable[[Communicator, int, int], None], *, shared: bool
) -> None:
    with reopened(comm, shared=shared) as group:
        ahead, behind = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        for tag in (0, 1):  # messages that came are none that may come
            work = group.isend(np.ones(9), ahead, tag)
            group.recv(np.ones(9), behind, tag)
            work.wait()
        start = time.monotonic()
        with pytest.raises(MismatchError, match=rf"wait for each other, .*{HERE}:\d+ \(#5\)"):
            calls(group, ahead, behind)
        assert time.monotonic() - start < SECONDS


def test_a_cycle_of_three(comm: Communicator) -> None:
    if comm.size < 3:
        pytest.skip("three ranks")
    with reopened(comm) as world, ExitStack() as stack:
        pairs = []
        for left in range(3):
            pair = left, (left + 1) % 3
            made = world.split(0 if world.rank in pair else None)
            if made is not None:
                pairs.append((made, pair))
                stack.enter_context(made)
                made.barrier()
        if world.rank < 3:
            pairs.sort(key=lambda pair: pair[1][0] != world.rank)  # each with the next one first
            with pytest.raises(MismatchError, match="wait for each other") as caught:
                pairs[0][0].allreduce(np.ones(10))
            assert len(re.findall(r"rank \d for rank \d", str(caught.value))) == 3
        world.barrier()


def test_one_that_has_closed_the_world_and_others_that_reduce_in_a_part(
    comm: Communicator, capfd: pytest.CaptureFixture[str]
) -> None:
    """As at the end of a program, in which a rank has one batch more."""
    with reopened(comm) as world:
        part = world.split(0)
        assert part is not None
        start = time.monotonic()
        if world.rank != 1:
            with pytest.raises(MismatchError, match=r"in close\(\)"):
                part.allreduce(np.ones(100))
        world.close()
        assert time.monotonic() - start < SECONDS
        part.close()
    assert "without the others" not in capfd.readouterr().err
