"""Failures at a rank: everybody else learns of it, and nobody waits for ever."""

import math
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch

from ringfold import (
    CommError,
    CommTimeout,
    Communicator,
    MismatchError,
    PeerLost,
    ScheduleError,
    Settings,
    run_local,
)
from ringfold.comm.algorithms import build
from ringfold.comm.draining import drain
from ringfold.comm.progress import Progress
from ringfold.comm.transport.base import Channel
from ringfold.comm.transport.local import LocalTransport, World
from ringfold.comm.work import Receipt, Steps, Work


@pytest.mark.parametrize("failing", [0, 2])
def test_the_first_failure_is_raised_and_the_others_lose_a_peer(failing: int) -> None:
    seen: list[int] = []

    def main(comm: Communicator) -> None:
        comm.allreduce(np.ones(3))
        if comm.rank == failing:
            raise RuntimeError("bad file")
        with pytest.raises(PeerLost, match="it failed with RuntimeError: bad file"):
            comm.allreduce(np.ones(100_000))
        seen.append(comm.rank)

    with pytest.raises(RuntimeError, match="bad file") as caught:
        run_local(4, main)
    assert caught.value.__notes__ == [f"raised on rank {failing} of 4"]
    assert sorted(seen) == [rank for rank in range(4) if rank != failing]


def test_a_rank_that_returns_early_is_named() -> None:
    def main(comm: Communicator) -> None:
        if comm.rank == 1:
            return
        with pytest.raises(PeerLost, match="rank 1 is gone: its main has returned"):
            comm.broadcast(np.ones(3), root=1)

    run_local(2, main)


def test_closing_does_not_wait_for_a_rank_that_has_returned_to_receive() -> None:
    """It waited for the message to be taken until time was up."""
    works: list[Work] = []

    def main(comm: Communicator) -> None:
        if comm.rank == 0:
            works.append(comm.isend(np.ones(3), 1, tag=4))

    start = time.monotonic()
    run_local(2, main, settings=Settings(timeout=60))
    assert time.monotonic() - start < 30
    assert isinstance(works[0].exception(), PeerLost)
    assert "rank 1 is gone: its main has returned" in str(works[0].exception())


def test_the_last_message_of_a_rank_that_ended_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    # It came, and its sender ended, between this rank's look for it and its look at the sender.
    world = World(2)
    here, there = (LocalTransport(world, (0, 1), rank) for rank in range(2))
    monkeypatch.setattr(here, "node", lambda: here)  # found without the other rank
    comm = Communicator.over(here)

    def arrive_late(spins: int) -> None:
        if not world._lost:
            there.isend(np.arange(3, dtype=np.uint8), 0, 0, Channel.POINT_TO_POINT)
            world.lose(1, "its main has returned", failed=False)
            time.sleep(0.1)

    monkeypatch.setattr(here, "pause", arrive_late)
    assert comm.recv(np.zeros(3, np.uint8), 1).tolist() == [0, 1, 2]
    with pytest.raises(PeerLost):
        comm.recv(np.zeros(3, np.uint8), 1)


def test_each_of_several_ranks_that_end_is_looked_at_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second was given up at once: the first had been found to have left before."""
    world = World(3)
    here, *others = (LocalTransport(world, (0, 1, 2), rank) for rank in range(3))
    progress = Progress(5.0, threads=False)

    def receive() -> Steps:
        for peer in (1, 2):
            request = here.irecv(np.zeros(1, np.uint8), peer, 0, Channel.POINT_TO_POINT)
            while not request.done():
                yield [request]
        return "both"

    def arrive_late(spins: int) -> None:
        if len(world._lost) < 2:
            last = others[len(world._lost)]
            last.isend(np.ones(1, np.uint8), 0, 0, Channel.POINT_TO_POINT)
            world.lose(last.rank, "its main has returned", failed=False)
        time.sleep(0.1)

    monkeypatch.setattr(here, "pause", arrive_late)
    receipt = Receipt("recv", "message", "local", 1, 2, "")
    work = progress.start(lambda: Work(receive(), receipt, here, progress), False)
    assert work.wait() == "both"


def test_waiting_too_long_names_the_ranks_and_the_operation() -> None:
    def main(comm: Communicator) -> None:
        if comm.rank == 0:
            text = r"rank 0 waited .* in recv \(message, 24 bytes\) for ranks \[1\]"
            with pytest.raises(CommTimeout, match=text):
                comm.recv(np.empty(3), 1)
        else:
            time.sleep(0.6)

    run_local(2, main, settings=Settings(timeout=0.2))


def test_each_rank_says_where_its_own_thread_is() -> None:
    """All of them were told to be where the main thread waits for them."""

    def left(comm: Communicator) -> None:
        place = r"now at \S*test_failures.py:\d+ in"
        with pytest.raises(CommTimeout, match=rf"rank 0: .*{place} left.*rank 1: .*{place} right"):
            comm.recv(np.empty(1), 1)
        comm.isend(np.ones(1), 1)

    def right(comm: Communicator) -> None:
        comm.irecv(np.empty(1), 0).wait(timeout=20)

    run_local(2, lambda comm: (left, right)[comm.rank](comm), settings=Settings(timeout=0.3))


def test_time_in_which_a_rank_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that had been suspended ended with CommTimeout as soon as it went on."""
    gone, now = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + gone[0])

    def main(comm: Communicator) -> None:
        if comm.rank == 0:
            time.sleep(0.2)
            gone[0] = 1000.0
            time.sleep(0.2)
        comm.allreduce(np.ones(3))

    run_local(2, main, settings=Settings(timeout=30))


def test_a_wait_may_time_out_and_be_taken_up_again() -> None:
    def main(comm: Communicator) -> None:
        if comm.rank == 0:
            work = comm.irecv(np.zeros(3), 1)
            with pytest.raises(CommTimeout):
                work.wait(timeout=0.1)
            assert not work.done() and work.exception() is None
            comm.barrier()
            assert (work.wait() == 7).all() and work.done()
        else:
            comm.barrier()
            comm.send(np.full(3, 7.0), 0)

    run_local(2, main)


def test_a_short_wait_asks_nobody_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that polled a work signalled its healthy peers, and took a second for each poll."""
    asked: list[int] = []

    def main(comm: Communicator) -> None:
        if comm.rank == 0:
            work = comm.irecv(np.zeros(3), 1)
            monkeypatch.setattr(comm._progress.inquiry, "ask", lambda *_: asked.append(1) or {})
            for timeout in (0, 0.1):
                with pytest.raises(CommTimeout, match=r"for ranks \[1\]$"):
                    work.wait(timeout=timeout)
            assert not asked
            with pytest.raises(CommTimeout, match="where the ranks are"):
                work.wait(timeout=2)
            assert asked
            comm.barrier()
            work.wait()
        else:
            comm.barrier()
            comm.send(np.full(3, 7.0), 0)

    run_local(2, main)


@pytest.mark.parametrize(
    ("timeout", "error"), [(float("nan"), ValueError), ("3", TypeError), ([1], TypeError)]
)
def test_a_timeout_that_is_no_number_of_seconds_is_refused(
    timeout: object, error: type[Exception]
) -> None:
    """NaN never ran out; others were taken where the work had ended, and broke the wait else."""

    def main(comm: Communicator) -> None:
        work = comm.irecv(np.zeros(3), 1 - comm.rank)

        def refused() -> None:
            with pytest.raises(error, match=r"^timeout: expected seconds, got \S"):
                work.wait(timeout=timeout)  # type: ignore[arg-type]

        refused()
        for short in (0, -1, np.float32(0), -math.inf):
            with pytest.raises(CommTimeout):
                work.wait(timeout=short)
        comm.barrier()
        comm.isend(np.ones(3), 1 - comm.rank)
        assert work.wait(timeout=math.inf)[0] == 1
        refused()

    run_local(2, main)


def test_a_work_that_was_waited_for_in_vain_holds_nobody_up_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ringfold.comm.progress.ASKS", 0.1)  # less is a look now and then
    monkeypatch.setattr("ringfold.comm.patience.ANSWERS", 0.1)

    def main(comm: Communicator) -> None:
        if comm.rank == 0:
            work = comm.irecv(np.zeros(3), 1)
            with pytest.raises(CommTimeout):
                work.wait(timeout=0.1)
            with pytest.raises(CommTimeout):
                work.wait(timeout=0.01)
            start = time.monotonic()
            drain(comm._progress, 60, lambda work: True, "ends")
            assert time.monotonic() - start < 20
            comm.barrier()
            assert (work.wait() == 7).all()
        else:
            comm.barrier()
            comm.send(np.full(3, 7.0), 0)

    run_local(2, main)


def test_a_message_of_another_length_is_refused_at_both_ends() -> None:
    def main(comm: Communicator) -> None:
        with pytest.raises(MismatchError, match="rank 0 sends 32 bytes where rank 1 expects 24"):
            if comm.rank == 0:
                comm.send(np.ones(4), 1)
            else:
                comm.recv(np.ones(3), 0)

    run_local(2, main)


@pytest.mark.parametrize("sent, expected", [(16, 8), (8, 16), (20, 16), (16, 20), (24, 7)])
def test_a_message_in_pieces_of_another_length_is_refused(sent: int, expected: int) -> None:
    """Whole pieces were taken for the message, and what was left of it for the next one."""

    def main(comm: Communicator) -> None:
        if comm.rank == 0:
            with suppress(MismatchError):  # where the piece that differs has met its receive
                comm.isend(np.arange(sent, dtype=np.uint8), 1).done()
            return
        told = rf"rank 0 sends \d bytes where .*; a recv of {expected} bytes, in pieces of 8"
        with pytest.raises(MismatchError, match=told if expected >= 8 else "rank 0 sends 8 bytes"):
            comm.recv(np.zeros(expected, np.uint8), 0)

    run_local(2, main, settings=Settings(timeout=20, max_message_bytes=8))


def test_an_error_of_a_work_is_raised_by_each_wait() -> None:
    def main(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.send(np.ones(4), 0)
            return
        work = comm.irecv(np.ones(3), 1)
        while not work.done():
            time.sleep(0.001)
        assert isinstance(work.exception(), MismatchError)
        for _ in range(2):
            with pytest.raises(MismatchError):
                work.wait()

    with pytest.raises(MismatchError):
        run_local(2, main)


def test_works_advance_while_nobody_waits() -> None:
    """A rank that computes lets the others' reduction through."""

    def main(comm: Communicator) -> None:
        work = comm.allreduce(np.full(300_000, comm.rank + 1.0), blocking=False)
        end = time.monotonic() + 20
        if comm.rank == 0:  # computes, and asks for nothing
            while not work.ended and time.monotonic() < end:
                time.sleep(0.01)
            assert work.ended
        assert (work.wait() == 6).all()

    run_local(3, main)


def test_the_background_thread_ends_with_the_communicator() -> None:
    before = set(threading.enumerate())  # of tests that leave a rank hanging on purpose
    run_local(3, lambda comm: comm.allreduce(np.ones(9), blocking=False).wait())
    names = [thread.name for thread in set(threading.enumerate()) - before]
    assert "ringfold-progress" not in names


def test_closed_and_forked_communicators_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(comm: Communicator) -> Communicator:
        comm.close()
        comm.close()
        return comm

    (comm,) = run_local(1, main)
    with pytest.raises(CommError, match="rank 0: the communicator is closed"):
        comm.allreduce(np.ones(3))
    with pytest.raises(CommError, match="is closed"):  # the first step told
        comm.plan("allreduce", np.ones(3))
    with pytest.raises(CommError, match="is closed"), comm:
        raise AssertionError("entered")
    (comm,) = run_local(1, lambda comm: comm)
    comm._runner.refuse("")
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(CommError, match="fork of rank 0"):
        comm.barrier()


def test_of_several_threads_that_close_a_group_one_does() -> None:
    def main(comm: Communicator) -> None:
        close, started = comm._close, list[int]()

        def slowly(*, together: bool) -> None:
            started.append(threading.get_ident())
            time.sleep(0.1)
            close(together=together)

        comm._close = slowly  # type: ignore[method-assign]
        threads = [threading.Thread(target=comm.close) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(started) == 1 and comm._runner.closed

    run_local(1, main)


def test_bad_arguments_are_refused_before_anything_is_sent() -> None:
    def main(comm: Communicator) -> None:
        x = np.ones(4)
        for call, error, text in (
            (lambda: comm.allreduce(x, "avg"), ValueError, "unknown op 'avg'"),
            (lambda: comm.allreduce(x, algorithm="foo"), ValueError, "there is: ring"),
            (lambda: comm.allreduce(x, x), TypeError, "op: expected one of sum.*, got ndarray"),
            (lambda: comm.allreduce(torch.ones(2), []), TypeError, "op: .*got list"),
            (lambda: comm.reduce_scatter(x, len), TypeError, "got builtin_function"),
            (lambda: comm.allreduce(x, algorithm=["ring"]), TypeError, "a Schedule or None, got l"),
            (lambda: comm.reduce(x, "sum"), TypeError, "root: expected a whole number, got 'sum'"),
            (lambda: comm.isend(x, None), TypeError, "dst: expected a whole number, got None"),
            (lambda: comm.recv(x, 0, 1.0), TypeError, "tag: expected a whole number, got 1.0"),
            (lambda: comm.send(x, 5), ValueError, r"dst 5 is outside 0\.\.1"),
            (lambda: comm.recv(x, -1), ValueError, r"src -1 is outside"),
            (lambda: comm.send(x, 0, tag=-1), ValueError, "tag -1 is outside"),
            (lambda: comm.alltoall(np.ones((3, 2))), ValueError, r"first axis of 2.*\(3, 2\)"),
            (lambda: comm.plan("send", x), ValueError, "cannot plan 'send'"),
            (lambda: comm.allreduce([1, 2]), TypeError, "got list"),
            (lambda: comm.split(1.5), TypeError, "color: expected a whole number, got 1.5"),
            (lambda: comm.split(0, "a"), TypeError, "key: expected a whole number, got 'a'"),
            (lambda: comm.split(-1), ValueError, r"color -1 is outside 0\.\.2147483647"),
            (lambda: comm.split(0, 1 << 31), ValueError, "key 2147483648 is outside -2147483648"),
            (lambda: comm.empty(2.0), TypeError, "float"),
            (
                lambda: comm.allreduce(x, algorithm=build("allreduce", "ring", 3)),
                ScheduleError,
                "the schedule's size is 3, this call's is 2",
            ),
            (
                lambda: comm.allreduce(x, algorithm=build("broadcast", "tree", 2)),
                ScheduleError,
                "the schedule's collective is broadcast, this call's is allreduce",
            ),
            (lambda: comm.scatter(np.ones((2, 3)), algorithm="foo"), ValueError, "there is: tree"),
            (
                lambda: comm.scatter(np.ones((2, 3)), algorithm=build("scatter", "tree", 3)),
                ScheduleError,
                "the schedule's size is 3, this call's is 2",
            ),
        ):
            with pytest.raises(error, match=text):
                call()
        comm.allreduce(x)
        assert (x == 2).all()

    run_local(2, main)


def test_torch_tensors_come_back_as_tensors() -> None:
    def main(comm: Communicator) -> None:
        x = torch.full((2, 3), comm.rank + 1.0, dtype=torch.bfloat16)
        assert comm.allreduce(x, "mean") is x and (x == 1.5).all()
        rows = comm.allgather(x)
        assert isinstance(rows, torch.Tensor) and rows.dtype == x.dtype and rows.shape == (2, 2, 3)
        assert comm.reduce_scatter(x).shape == (3,)
        mine = comm.scatter(torch.arange(4).reshape(2, 2) if comm.rank == 1 else None, root=1)
        assert isinstance(mine, torch.Tensor) and mine.tolist() == [
            2 * comm.rank,
            2 * comm.rank + 1,
        ]
        made = comm.empty((2, 2), torch.float16)
        assert isinstance(made, torch.Tensor) and made.dtype == torch.float16
        assert comm.empty(3).dtype == np.float32
        assert comm.empty(np.int64(5)).shape == comm.empty([np.int32(5)]).shape == (5,)
        assert comm.empty(torch.Size([2, 0])).shape == (2, 0) and comm.empty(()).shape == ()

    run_local(2, main)
