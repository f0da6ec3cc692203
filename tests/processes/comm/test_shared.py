"""Meeting in shared memory: the contract, and what only registered memory can get wrong."""

import gc
import os
import time
from typing import Any

import contract
import numpy as np
import pytest
from contract import CHECKS, NUMBERS, data, expected, lengths, reopened
from mpi4py import MPI

import ringfold
from ringfold import CommError, CommTimeout, Communicator, MismatchError, Settings
from ringfold.comm import communicator
from ringfold.comm.fused_rows import STAGE_BYTES
from ringfold.comm.trace import State

LARGE = STAGE_BYTES // 4 * 2 + 1235


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_the_default_keeps_the_promise(comm: Communicator, name: str) -> None:
    CHECKS[name](comm, None)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_every_type_is_folded(comm: Communicator, dtype: str) -> None:
    contract.check_allreduce(comm, None, np.dtype(dtype))


def registered(comm: Communicator, values: np.ndarray) -> np.ndarray:
    x = comm.empty(values.shape, values.dtype)
    x[...] = values
    return x


@pytest.mark.parametrize("op", ["sum", "mean", "max", "prod"])
def test_registered_buffers(comm: Communicator, op: str) -> None:
    for count in (*lengths(comm.size), LARGE):
        whole = registered(comm, np.zeros(count + 34, np.float32))
        x = whole[17 : 17 + count]
        x[:] = data(comm.rank, count, np.float32)
        assert comm.allreduce(x, op) is x
        np.testing.assert_array_equal(x, expected(op, comm.size, count, np.float32))
        assert not whole[:17].any() and not whole[17 + count :].any()
        x[:] = data(comm.rank, count, np.float32)
        comm.reduce(x, comm.size - 1, op)
        last = comm.rank == comm.size - 1
        own = data(comm.rank, count, np.float32)
        np.testing.assert_array_equal(
            x, expected(op, comm.size, count, np.float32) if last else own
        )


@pytest.mark.parametrize("count", [7, 3001, LARGE])
@pytest.mark.parametrize("who", ["nobody", "rank 0", "all but rank 0", "everybody"])
def test_any_mixture_of_private_and_registered(comm: Communicator, count: int, who: str) -> None:
    is_first = comm.rank == 0
    shares = {"nobody": False, "rank 0": is_first, "all but rank 0": not is_first}.get(who, True)

    def make(values: np.ndarray) -> np.ndarray:
        return registered(comm, values) if shares else values.copy()

    values = data(comm.rank, count, np.float32)
    total = expected("sum", comm.size, count, np.float32)
    rows = np.stack([data(rank, count, np.float32) for rank in range(comm.size)])
    for _ in range(2):
        np.testing.assert_array_equal(comm.allreduce(make(values)), total)
        np.testing.assert_array_equal(comm.allgather(make(values)), rows)
        np.testing.assert_array_equal(
            comm.broadcast(make(values), comm.size - 1), data(comm.size - 1, count, np.float32)
        )
        low, high = ringfold.comm.chunks.bounds(count, comm.size, comm.rank)
        np.testing.assert_array_equal(comm.reduce_scatter(make(values)), total[low:high])
        blocks = np.stack([values + 100 * peer for peer in range(comm.size)])
        np.testing.assert_array_equal(comm.alltoall(make(blocks)), rows + 100 * comm.rank)
        gathered = comm.gather(make(values), 0)
        assert gathered is None or (gathered == rows).all()


def test_one_array_among_changing_company(comm: Communicator) -> None:
    x = comm.empty(LARGE)
    y = np.empty(LARGE, np.float32)
    for turn in range(6):
        mine = y if comm.rank == 0 and turn % 2 else x
        mine[:] = data(comm.rank, LARGE, np.float32)
        comm.allreduce(mine)
        np.testing.assert_array_equal(mine, expected("sum", comm.size, LARGE, np.float32))


def test_an_array_that_was_changed_is_not_taken_for_what_it_was(comm: Communicator) -> None:
    x = np.ones(12)
    comm.allreduce(x)
    x.shape = (3, 4)
    assert (comm.allreduce(x) == comm.size**2).all()
    x.setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        comm.allreduce(x)
    for length in range(3, 300):  # new arrays at old addresses
        assert (comm.allreduce(np.ones(length)) == comm.size).all()


def test_a_fork_of_a_rank_is_refused_whatever_it_has_called_before(comm: Communicator) -> None:
    x = np.ones(5)
    step = comm.plan("allreduce", x)
    step()
    comm.allreduce(x)
    child = os.fork()
    if child == 0:
        refused = 0
        for call in (step, lambda: comm.allreduce(x), comm.stop_timeline, step, Communicator):
            try:
                call()
            except CommError as error:
                refused += "fork of " in str(error)
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    assert (comm.allreduce(x) == comm.size**3).all()


def test_what_is_no_group_of_ranks_is_refused(comm: Communicator) -> None:
    """A communicator opened over two groups at once; Settings had "no attribute 'Dup'"."""
    for thing in (Settings(), "nccl", comm):
        with pytest.raises(TypeError, match="expected a communicator of mpi4py's"):
            Communicator(thing)
    with pytest.raises(ValueError, match="COMM_NULL"):
        Communicator(MPI.COMM_NULL)
    if comm.size > 1:
        part = MPI.COMM_WORLD.Split(comm.rank > 0, comm.rank)
        between = part.Create_intercomm(0, MPI.COMM_WORLD, int(comm.rank == 0))
        with pytest.raises(ValueError, match="intercommunicator"):
            Communicator(between)
        between.Free()
        part.Free()


def test_opening_has_time_whatever_the_deadline(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that compiled its kernels, for the first time on a machine, "does not answer"."""

    def late(*args: Any) -> Any:
        if comm.rank == 0:
            time.sleep(1.5)
        return load(*args)

    load = communicator.load
    monkeypatch.setattr(communicator, "load", late)
    with Communicator(settings=Settings(timeout=0.5)) as other:
        assert other._progress.timeout == 0.5


def test_a_fork_of_a_rank_leaves_its_works_alone(comm: Communicator) -> None:
    """It advanced the rank's works, and closed its group: the rank waited until time was up."""
    if comm.size == 1:
        return
    ahead, behind = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    with reopened(comm, timeout=20) as other:
        got = other.irecv(np.zeros(400_000), behind)
        flying = other.allreduce(np.ones(400_000), blocking=False) if comm.rank == 0 else None
        child = os.fork()
        if child == 0:
            refused = 0
            for call in (got.wait, got.done, other.close, flying.wait if flying else got.wait):
                try:
                    call()
                except CommError as error:
                    refused += "fork of rank" in str(error)
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        comm.barrier()  # until here the works could not end
        if flying is None:
            flying = other.allreduce(np.ones(400_000), blocking=False)
        sent = other.isend(np.full(400_000, float(comm.rank)), ahead)
        assert (flying.wait() == comm.size).all()
        sent.wait()
        assert (got.wait() == behind).all()


def test_what_a_fork_of_a_rank_drops_is_the_ranks_still(comm: Communicator) -> None:
    """It gave the pages of arrays back to the system, which are the rank's as well: zeros, and
    withdrew messages in flight.
    """
    if comm.size == 1:
        return
    ahead, behind = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    group = comm.split(0)
    assert group is not None
    with group as other:
        arrays = [other.empty(1000, dtype) for dtype in (np.float32, np.int64)]
        for x in arrays:
            x[:] = comm.rank + 5
        works = [other.irecv(np.zeros(400_000), behind)]
        if comm.rank == 0:
            works.append(other.allreduce(np.ones(400_000), blocking=False))
        child = os.fork()
        if child == 0:
            arrays.clear()
            works.clear()
            del x
            other._progress.works.clear()
            gc.collect()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert all((x == comm.rank + 5).all() for x in arrays)
        assert all(entry.state is State.RUNNING for entry in other.recent(len(works)))
        comm.barrier()  # until here the works could not end
        if comm.rank:
            works.append(other.allreduce(np.ones(400_000), blocking=False))
        sent = other.isend(np.full(400_000, float(comm.rank)), ahead)
        got, flown = (work.wait() for work in works)
        sent.wait()
        assert (got == behind).all() and (flown == comm.size).all()


def test_receipts_name_the_form(comm: Communicator) -> None:
    if comm.size == 1:
        return
    for x, form in (
        (np.ones(3), "eager"),
        (np.ones(LARGE), "staged"),
        (comm.empty(LARGE), "shared"),
    ):
        work = comm.allreduce(x, blocking=False)
        work.wait()
        assert work.receipt.transport == "shared" and form in work.receipt.algorithm
    with reopened(comm, shared=False) as other:
        work = other.allreduce(np.ones(3), blocking=False)
        work.wait()
        assert work.receipt.transport != "shared"


@pytest.mark.parametrize("make", [np.ones, lambda n: np.ones(n, np.float32)])
@pytest.mark.parametrize("counts", [(5, 6), (2000, 2001), (5, LARGE), (LARGE, LARGE + 1)])
def test_calls_that_differ_are_refused_everywhere(comm: Communicator, make, counts) -> None:
    if comm.size == 1:
        return
    count = counts[comm.rank == comm.size - 1]
    for share in (False, True):
        x = registered(comm, make(count)) if share else make(count)
        with pytest.raises(MismatchError, match=f"rank {comm.size - 1}: allreduce") as caught:
            comm.allreduce(x)
        assert f"{counts[0]} elements" in str(caught.value)
        assert f"{counts[1]} elements" in str(caught.value)
        np.testing.assert_array_equal(x, make(count))
        assert comm.allreduce(np.array([1.0]))[0] == comm.size


def test_another_operation_type_or_root_is_refused(comm: Communicator) -> None:
    if comm.size == 1:
        return
    odd = comm.rank == 1
    with pytest.raises(MismatchError, match=r"allreduce\(max, float64\)"):
        comm.allreduce(np.ones(3), "max" if odd else "sum")
    with pytest.raises(MismatchError, match=r"allreduce\(sum, int64\)"):
        comm.allreduce(np.ones(3, np.int64 if odd else np.float64))
    with pytest.raises(MismatchError, match="root 1"):
        comm.reduce(np.ones(3), int(odd))
    with pytest.raises(MismatchError, match="barrier"):
        comm.barrier() if odd else comm.allreduce(np.ones(3))


def test_works_in_flight_keep_their_order(comm: Communicator) -> None:
    arrays = [registered(comm, data(comm.rank, 100 + 1000 * k, np.float64)) for k in range(20)]
    works = [comm.allreduce(x, blocking=False) for x in arrays]
    for k in reversed(range(20)):
        total = expected("sum", comm.size, 100 + 1000 * k, np.float64)
        np.testing.assert_array_equal(works[k].wait(), total)


def test_plans_of_registered_memory(comm: Communicator) -> None:
    for count in (3, LARGE):
        x = comm.empty(count)
        step = comm.plan("allreduce", x, op="mean")
        for turn in range(5):
            x[:] = data(comm.rank, count, np.float32) + turn
            before = comm.broadcast(np.ones(2), blocking=False) if turn % 2 else None
            assert step() is x
            total = sum(data(rank, count, np.float32) + turn for rank in range(comm.size))
            np.testing.assert_array_equal(x, total / np.float32(comm.size))
            assert before is None or before.wait() is not None


def test_a_plans_steps_take_no_memory(comm: Communicator) -> None:
    for count in (10_003, LARGE):
        x = np.ones((comm.size, count), np.float32)
        contract.check_steps_take_no_memory(comm, x)
        contract.check_steps_take_no_memory(comm, registered(comm, x))


def test_groups_share_the_memory(comm: Communicator) -> None:
    x = registered(comm, data(comm.rank, 3000, np.float32))
    with comm.split(comm.rank % 2, -comm.rank) as group:
        members = [rank for rank in range(comm.size) if rank % 2 == comm.rank % 2]
        total = sum(data(rank, 3000, np.float32) for rank in members)
        np.testing.assert_array_equal(group.allreduce(x), total)
        np.testing.assert_array_equal(group.node.allreduce(group.empty(0)), [])


def test_memory_of_another_communicator_or_in_strides_is_refused(comm: Communicator) -> None:
    x = comm.empty(20)
    if comm.size == 1:
        return
    with Communicator() as other:
        with pytest.raises(CommError, match="of another communicator"):
            other.allreduce(x)
        y = other.empty(4)
    with pytest.raises(CommError, match="closed"):
        other.allreduce(y)
    with pytest.raises(CommError, match="closed"):
        other.empty(3)
    with pytest.raises(CommError, match="of another communicator"):
        comm.broadcast(y)
    with pytest.raises(ValueError, match="not contiguous"):
        comm.allreduce(x[::2])


def test_memory_comes_back(comm: Communicator) -> None:
    if comm._nodes is None or comm._nodes.memory is None:
        return
    memory = comm._nodes.memory
    gc.collect()
    memory._take_back()
    before = sum(high - low for low, high in memory._free)
    for _ in range(3):
        comm.empty((1000, 1000))[:] = 1
        comm.split(0).close()
    gc.collect()
    memory._take_back()
    assert sum(high - low for low, high in memory._free) == before
    assert not comm.empty(1000).any(), "pages come back as zeros"


@pytest.mark.parametrize("what", ["Memory", "Mapping"])
def test_a_rank_that_cannot_share_sends_all_to_messages(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if comm.size == 1:
        return

    def refuse(*_: object) -> None:
        raise OSError("no memory of this kind")

    if comm.rank == comm.size - 1:
        monkeypatch.setattr(f"ringfold.comm.node_memory.{what}", refuse)
    with Communicator() as other:
        for x in (np.ones(5), other.empty(LARGE)):
            x[:] = comm.rank + 1
            work = other.allreduce(x, blocking=False)
            work.wait()
            assert (x == sum(range(1, comm.size + 1))).all()
            assert "mpi" in work.receipt.transport
            assert "no shared memory: " in work.receipt.reason
        if comm.rank == comm.size - 1:
            assert "no memory of this kind" in work.receipt.reason


def test_works_end_while_python_computes(comm: Communicator) -> None:
    for kind in (registered, lambda _, values: values):
        arrays = [kind(comm, data(comm.rank, LARGE, np.float32)) for _ in range(6)]
        works = [comm.allreduce(x, blocking=False) for x in arrays]
        end = time.monotonic() + 30
        while not all(work.ended for work in works):  # looks, but does not help
            assert time.monotonic() < end, "works do not advance while Python computes"
        for x in arrays:
            np.testing.assert_array_equal(x, expected("sum", comm.size, LARGE, np.float32))


def test_a_work_given_up_breaks_its_board_and_says_so(comm: Communicator) -> None:
    if comm.size == 1:
        return
    group = comm.split(0)
    if comm.rank == 0:
        work = group.allreduce(np.ones(3), blocking=False)
        with pytest.raises(CommTimeout, match=r"rank 0 waited .* for ranks \[1\]"):
            work.wait(timeout=0.05)
        # Under the lock: its own thread may be at it just now.
        group._progress.give_up(lambda one: one is work, lambda _: CommError("enough"))
        with pytest.raises(CommError, match="an earlier allreduce was given up halfway"):
            group.allreduce(np.ones(3))
    comm.barrier()


def test_the_same_array_twice_in_flight(comm: Communicator) -> None:
    x = registered(comm, np.ones(LARGE, np.float32))
    for _ in range(2):
        works = [comm.allreduce(x, blocking=False) for _ in range(3)]
        assert all(work.wait() is x for work in works)
    assert (comm.allreduce(x) == float(comm.size) ** 7).all()
