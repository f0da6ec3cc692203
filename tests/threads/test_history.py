"""Calls in which ranks differ though none of them waits: the next that waits tells."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ringfold import Communicator, MismatchError, Settings, run_local
from ringfold.comm.algorithms import build
from ringfold.comm.transport.local import LocalTransport

HERE = Path(__file__).name
SOON = Settings(timeout=20)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sends end at once, as MPI's do that are small; a thread's wait for the receiver."""
    isend = LocalTransport.isend

    def sent(transport: LocalTransport, data: Any, dst: int, *args: Any) -> Any:
        isend(transport, data.copy(), dst, *args)
        return SimpleNamespace(peer=dst, done=lambda: True)

    monkeypatch.setattr(LocalTransport, "isend", sent)


def broadcast(comm: Communicator) -> None:
    comm.broadcast(np.full(3, comm.rank), root=comm.rank)


def reduce(comm: Communicator) -> None:
    comm.reduce(np.ones(3), root=(comm.rank + 1) % comm.size)


def gather(comm: Communicator) -> None:
    comm.gather(np.ones(3), root=(comm.rank + 1) % comm.size)


def scatter(comm: Communicator) -> None:
    comm.scatter(np.full((comm.size, 3), comm.rank), root=comm.rank)


def planned(comm: Communicator) -> None:
    comm.plan("broadcast", np.full(3, comm.rank), root=comm.rank)()


def algorithms(comm: Communicator) -> None:
    """Rank 0 broadcasts by another algorithm than the root of the others, who is no root to it."""
    comm.broadcast(np.ones(3), root=comm.rank, algorithm=("tree", "ring")[comm.rank % 2])


def schedules(comm: Communicator) -> None:
    schedule = build("broadcast", "tree", comm.size, root=comm.rank)
    comm.broadcast(np.ones(3), root=comm.rank, algorithm=schedule)


def in_flight(comm: Communicator) -> None:
    comm.broadcast(np.full(3, comm.rank), root=comm.rank, blocking=False).wait()


CALLS = [broadcast, reduce, gather, scatter, planned, algorithms, schedules, in_flight]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_each_rank_names_another_root(call: Callable[[Communicator], None], size: int) -> None:
    """Each rank only sent, and went on with wrong data; nobody was ever told."""

    def main(comm: Communicator) -> None:
        call(comm)
        with pytest.raises(MismatchError) as caught:
            comm.allreduce(np.ones(3))
        rows = re.findall(rf"rank (\d): [^;]*, root (\d)[^;]*, at \S*{HERE}", str(caught.value))
        assert [int(rank) for rank, _ in rows] == list(range(size)), caught.value
        assert len({root for _, root in rows}) == size
        # All were told in one call.
        x = np.full(3, comm.rank)
        assert comm.allreduce(np.ones(3))[0] == size
        assert comm.broadcast(x, root=1)[0] == 1
        assert comm.scatter(np.full((size, 3), comm.rank), root=1)[0] == 1

    run_local(size, main, settings=SOON)


def test_what_was_told_once_is_not_told_again() -> None:
    """Of several such calls the first is named, and then the group goes on, also behind waits."""

    def main(comm: Communicator) -> None:
        for _ in range(2):
            broadcast(comm)
            gather(comm)
        with pytest.raises(MismatchError, match=r"broadcast.*#\d"):
            comm.barrier()
        for late in range(2):
            time.sleep(0.5 * (comm.rank == late))  # the others tell meanwhile what they called
            assert comm.allreduce(np.ones(3))[0] == comm.size

    run_local(2, main, settings=SOON)


def test_many_works_behind_it_are_in_flight() -> None:
    """Ranks tell of all that still runs: the last calls alone were alike."""

    def main(comm: Communicator) -> None:
        broadcast(comm)
        works = [comm.allreduce(np.ones(3), blocking=False) for _ in range(20)]
        with pytest.raises(MismatchError, match=r"broadcast\(int64\), 3 elements, root 1"):
            works[-1].wait()
        assert all(isinstance(work.exception(), MismatchError) for work in works)
        assert comm.allreduce(np.ones(3))[0] == comm.size
        with pytest.raises(MismatchError):
            works[0].wait()
        assert comm.allreduce(np.ones(3))[0] == comm.size

    run_local(2, main, settings=SOON)


def test_a_rank_that_has_gone_on_tells_of_the_calls_that_it_is_asked_for() -> None:
    """It told of its last calls, which the one that waits had not made, which waited in vain."""

    def main(comm: Communicator) -> None:
        other = comm.split(0)
        assert other is not None
        comm.reduce(np.ones(3), root=1 - comm.rank)
        if comm.rank == 0:
            for _ in range(12):
                comm.broadcast(np.ones(3), root=0)
            other.recv(np.ones(3), 1)
        else:
            with pytest.raises(MismatchError, match=r"reduce.*root 1.*reduce.*root 0"):
                comm.broadcast(np.ones(3), root=0)
            other.send(np.ones(3), 0)
        other.barrier()

    run_local(2, main, settings=SOON)


def test_ranks_that_split_a_group_go_on_in_it() -> None:
    """What they have called before is given up: it may differ."""

    def main(comm: Communicator) -> None:
        broadcast(comm)
        part = comm.split(0)
        assert part is not None
        for group in (part, comm):
            assert group.allreduce(np.ones(3))[0] == comm.size
        broadcast(comm)  # and so do those that close it

    run_local(2, main, settings=SOON)
