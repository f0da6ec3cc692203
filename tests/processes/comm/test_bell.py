"""The background thread: works end while their ranks do something else, woken by who they wait for.

Sleeps last a minute here, so a work that nobody is rung for would not end in time.
"""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from contract import data

from ringfold import Communicator
from ringfold.comm.boxes import BUFFERED_BYTES
from ringfold.comm.meeting import Meeting
from ringfold.comm.work import Work
from ringfold.kernels.meeting import advance_kernel
from ringfold.kernels.records import BellWord

LIMIT = 20.0


@pytest.fixture
def sleepers(comm: Communicator) -> Iterator[Communicator]:
    nodes = comm._nodes
    if comm.size == 1 or nodes is None or not nodes.token:
        pytest.skip("nobody meets in shared memory")
    before = nodes.bell.copy()
    nodes.bell[BellWord.SECONDS] = 60
    yield comm
    nodes.bell[:] = before
    comm.barrier()


def ends_by_itself(work: Work) -> bool:
    """Tell whether a work ends though this thread never looks after it."""
    end = time.monotonic() + LIMIT
    while not work.ended and time.monotonic() < end:
        time.sleep(1e-3)
    return work.ended


@pytest.mark.parametrize("kind", ["registered", "ordinary"])
def test_a_collective_ends_when_the_last_rank_has_come(sleepers: Communicator, kind: str) -> None:
    comm, count = sleepers, 300_001
    for turn in range(8):
        x = comm.empty(count) if kind == "registered" else np.empty(count, np.float32)
        x[:] = data(comm.rank, count, "float32")
        if turn % comm.size == comm.rank:
            time.sleep(0.02)  # the others sleep by now
        work = comm.allreduce(x, blocking=False)
        assert ends_by_itself(work)
        assert np.array_equal(work.wait(), sum(data(r, count, "float32") for r in range(comm.size)))
        comm.barrier()


def test_works_that_were_started_later_end_too(sleepers: Communicator) -> None:
    comm, count = sleepers, 100_000
    for turn in range(4):
        late = turn % comm.size == comm.rank
        works = []
        for place in range(4):
            if late:
                time.sleep(0.01)
            x = data(comm.rank, count + place, "float32")
            works.append(comm.allreduce(x, blocking=False))
        assert all(ends_by_itself(work) for work in works)
        for place, work in enumerate(works):
            right = sum(data(r, count + place, "float32") for r in range(comm.size))
            assert np.array_equal(work.wait(), right)
        comm.barrier()


@pytest.mark.parametrize("late", ["sender", "receiver"])
def test_a_large_message_arrives(sleepers: Communicator, late: str) -> None:
    """Nobody does both: a rank that sleeps hears of a receive of its own a moment later."""
    comm, nbytes = sleepers, BUFFERED_BYTES + 5
    sends, peer = comm.rank % 2 == 0, comm.rank ^ 1
    for _ in range(3):
        if peer < comm.size:
            if sends == (late == "sender"):
                time.sleep(0.02)
            if sends:
                work = comm.isend(data(comm.rank, nbytes, "uint8"), peer)
            else:
                work = comm.irecv(np.zeros(nbytes, np.uint8), peer)
            assert ends_by_itself(work)
            assert sends or np.array_equal(work.wait(), data(peer, nbytes, "uint8"))
        comm.barrier()


def test_a_look_at_a_work_that_is_started_again_changes_nothing(comm: Communicator) -> None:
    """As the background thread does that slept while the work ended and was started once more."""
    x = comm.empty(4099)
    reduce = comm.plan("allreduce", x)
    meeting = getattr(reduce, "args", (None,))[0]
    if not isinstance(meeting, Meeting):
        pytest.skip("nobody meets in shared memory")
    look, stop = advance_kernel(), threading.Event()

    def keep_looking() -> None:
        while not stop.is_set():
            look(meeting.address)

    looker = threading.Thread(target=keep_looking)
    looker.start()
    try:
        for turn in range(200):
            x[:] = data(comm.rank, x.size, "float32") + turn
            reduce()
            right = sum(data(r, x.size, "float32") + turn for r in range(comm.size))
            wrong = int((x != right).sum())
            assert wrong == 0, f"{wrong} elements of turn {turn}"
    finally:
        stop.set()
        looker.join()
