"""Who asks a work again and again, and never waits, learns all that a waiting rank does."""

import time
from typing import Any

import numpy as np
import pytest

from ringfold import (
    CommError,
    CommTimeout,
    Communicator,
    MismatchError,
    PeerLost,
    Work,
    run_local,
)
from ringfold.comm.draining import drain


def polled(work: Work) -> Any:
    """Return what ended a work, without ever waiting for it."""
    end = time.monotonic() + 20
    while not work.done():
        assert time.monotonic() < end, "nobody told who asked"
        time.sleep(0.001)
    return work.exception()


def test_a_peer_that_is_gone_ends_a_work_that_is_polled() -> None:
    """A master that asked its workers' receives in turn asked for ever."""

    def main(comm: Communicator) -> None:
        if comm.rank == 2:
            return
        if comm.rank == 1:
            comm.send(np.array([7.0]), 0)
            comm.recv(np.zeros(1), 0)
            return
        mine, theirs = np.zeros(1), np.zeros(1)
        lost, healthy = comm.irecv(theirs, 2), comm.irecv(mine, 1)
        error = polled(lost)
        assert isinstance(error, PeerLost) and "rank 2 is gone" in str(error)
        with pytest.raises(PeerLost, match="rank 2"):
            lost.wait()
        assert polled(healthy) is None and mine[0] == 7
        comm.send(mine, 1)

    run_local(3, main)


def test_calls_that_differ_end_a_work_that_is_polled() -> None:
    def main(comm: Communicator) -> None:
        x = np.ones(4 + comm.rank)
        errors = [polled(comm.allreduce(x, blocking=False)) if comm.rank == 0 else None]
        if comm.rank:
            with pytest.raises(MismatchError, match="the ranks' calls differ") as caught:
                comm.allreduce(x)
            errors = [caught.value]
        assert "4 elements" in str(errors[0]) and "5 elements" in str(errors[0])
        assert comm.allreduce(np.ones(3)).tolist() == [2.0] * 3

    run_local(2, main)


def test_a_poll_within_the_steps_of_works_only_asks() -> None:
    """As a signal's handler may: it must not end what is just going on."""

    def main(comm: Communicator) -> None:
        if comm.rank == 1:
            return
        work = comm.irecv(np.zeros(1), 1)
        progress = comm._progress
        progress._advancing = True
        for _ in range(4):
            time.sleep(0.06)
            assert not work.done()
        progress._advancing = False
        assert isinstance(polled(work), PeerLost)

    run_local(2, main)


def test_the_first_of_several_works() -> None:
    """One receive per rank stands for one from any source."""

    def main(comm: Communicator) -> None:
        if comm.rank:
            for turn in range(3):
                comm.recv(np.zeros(1), 0)
                comm.send(np.array([10.0 * comm.rank + turn]), 0)
            return
        got = {1: np.zeros(1), 2: np.zeros(1)}
        works = [comm.irecv(got[rank], rank) for rank in got]
        for turn, rank in [(0, 2), (0, 1), (1, 1), (2, 1), (1, 2), (2, 2)]:
            with pytest.raises(
                CommTimeout, match=r"rank 0 waited .* in vain for any of: recv .*; r"
            ):
                comm.wait_any(works, timeout=0.0)
            comm.send(np.zeros(1), rank)
            assert comm.wait_any(works) == rank - 1
            assert works[rank - 1].wait()[0] == 10 * rank + turn
            works[rank - 1] = comm.irecv(got[rank], rank)
        place = comm.wait_any(works)
        with pytest.raises(PeerLost, match=f"rank {place + 1}"):
            works[place].wait()

    run_local(3, main)


def test_several_works_that_were_waited_for_in_vain_tell_where_the_ranks_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It told what it waited for alone, and close() waited for the same works once more."""
    for module in ("several", "progress"):
        monkeypatch.setattr(f"ringfold.comm.{module}.ASKS", 0.1)
    for module in ("several", "patience"):
        monkeypatch.setattr(f"ringfold.comm.{module}.ANSWERS", 0.1)

    def main(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.recv(np.zeros(1), 0)
            return
        works = [comm.irecv(np.zeros(1), 1, tag) for tag in (1, 2)]
        with pytest.raises(CommTimeout, match=r"in vain for any of: recv .*; where the ranks"):
            comm.wait_any(works, timeout=0.2)
        with pytest.raises(CommTimeout, match=r"in recv .*; where the ranks"):
            comm.wait_any([comm.irecv(np.zeros(1), 1, 3)], timeout=0.2)
        start = time.monotonic()
        drain(comm._progress, 60, lambda work: True, "ends")
        assert time.monotonic() - start < 20
        comm.send(np.zeros(1), 1)

    run_local(2, main)


def test_several_works_with_one_that_has_ended_and_wrong_arguments() -> None:
    def main(comm: Communicator) -> None:
        done = comm.allreduce(np.ones(2), blocking=False)
        done.wait()
        assert comm.wait_any((done,)) == 0
        with pytest.raises(ValueError, match="works: expected one or more, got none"):
            comm.wait_any([])
        with pytest.raises(TypeError, match=r"works\[1\]: expected a Work"):
            comm.wait_any([done, np.ones(1)])  # type: ignore[list-item]
        with pytest.raises(ValueError, match="timeout"):
            comm.wait_any([done], timeout=float("nan"))

    run_local(1, main)


def test_a_poll_of_a_closed_group_raises_what_ended_it() -> None:
    def main(comm: Communicator) -> None:
        part = comm.split(0)
        work = part.irecv(np.zeros(1), 1 - comm.rank)
        part.close()
        assert isinstance(polled(work), CommError)

    run_local(2, main)
