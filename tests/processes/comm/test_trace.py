"""The ring of last operations where ranks are processes: compiled code notes, and peers read."""

import time
from inspect import currentframe
from pathlib import Path

import numpy as np
import pytest

import ringfold
from ringfold.comm.trace import State, entries_in


def test_peers_on_the_node_read_what_a_rank_did_last(comm: ringfold.Communicator):
    if comm.size == 1 or comm._nodes is None or not comm._nodes.token:
        pytest.skip("no shared memory between ranks")
    comm.allreduce(np.full(5, comm.rank, np.float32), op="max")
    comm.barrier()
    for memory in comm._nodes.traces:
        found = [entry for entry in entries_in(memory, 8) if entry.signature.elements == 5][-1]
        assert found.signature == ("allreduce", "max", "float32", 5, -1)
        assert (found.group, found.state) == ("world", State.DONE)
        assert found.site.startswith(__file__)
    comm.barrier()


@pytest.mark.parametrize("blocking", [True, False])
def test_a_call_that_waits_is_where_it_is_called_now(comm: ringfold.Communicator, blocking: bool):
    """What is known of an array brought the place with it where that was passed first."""
    if comm.size == 1:
        pytest.skip("one rank waits for nobody")
    x = np.zeros(9)
    comm.allreduce(x)
    comm.barrier()
    if comm.rank == 0:
        time.sleep(0.1)
    here = currentframe().f_lineno + 1
    work = comm.allreduce(x, blocking=blocking)
    if not blocking:
        work.wait()
    assert comm.rank == 0 or comm.recent(1)[0].site == f"{__file__}:{here}"


@pytest.mark.parametrize("flying", [False, True])
def test_a_call_that_waits_is_one_span(comm: ringfold.Communicator, tmp_path: Path, flying: bool):
    """A known call was two, one within the other, where it had to wait."""
    if comm.size == 1:
        pytest.skip("one rank waits for nobody")
    x, y = np.zeros(9), np.zeros(9)
    comm.allreduce(x)
    with ringfold.trace(comm, tmp_path / "trace.json"):
        timeline = comm._progress.timeline
        assert timeline is not None
        for waits in (False, True):
            comm.barrier()
            if waits and comm.rank == 0:
                time.sleep(0.05)
            before = comm.allreduce(y, blocking=False) if flying else None
            first = len(timeline.spans)
            comm.allreduce(x)
            assert [span.name for span in timeline.spans[first:]] in (
                [["allreduce"], []][: 1 + flying]
            )
            if before is not None:
                before.wait()


@pytest.mark.parametrize("count", [1, 3000, 100_001])
def test_a_plan_is_noted_at_every_step(comm: ringfold.Communicator, count: int):
    for x in (np.zeros(count, np.int32), comm.empty(count, np.int32)):
        step = comm.plan("allreduce", x)
        steps = 5
        for _ in range(steps):
            step()
        mine = comm.recent(steps)
        assert {entry.signature for entry in mine} == {("allreduce", "sum", "int32", count, -1)}
        sequence = [entry.sequence for entry in mine]
        assert sequence == list(range(sequence[0], sequence[0] + steps))
        ends = [0, *(entry.end for entry in mine)]
        starts = [*(entry.start for entry in mine)]
        assert all(end <= start for end, start in zip(ends, starts, strict=False))
        assert all(0 < entry.start <= entry.end for entry in mine)


def test_works_in_flight_are_running_until_they_end(comm: ringfold.Communicator):
    if comm.size == 1:
        pytest.skip("one rank waits for nobody")
    comm.barrier()
    if comm.rank == 0:
        for peer in range(1, comm.size):
            comm.recv(np.zeros(1), peer)  # rank 0 comes when all others have looked
    works = []
    if comm.rank:
        works = [comm.allreduce(np.ones(7), blocking=False) for _ in range(3)]
        assert [entry.state for entry in comm.recent(3)] == [State.RUNNING] * 3
        comm.send(np.zeros(1), 0)
    else:
        works = [comm.allreduce(np.ones(7), blocking=False) for _ in range(3)]
    for work in works:
        work.wait()
    ended = [e for e in comm.recent(8) if e.signature.operation == "allreduce"][-3:]
    assert [entry.state for entry in ended] == [State.DONE] * 3


def test_all_ranks_count_collectives_alike(comm: ringfold.Communicator):
    comm.barrier()
    last = comm.recent(1)[0]
    counts = comm.allgather(np.array([last.sequence]))
    assert (counts == last.sequence).all()
