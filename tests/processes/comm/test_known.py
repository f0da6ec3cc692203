"""Calls that are made again on the same memory: prepared once, and as right as the first."""

import gc
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from contract import data

from ringfold import CommError, CommTimeout, Communicator, MismatchError
from ringfold.comm import mailboxes
from ringfold.comm.chunks import bounds
from ringfold.comm.fused_rows import OUTPUT
from ringfold.comm.scattering import Scattering
from ringfold.kernels.records import RING_CALLS

LENGTHS = (1, 12, 3000, 200_004)
"""Eager, eager in several lines, staged or read where it is, in several windows."""


def rows(comm: Communicator, count: int, turn: int) -> np.ndarray[Any, Any]:
    """Return what all ranks pass in a turn, a row for each."""
    return np.stack([data(rank, count, np.float32) + turn for rank in range(comm.size)])


def calls(comm: Communicator, x: Any) -> dict[str, tuple[Callable[[], Any], Callable[..., Any]]]:
    """Return each collective on x, and what it has to return, given all rows and the turn's own."""
    last = comm.size - 1

    def at(root: int, value: Any) -> Any:
        return value if comm.rank == root else None

    def part(total: Any) -> Any:
        low, high = bounds(total.size, comm.size, comm.rank)
        return total[low:high]

    return {
        "allreduce": (lambda: comm.allreduce(x), lambda all_, own: all_.sum(0)),
        "allreduce max": (lambda: comm.allreduce(x, "max"), lambda all_, own: all_.max(0)),
        "broadcast": (lambda: comm.broadcast(x), lambda all_, own: all_[0]),
        "broadcast last": (lambda: comm.broadcast(x, last), lambda all_, own: all_[last]),
        "reduce": (
            lambda: comm.reduce(x, last, "min"),
            lambda all_, own: all_.min(0) if comm.rank == last else own,
        ),
        "allgather": (lambda: comm.allgather(x), lambda all_, own: all_),
        "gather": (lambda: comm.gather(x), lambda all_, own: at(0, all_)),
        "gather last": (lambda: comm.gather(x, last), lambda all_, own: at(last, all_)),
        "reduce_scatter": (lambda: comm.reduce_scatter(x), lambda all_, own: part(all_.sum(0))),
        "reduce_scatter max": (
            lambda: comm.reduce_scatter(x, "max"),
            lambda all_, own: part(all_.max(0)),
        ),
    }


@pytest.mark.parametrize("count", LENGTHS)
def test_every_collective_again_and_again_on_one_array(comm: Communicator, count: int) -> None:
    """Those but allreduce were prepared anew in each call, 30 us for what takes one."""
    x = np.zeros(count, np.float32)
    before: list[tuple[Any, Any]] = []
    for turn in range(4):
        for name, (call, wanted) in calls(comm, x).items():
            x[:] = data(comm.rank, count, np.float32) + turn
            result = call()
            expected = wanted(rows(comm, count, turn), data(comm.rank, count, np.float32) + turn)
            if expected is None:
                assert result is None, name
                continue
            np.testing.assert_array_equal(result, expected, err_msg=f"{name}, turn {turn}")
            if result is not x:
                before.append((result, expected))
    for result, expected in before:  # no later call has written to them
        np.testing.assert_array_equal(result, expected)
    blocks = np.zeros((comm.size, count), np.float32)
    for turn in range(3):
        blocks[:] = data(comm.rank, count, np.float32) + turn + 100 * np.arange(comm.size)[:, None]
        np.testing.assert_array_equal(
            comm.alltoall(blocks), rows(comm, count, turn) + 100 * comm.rank
        )


@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("registered", [False, True])
def test_scatter_again_and_again(comm: Communicator, count: int, registered: bool) -> None:
    """It went by messages, 105 us for 64 bytes, as the root alone knows what comes."""
    kinds: list[tuple[tuple[int, ...], Any]] = [((count,), np.float32), ((3, count), np.int16)]
    given = {}
    for shape, dtype in kinds:
        whole = (comm.size, *shape)
        given[dtype] = comm.empty(whole, dtype) if registered else np.empty(whole, dtype)
    before = []
    for turn in range(3):
        for root in range(comm.size):
            for (shape, dtype), x in zip(kinds, given.values(), strict=True):
                values = np.arange(x.size, dtype=np.int64).reshape(x.shape) % 1000 + turn + root
                x[:] = values if comm.rank == root else -1
                # Elsewhere it may be given, and is not looked at.
                mine = comm.scatter(x if turn == 1 or comm.rank == root else None, root)
                assert mine.dtype == dtype and mine.shape == shape
                np.testing.assert_array_equal(mine, values[comm.rank])
                before.append((mine, values[comm.rank]))
    for mine, values in before:
        np.testing.assert_array_equal(mine, values)
    step = comm.plan("scatter", given[np.float32], comm.size - 1)
    for turn in range(3):
        given[np.float32][:] = turn
        assert (step() == turn).all()
    works = [comm.scatter(given[np.float32], blocking=False) for _ in range(3)]
    assert all((work.wait() == 2).all() for work in works)
    strided = np.arange(4.0 * comm.size).reshape(4, comm.size).T
    for turn in range(3):
        strided += 1
        own = comm.scatter(strided if comm.rank == 0 else None)
        np.testing.assert_array_equal(own, np.arange(4.0) * comm.size + comm.rank + turn + 1)


def test_an_array_seen_in_another_way_is_another_call(comm: Communicator) -> None:
    x = np.arange(12, dtype=np.int32)
    for shape in ((12,), (3, 4), (4, 3), (12,), (3, 4)):
        x.shape = shape
        assert comm.allgather(x).shape == (comm.size, *shape)
    x = x.reshape(-1)
    x.setflags(write=False)  # as it may be where it is only read
    for _ in range(2):
        assert (comm.allgather(x) == np.arange(12)).all()
        with pytest.raises(ValueError, match="read-only"):
            comm.broadcast(x, (comm.rank + 1) % comm.size) if comm.size > 1 else comm.allreduce(x)
    for length in range(3, 200):  # new arrays at old addresses
        assert comm.allgather(np.full(length, comm.rank)).sum() == length * sum(range(comm.size))


def test_bad_arguments_are_refused_behind_good_ones(comm: Communicator) -> None:
    x = np.ones(4)
    comm.broadcast(x)
    comm.reduce(x)
    for bad, kind in ((comm.size, ValueError), (-1, ValueError), ("0", TypeError), (x, TypeError)):
        with pytest.raises(kind, match="root"):
            comm.broadcast(x, bad)
    with pytest.raises(ValueError, match="op"):
        comm.reduce(x, 0, "broadcast")
    with pytest.raises((TypeError, ValueError)):
        comm.allreduce(x, x)
    with pytest.raises((TypeError, ValueError)):
        comm.allreduce(x, "allgather")
    assert (comm.broadcast(x) == comm.size).all()


def test_what_is_still_on_its_way_is_done_a_second_time(comm: Communicator) -> None:
    """A result's place must not change while another call is writing to it."""
    x = np.full(40_000, comm.rank + 1.0)
    comm.allgather(x)
    works = [comm.allgather(x, blocking=False) for _ in range(3)]
    works.append(comm.reduce_scatter(x, blocking=False))
    now = comm.allgather(x)
    results = [now, *(work.wait() for work in works[:3])]
    assert len({id(result) for result in results}) == 4
    for result in results:
        assert (result == np.arange(1, comm.size + 1)[:, None]).all()
    assert (works[3].wait() == sum(range(1, comm.size + 1))).all()


def test_a_call_that_was_waited_for_in_vain_may_be_made_again(comm: Communicator) -> None:
    """The first goes on, and writes to the array that it was given, which nobody has by then."""
    if comm.size == 1:
        pytest.skip("one rank waits for nobody")
    x = np.full(5000, comm.rank, np.int64)
    comm.allgather(x)
    first = None
    if comm.rank == 0:
        first = comm.allgather(x, blocking=False)
        with pytest.raises(CommTimeout):
            first.wait(0)
        comm.send(np.zeros(1), 1)
    elif comm.rank == 1:
        comm.recv(np.zeros(1), 0)
    again = comm.allgather(x)
    second = comm.allgather(x) if first is None else first.wait()
    for result in (again, second):
        assert (result == np.arange(comm.size)[:, None]).all()


def in_vain(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]
) -> None:
    """Let what the ranks but 0 call time out; rank 0 goes on when all have."""
    if comm.rank == 0:
        for peer in range(1, comm.size):
            comm.recv(np.zeros(1), peer)
        return
    with monkeypatch.context() as patch:
        patch.setattr(comm._progress, "timeout", 0.05)
        with pytest.raises(CommTimeout):
            call()
    comm.send(np.zeros(1), 0)


def test_a_barrier_that_was_waited_for_in_vain_may_be_made_again(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was said to be in flight still, "on the same array"."""
    if comm.size == 1:
        pytest.skip("one rank waits for nobody")
    comm.barrier()

    def twice() -> None:
        with pytest.raises(CommTimeout):
            comm.barrier()
        comm.barrier()  # while the first is in flight for certain

    in_vain(comm, monkeypatch, twice)
    if comm.rank == 0:
        comm.barrier()
        comm.barrier()
    comm.barrier()
    assert comm.allgather(np.array([comm.rank])).ravel().tolist() == [*range(comm.size)]


def test_a_scatter_in_flight_is_not_disturbed_by_another_that_is_refused(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It put the announcement's program, and its place, back in the middle of the rows'."""
    if comm.size == 1 or comm._operations.way != "shared":
        pytest.skip("ranks share no memory")
    x = np.arange(comm.size * 70_000.0).reshape(comm.size, -1)

    def twice() -> None:
        try:
            comm.scatter(root=0)
        finally:
            meeting = comm._memo.recall(comm._nothing, "scatter", (0,)).meeting
            rows, place = meeting._rows, meeting._own[OUTPUT]
            meeting._take(rows[:0])
            meeting._own[OUTPUT] = 8
            with pytest.raises(CommError, match=r"this scatter .* is still in flight"):
                next(meeting.steps())
            assert meeting._own[OUTPUT] == 8 and len(meeting._rows) == 0
            meeting._take(rows)
            meeting._own[OUTPUT] = place

    in_vain(comm, monkeypatch, twice)
    if comm.rank == 0:
        assert (comm.scatter(x) == x[0]).all()
    comm.barrier()
    for _ in range(2):
        assert (comm.scatter(x if comm.rank == 0 else None) == x[comm.rank]).all()


def test_a_send_that_is_interrupted_before_it_is_posted_is_not_counted(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number was taken by then, and its receiver waited for ever for a message of that."""
    if comm.size == 1 or comm._operations.way != "shared":
        pytest.skip("ranks share no memory")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    x = np.zeros(4)
    for turn in range(3):
        if comm.rank == 0:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(mailboxes, "Bytes", interrupted)
                comm.send(x, 1, 7)
            comm.send(x + turn, 1, 7)
        elif comm.rank == 1:
            work = comm.irecv(x, 0, 7)
            assert work.wait(20)[0] == turn
    comm.barrier()


def test_a_message_that_waits_is_told_of_where_it_was_called(comm: Communicator) -> None:
    """By the line that called it first, though it waited in another."""
    if comm.size == 1:
        pytest.skip("one rank waits for nobody")
    x = np.zeros(4)
    for _ in range(2):
        if comm.rank == 0:
            time.sleep(0.02)
            comm.send(x, 1)
        elif comm.rank == 1:
            comm.recv(x, 0)
    if comm.rank == 0:
        time.sleep(0.1)
        comm.send(x, 1)
    elif comm.rank == 1:
        comm.recv(x, 0)
        assert comm.recent(1)[0].site == f"{__file__}:{sys._getframe().f_lineno - 1}"
    comm.barrier()


def test_a_scatter_leaves_no_cycle_of_references(comm: Communicator) -> None:
    """Each kept some kilobytes until the garbage collector came."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            comm.scatter(np.ones((comm.size, 3)) if comm.rank == 0 else None)
            comm.plan("scatter", np.ones((comm.size, 3)) if comm.rank == 0 else None)()
        assert sum(type(one) is Scattering for one in gc.get_objects()) <= 2 * comm.size
    finally:
        gc.enable()


def test_barriers_again_and_again_are_told_of(comm: Communicator) -> None:
    """The barrier's line was gone behind a thousand calls of other kinds."""
    comm.barrier()
    for count in range(RING_CALLS + 5):
        comm.allreduce(np.zeros(count % 512 + 1, np.int8 if count < 512 else np.int16))
        if count >= 1024:
            comm.allreduce(np.zeros(count, np.int32))
    comm.barrier()
    assert comm.recent(1)[0].signature.operation == "barrier"


@pytest.mark.parametrize("count", [1, 300, 40_000, 700_000])
@pytest.mark.parametrize("registered", [False, True])
def test_messages_again_and_again_from_one_array(
    comm: Communicator, count: int, registered: bool
) -> None:
    """Each was prepared anew, and made a work of, whatever was in flight: 33 us one way, not 7."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    x = comm.empty(count) if registered else np.zeros(count, np.float32)
    got = np.zeros(count, np.float32)
    for turn in range(6):
        x[:] = data(comm.rank, count, np.float32) + turn
        wanted = data(left, count, np.float32) + turn
        if turn % 3 == 0:  # one after the other, so that none waits for itself
            for rank in range(comm.size):
                if rank == comm.rank and comm.size > 1:
                    comm.send(x, right, turn)
                if rank == left and comm.size > 1:
                    assert comm.recv(got, left, turn) is got
        elif turn % 3 == 1:
            work = comm.irecv(got, left, turn)
            comm.isend(x, right, turn).wait()
            assert work.wait() is got
        else:
            works = [comm.isend(x, right, tag) for tag in (3, 4, 3)]
            others = [np.zeros_like(got) for _ in range(2)]
            works += [comm.irecv(one, left, tag) for one, tag in zip(others, (4, 3), strict=True)]
            for work in works[3:]:
                work.wait()
            comm.recv(got, left, 3)
            for work in works:
                work.wait()
            for one in others:
                np.testing.assert_array_equal(one, wanted)
        if comm.size > 1 or turn % 3:
            np.testing.assert_array_equal(got, wanted)
    for bad, kind in ((-1, ValueError), (1 << 40, ValueError), ("1", TypeError), (1.5, TypeError)):
        with pytest.raises(kind, match="tag"):
            comm.send(x, right, bad)
    with pytest.raises((TypeError, ValueError), match="dst"):
        comm.send(x, comm.size, 1)


def test_small_messages_that_come_again_are_one_call_and_are_counted(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that wait for each other behind such messages are told, as what came is none to come.

    Works that are in flight go on meanwhile, and what does not wait is a work that has ended.
    """
    if comm.size == 1 or comm._operations.way != "shared":
        pytest.skip("ranks share no memory")
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    with comm.split(0) as group:
        x, got, early = np.zeros(4), np.zeros(4), np.zeros(4)
        group.isend(x, right, 7)
        group.recv(got, left, 7)
        with monkeypatch.context() as patch:
            patch.setattr(group._runner, "carry", None)  # the way of what is not done at once
            for turn in range(3):
                x[:] = group.rank + turn / 8
                work = group.isend(x, right, 7)
                assert work.ended and work.receipt.nbytes == 32 and work.wait() is x
                group.barrier()
                assert group.recv(got, left, 7) is got
                assert (got == left + turn / 8).all()
        work = group.irecv(early, left, 8)
        for turn in range(2):
            group.send(np.full(3, turn), right, 9)
            group.recv(np.zeros(3, np.int64), left, 9)
        group.send(x, right, 8)
        assert work.wait() is early and (early == got).all()
        kinds = [(entry.signature.operation, entry.sequence) for entry in group.recent(4)]
        assert len({sequence for _, sequence in kinds}) == 4 and kinds[-1][0] in ("send", "recv")
        with pytest.raises(MismatchError, match="wait for each other"):
            group.recv(got, left, 7)


def test_what_is_known_keeps_no_array_alive(comm: Communicator) -> None:
    x, y = np.arange(5.0), np.arange(5.0)
    for _ in range(3):
        comm.allgather(x)
        comm.broadcast(x)
        work = comm.irecv(y, (comm.rank - 1) % comm.size)
        comm.send(x, (comm.rank + 1) % comm.size)
        work.wait()
    del work
    gone = [weakref.ref(x), weakref.ref(y)]
    del x, y
    assert [one() for one in gone] == [None, None]


def test_what_a_scatter_has_brought_is_its_callers_alone(comm: Communicator) -> None:
    x = np.arange(comm.size * 700.0).reshape(comm.size, -1)
    for root in (0, 0, comm.size - 1):
        brought = comm.scatter(x if comm.rank == root else None, root)
        gone = weakref.ref(brought)
        del brought
        assert gone() is None


def test_nothing_is_known_once_the_group_is_closed(comm: Communicator) -> None:
    x = np.ones(3)
    group = comm.split(0)
    for _ in range(2):
        group.allgather(x)
        group.barrier()
    group.close()
    for call in (lambda: group.allgather(x), group.barrier, lambda: group.broadcast(x)):
        with pytest.raises(CommError, match="closed"):
            call()
