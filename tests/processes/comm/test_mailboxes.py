"""Messages through shared memory: order, tags, sizes around every limit, and who waits for whom."""

import gc
import os
import time

import numpy as np
import pytest
from contract import data

from ringfold import CommTimeout, Communicator, MismatchError, Settings
from ringfold.comm import lending, outbox
from ringfold.comm.boxes import (
    BUFFERED_BYTES,
    IN_PLACE_BYTES,
    PIECE_BYTES,
    WINDOW_BYTES,
)
from ringfold.kernels.mailbox_words import SLOTS

pytestmark = pytest.mark.usefixtures("several")


@pytest.fixture
def several(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank sends nothing")


def neighbours(comm: Communicator) -> tuple[int, int]:
    return (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size


COUNTS = sorted(
    {0, 1, 3, 1023}
    | {
        limit // 4 + more
        for limit in (BUFFERED_BYTES, IN_PLACE_BYTES, WINDOW_BYTES, PIECE_BYTES)
        for more in (-1, 0, 1)
    }
    | {3 * WINDOW_BYTES // 4 + 5, 5 * IN_PLACE_BYTES // 4}
)


def make(comm: Communicator, kind: str, count: int) -> np.ndarray:
    if kind == "registered":
        return comm.empty(count)
    if kind == "strided":
        return np.zeros((count, 2), np.float32)[:, 1]
    return np.zeros(count, np.float32)


def check_every_size(comm: Communicator, here: str, there: str) -> None:
    ahead, behind = neighbours(comm)
    for count in COUNTS:
        x, y = make(comm, here, count), make(comm, there, count)
        x[:] = data(comm.rank, count, np.float32)
        work = comm.isend(x, ahead, 5)
        assert comm.recv(y, behind, 5) is y
        assert work.wait() is x
        np.testing.assert_array_equal(y, data(behind, count, np.float32))
        assert work.receipt.transport == "shared"


@pytest.mark.parametrize("there", ["private", "registered", "strided"])
@pytest.mark.parametrize("here", ["private", "registered", "strided"])
def test_every_size_from_and_to_every_kind_of_memory(
    comm: Communicator, here: str, there: str
) -> None:
    check_every_size(comm, here, there)


@pytest.mark.parametrize("memory", ["private", "strided"])
def test_every_size_where_no_rank_may_read_another_process(memory: str) -> None:
    with Communicator(settings=Settings(cma=False)) as comm:
        check_every_size(comm, memory, "private")


@pytest.mark.parametrize("refused", ["", "to one", "to all"])
def test_large_messages_are_read_or_else_asked_for(comm: Communicator, refused: str) -> None:
    """refused: to read memory of another process, which was allowed when the ranks tried it."""
    ahead, behind = neighbours(comm)
    with Communicator() as group:
        assert group._sharing is not None and group._sharing.mail is not None
        box = group._sharing.mail._boxes._inboxes[behind]
        if not box.process:
            pytest.skip("no rank may read another's process")
        if refused == "to all" or (refused and comm.rank == 0):
            box.process = (1 << 22) + os.getpid()  # more than Linux gives out
        count = BUFFERED_BYTES // 8 + 77
        xs = [data(comm.rank + 10 * k, count, np.float64) for k in range(4)]
        works = [group.isend(x, ahead, tag) for x, tag in zip(xs, (1, 1, 2, 1), strict=True)]
        assert "reads it in this process" in works[0].receipt.reason
        gets = [group.irecv(np.zeros(count), behind, 1) for _ in range(2)]
        third = group.recv(np.zeros(count), behind, 2)
        np.testing.assert_array_equal(third, data(behind + 20, count, np.float64))
        for k, get in enumerate(gets):
            np.testing.assert_array_equal(get.wait(), data(behind + 10 * k, count, np.float64))
        np.testing.assert_array_equal(
            group.recv(np.zeros(count), behind, 1), data(behind + 30, count, np.float64)
        )
        for work in works:
            work.wait()


@pytest.mark.parametrize("refused", [False, True])
def test_bytes_that_come_instead_of_a_note_may_be_private(
    comm: Communicator, refused: bool
) -> None:
    """As a rank with a GPU receives from one that has none."""
    ahead, behind = neighbours(comm)
    with Communicator() as group:
        assert group._sharing is not None and group._sharing.mail is not None
        mail = group._sharing.mail
        if refused and mail._boxes._inboxes[behind].process:
            mail._boxes._inboxes[behind].process = (1 << 22) + os.getpid()
        count = BUFFERED_BYTES + 4099
        x, got = data(comm.rank, count, np.uint8), np.zeros(count, np.uint8)
        work = group.isend(x, ahead, 3)

        def through(steps):
            try:
                while True:
                    next(steps)
                    work.done()
            except StopIteration as stop:
                return stop.value

        message = through(mail.hope(count, behind, 3))
        assert not message.note
        through(mail.take(message, got, behind))
        np.testing.assert_array_equal(got, data(behind, count, np.uint8))
        work.wait()


def test_tags_in_any_order_and_one_tag_in_its_own(comm: Communicator) -> None:
    ahead, behind = neighbours(comm)
    works = [comm.isend(np.array([tag, k]), ahead, tag) for k in range(3) for tag in (4, 0, 7)]
    for tag in (7, 0, 4):
        for k in range(3):
            assert comm.recv(np.zeros(2, np.int64), behind, tag).tolist() == [tag, k]
    gets = [comm.irecv(np.zeros(1, np.int64), behind, 3) for _ in range(4)]
    works += [comm.isend(np.array([k]), ahead, 3) for k in range(4)]
    for k in (2, 0, 3, 1):  # waited for in another order than they were posted
        assert gets[k].wait().tolist() == [k]
    for work in works:
        work.wait()


def test_more_messages_than_slots(comm: Communicator) -> None:
    ahead, behind = neighbours(comm)
    works = [comm.isend(np.array([k]), ahead) for k in range(2 * SLOTS + 7)]
    for k in range(2 * SLOTS + 7):
        assert comm.recv(np.zeros(1, np.int64), behind)[0] == k
    for work in works:
        work.wait()


def test_more_messages_than_slots_in_any_order(comm: Communicator) -> None:
    """A message waited for the slot of one that was to be received after it."""
    ahead, behind = neighbours(comm)
    last, count = comm.isend(np.array([-1]), ahead, 9), 2 * SLOTS + 7
    works = [comm.isend(np.array([tag]), ahead, tag) for tag in range(10, 10 + count)]
    for tag in reversed(range(10, 10 + count)):
        assert comm.recv(np.zeros(1, np.int64), behind, tag)[0] == tag
    for k in range(SLOTS + 9):
        comm.send(np.array([k]), ahead, 5)
        assert comm.recv(np.zeros(1, np.int64), behind, 5)[0] == k
    assert comm.recv(np.zeros(1, np.int64), behind, 9)[0] == -1
    for work in (*works, last):
        work.wait()


def test_a_sender_of_small_messages_waits_where_it_is_far_ahead(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "AHEAD", SLOTS)
    ahead, behind = neighbours(comm)
    works = [comm.isend(np.array([k]), ahead) for k in range(SLOTS + 40)]
    assert works[SLOTS // 2].done() and not works[-1].done()
    comm.barrier()
    for k in range(SLOTS + 40):
        assert comm.recv(np.zeros(1, np.int64), behind)[0] == k
    works[-1].wait()


def test_small_messages_let_the_sender_go_on(comm: Communicator) -> None:
    ahead, behind = neighbours(comm)
    x = data(comm.rank, BUFFERED_BYTES // 8, np.float64)
    for _ in range(3):
        comm.send(x, ahead)  # everybody sends first
    x[:] = -1
    comm.barrier()
    for _ in range(3):
        y = comm.recv(np.empty_like(x), behind)
        np.testing.assert_array_equal(y, data(behind, x.size, np.float64))


def test_a_sender_far_ahead_waits(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "OUTSTANDING_BYTES", 1 << 20)
    ahead, behind = neighbours(comm)
    x = data(comm.rank, 100_001, np.float32)
    works = [comm.isend(x, ahead) for _ in range(12)]
    assert not all(work.done() for work in works)
    comm.barrier()
    for _ in works:
        y = comm.recv(np.empty_like(x), behind)
        np.testing.assert_array_equal(y, data(behind, x.size, np.float32))
    for work in works:
        work.wait()


def test_many_large_messages_cross_each_other(comm: Communicator) -> None:
    count, peers = 400_003, [r for r in range(comm.size) if r != comm.rank]
    gets = [comm.irecv(np.empty(count), peer, tag) for peer in peers for tag in (1, 2)]
    sends = [
        comm.isend(data(comm.rank + tag, count, np.float64), peer, tag)
        for peer in reversed(peers)
        for tag in (2, 1)
    ]
    for work, (peer, tag) in zip(gets, [(p, t) for p in peers for t in (1, 2)], strict=True):
        np.testing.assert_array_equal(work.wait(), data(peer + tag, count, np.float64))
    for work in sends:
        work.wait()


def test_a_wrong_length_is_refused_and_the_next_message_is_right(comm: Communicator) -> None:
    ahead, behind = neighbours(comm)
    for count, make in ((3, np.empty), (BUFFERED_BYTES, np.empty), (BUFFERED_BYTES, comm.empty)):
        work = comm.isend(make(count, np.float32), ahead)
        then = comm.isend(np.array([comm.rank]), ahead)
        text = f"rank {behind} sends {4 * count} bytes where rank {comm.rank} expects 20"
        with pytest.raises(MismatchError, match=text):
            comm.recv(np.zeros(5, np.float32), behind)
        assert comm.recv(np.zeros(1, np.int64), behind)[0] == behind
        comm.barrier()
        then.wait()
        if count == 3:
            work.wait()  # it was on its way before anybody looked
        else:
            with pytest.raises(MismatchError, match=f"rank {comm.rank} sends .* expects 20"):
                work.wait()


def test_a_receive_that_ran_out_of_time_goes_on(comm: Communicator) -> None:
    ahead, behind = neighbours(comm)
    work = comm.irecv(np.zeros(9), behind, 8)
    with pytest.raises(CommTimeout, match=rf"recv.* for ranks \[{behind}\]"):
        work.wait(timeout=0.1)
    comm.barrier()
    comm.send(np.arange(9.0) + comm.rank, ahead, 8)
    np.testing.assert_array_equal(work.wait(), np.arange(9.0) + behind)


def test_groups_do_not_meet(comm: Communicator) -> None:
    ahead, behind = neighbours(comm)
    with comm.split(0, -comm.rank) as other:
        assert other.rank == comm.size - 1 - comm.rank
        outer = comm.isend(np.array([1, comm.rank]), ahead, 0)
        to, from_ = neighbours(other)
        inner = other.isend(np.array([2, other.rank]), to, 0)
        assert other.recv(np.zeros(2, np.int64), from_, 0).tolist() == [2, from_]
        assert comm.recv(np.zeros(2, np.int64), behind, 0).tolist() == [1, behind]
        outer.wait(), inner.wait()


def test_what_was_sent_outlives_its_group(comm: Communicator) -> None:
    """A sender that dropped its group made zeros of what nobody had received yet."""
    count = 5_003
    group = comm.split(0)
    assert group is not None
    if comm.rank:
        group.send(data(comm.rank, count, np.float64), 0)
        del group
        gc.collect()
        comm.send(np.full(count, -1.0), 0)  # takes memory as well
    comm.barrier()
    if comm.rank == 0:
        for src in range(1, comm.size):
            got = group.recv(np.zeros(count), src)
            np.testing.assert_array_equal(got, data(src, count, np.float64))
            assert (comm.recv(np.zeros(count), src) == -1.0).all()
    comm.barrier()


def test_a_message_to_oneself(comm: Communicator) -> None:
    for count in (5, 700_000):
        work = comm.isend(data(comm.rank, count, np.float32), comm.rank, 1)
        y = comm.recv(np.zeros(count, np.float32), comm.rank, 1)
        np.testing.assert_array_equal(y, data(comm.rank, count, np.float32))
        work.wait()


def test_messages_arrive_while_the_ranks_do_other_things(comm: Communicator) -> None:
    ahead, behind = neighbours(comm)
    x, y = data(comm.rank, 900_001, np.float32), np.zeros(900_001, np.float32)
    get, put = comm.irecv(y, behind), comm.isend(x, ahead)
    end = time.monotonic() + 20
    while y[-1] == 0 and time.monotonic() < end:
        time.sleep(0.01)  # nobody calls done() or wait()
    assert y[-1] == data(behind, y.size, np.float32)[-1]
    get.wait(), put.wait()
    np.testing.assert_array_equal(y, data(behind, y.size, np.float32))
