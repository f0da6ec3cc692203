"""What the handler of a signal raises inside of a call: memory that peers may use stays theirs."""

import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from ringfold import CommError, CommTimeout, Communicator, Settings
from ringfold.comm import outbox
from ringfold.comm.boxes import BUFFERED_BYTES, IN_PLACE_BYTES, Boxes
from ringfold.comm.ordinals import Ordinals
from ringfold.kernels import mailbox, meeting

pytestmark = pytest.mark.usefixtures("sharing")


class Stop(Exception):
    """What the handler raises."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage meanwhile: Python ignores what is raised in what the collector calls."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture
def sharing(comm: Communicator) -> None:
    if comm.size == 1 or comm._sharing is None or comm._sharing.board is None:
        pytest.skip("ranks share no memory")


@pytest.fixture
def interrupt() -> Iterator[Callable[..., Any]]:
    """Return what lets a signal come behind a call of a compiled function."""

    def stop(*_: object) -> None:
        raise Stop

    def behind(compiled: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: object) -> Any:
            result = compiled(*arguments)
            if threading.current_thread() is threading.main_thread():  # the background goes on
                signal.raise_signal(signal.SIGALRM)
            return result

        return lambda: call

    before = signal.signal(signal.SIGALRM, stop)
    yield behind
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("behind", ["launch_kernel", "advance_kernel"])
@pytest.mark.parametrize("count", [4, 2_000_000])
@pytest.mark.parametrize("call", ["allreduce", "allgather", "allreduce in flight"])
def test_a_collective_that_is_interrupted_keeps_its_array_and_refuses_what_follows(
    comm: Communicator,
    interrupt: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    behind: str,
    count: int,
    call: str,
) -> None:
    """Half of an array that came to lie in the freed memory became a peer's sum.

    Later calls of the group waited until time was up, for this rank itself.
    """
    call, flying = call.split()[0], " " in call
    options = {"blocking": False} if flying else {}
    group = comm.split(0)
    assert group is not None
    if comm.rank == 0:
        x = np.full(count, 7.0)
        kept = weakref.ref(x)
        with monkeypatch.context() as patch:
            patch.setattr(meeting, behind, interrupt(getattr(meeting, behind)()))
            with pytest.raises(Stop):
                started = getattr(group, call)(x, **options)
                started.wait()
        del x
        started = None
        gc.collect()
        assert kept() is not None  # peers may read it, or write to it
        for _ in range(2):
            with pytest.raises(CommError, match=f"an earlier {call} was given up halfway"):
                group.allreduce(np.ones(count))
        works = [work for work in comm._progress.works if work.group == group.name]
        assert not works
    comm.barrier()


def test_what_stands_behind_a_collective_that_is_interrupted_is_refused_at_once(
    comm: Communicator, interrupt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its turn never came: it waited until time was up."""
    group = comm.split(0)
    assert group is not None
    if comm.rank == 0:
        works = [group.allreduce(np.ones(count), blocking=False) for count in (4, 5)]
        waiting: Any = works[0].pending[0]
        monkeypatch.setattr(waiting.work, "_advance", interrupt(meeting.advance_kernel())())
        with pytest.raises(Stop):
            works[0].wait()
        with pytest.raises(CommError, match="an earlier allreduce was given up halfway"):
            works[1].wait()
    comm.barrier()


@pytest.mark.parametrize("count", [4, BUFFERED_BYTES])
def test_a_receive_that_is_interrupted_leaves_its_message_to_the_next(
    comm: Communicator,
    interrupt: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    """The next one got the message behind, and the one after that waited in vain."""
    got = np.zeros(count, np.int32)
    if comm.rank == 0:
        with monkeypatch.context() as patch:
            advance = interrupt(mailbox.advance_letter_kernel())()
            patch.setattr(comm._operations.mail._boxes, "_advance", advance)
            with pytest.raises(Stop):
                comm.recv(got, 1, 3)
    comm.barrier()
    if comm.rank == 1:
        works = [comm.isend(np.full(count, k, np.int32), 0, 3) for k in (1, 2)]
        for work in works:
            work.wait()
    if comm.rank == 0:
        assert [comm.recv(got, 1, 3)[0] for _ in range(2)] == [1, 2]
    comm.barrier()


def test_a_receive_that_is_interrupted_when_its_message_has_come_refuses_the_next(
    comm: Communicator, interrupt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = comm.split(0)
    assert group is not None
    if comm.rank == 1:
        group.send(np.full(4, 1.0), 0, 3)
        group.send(np.full(4, 2.0), 0, 3)
        group.send(np.full(4, 3.0), 0, 4)
    comm.barrier()
    if comm.rank == 0:
        with monkeypatch.context() as patch:
            advance = interrupt(mailbox.advance_letter_kernel())()
            patch.setattr(group._operations.mail._boxes, "_advance", advance)
            with pytest.raises(Stop):
                group.recv(np.zeros(4), 1, 3)
        with pytest.raises(CommError, match="an earlier receive from rank 1 with tag 3 was broken"):
            group.recv(np.zeros(4), 1, 3)
        assert (group.recv(np.zeros(4), 1, 4) == 3).all()
    comm.barrier()


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_a_message_that_is_interrupted_halfway_ends_on_both_sides(
    comm: Communicator,
    interrupt: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    side: str,
) -> None:
    """The other side waited until time was up."""
    data = np.zeros(2 * BUFFERED_BYTES, np.uint8)
    me = {0: "sender", 1: "receiver"}.get(comm.rank)
    group = Communicator(settings=Settings(cma=False))  # else it is read in one step
    if me is not None:
        call = group.isend if me == "sender" else group.irecv
        if me == "receiver":  # something is there to begin with
            comm.recv(np.zeros(1), 0, 9)
        with monkeypatch.context() as patch:
            patch.setattr(group._sharing.mail, "_patience", (0, 0))  # it takes a window at most
            if me == side:
                advance = interrupt(mailbox.advance_letter_kernel())()
                patch.setattr(group._operations.mail._boxes, "_advance", advance)
            with pytest.raises(Stop if me == side else CommError) as caught:
                work = None
                if me == "sender":
                    try:
                        work = call(data, 1)
                    finally:
                        comm.isend(np.zeros(1), 1, 9)
                else:
                    work = call(data, 0)
                work.wait()
        if me != side:
            assert "has given a message up halfway" in str(caught.value)
    group.close()


@pytest.mark.parametrize("memory", ["private", "registered"])
def test_what_would_be_read_in_place_is_refused_behind_an_interrupt(
    comm: Communicator, interrupt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    """It read what the sender had written there meanwhile, or what lay there once x was gone."""
    count = 2 * (IN_PLACE_BYTES if memory == "registered" else BUFFERED_BYTES)
    make = comm.empty if memory == "registered" else np.empty
    if comm.rank == 0:
        x: Any = make(count, np.uint8)
        x[:] = 5
        with monkeypatch.context() as patch:
            advance = interrupt(mailbox.advance_letter_kernel())()
            patch.setattr(comm._operations.mail._boxes, "_advance", advance)
            with pytest.raises(Stop):
                comm.send(x, 1)
        x[:] = 9
        del x
        gc.collect()
    comm.barrier()
    if comm.rank == 0:
        comm.send(np.full(count, 6, np.uint8), 1)
    if comm.rank == 1:
        got = np.zeros(count, np.uint8)
        with pytest.raises(CommError, match=r"rank 0 has given a message up halfway"):
            comm.recv(got, 0)
        assert (comm.recv(got, 0) == 6).all()
    comm.barrier()


def test_a_copy_is_received_behind_an_interrupt_of_its_send(
    comm: Communicator, interrupt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender far ahead waits, though all of its message lies in a block of its own by then."""
    monkeypatch.setattr(outbox, "AHEAD", 0)
    if comm.rank == 0:
        works = [comm.isend(np.array([k]), 1, 5) for k in range(2)]
        with monkeypatch.context() as patch:
            advance = interrupt(mailbox.advance_letter_kernel())()
            patch.setattr(comm._operations.mail._boxes, "_advance", advance)
            with pytest.raises(Stop):
                comm.send(np.array([2]), 1, 5)
    comm.barrier()
    if comm.rank == 0:
        works.append(comm.isend(np.array([3]), 1, 5))
    if comm.rank == 1:
        assert [comm.recv(np.zeros(1, int), 0, 5)[0] for _ in range(4)] == [0, 1, 2, 3]
    comm.barrier()
    if comm.rank == 0:
        for work in works:
            work.wait()


@pytest.mark.parametrize("memory", ["private", "registered"])
def test_a_send_that_closing_gives_up_lets_its_array_go(comm: Communicator, memory: str) -> None:
    """It was kept until a receiver had read it, which no receiver of that group can."""
    with Communicator(settings=Settings(timeout=0.2)) as short:
        group = short.split(0)
        assert group is not None
        if group.rank == 0:
            x: Any = np.zeros(2 * BUFFERED_BYTES, np.uint8)
            if memory == "registered":
                x = group.empty(2 * IN_PLACE_BYTES, np.uint8)
            gone = weakref.ref(x)
            with pytest.raises(CommTimeout):
                group.isend(x, 1).wait()
        group.close()
        if group.rank == 0:
            del x
            end = time.monotonic() + 10
            while gone() is not None and time.monotonic() < end:
                time.sleep(0.01)  # the background may be at it for a moment
                gc.collect()
            assert gone() is None


def test_a_known_message_that_is_interrupted_has_been_sent_or_received(
    comm: Communicator, interrupt: Callable[..., Any]
) -> None:
    """Behind the one call that does all of it; the next message is the next one."""
    x, got = np.zeros(4), np.zeros(4)
    with comm.split(0) as group:

        def carry(name: str, array: Any, peer: int, *, interrupted: bool) -> None:
            if not interrupted:
                getattr(group, name)(array, peer)
                return
            express = group._errands.recall(array, name, (peer,)).express
            plain, express._run = express._run, interrupt(express._run)()
            with pytest.raises(Stop):
                getattr(group, name)(array, peer)
            express._run = plain

        for turn in range(10):
            if group.rank == 0:
                x[:] = turn
                carry("send", x, 1, interrupted=turn == 6)
            group.barrier()
            if group.rank == 1:
                carry("recv", got, 0, interrupted=turn == 8)
                assert (got == turn).all()


def test_messages_interrupted_at_any_moment_are_neither_lost_nor_mixed_up(
    comm: Communicator, interrupt: Callable[..., Any]
) -> None:
    """Each is sent until a send has returned; so some come twice, and none is left out."""
    rng, x, got = np.random.default_rng(comm.rank), np.full(4, -1.0), np.full(4, -1.0)
    armed = [False]

    def stop(*_: object) -> None:
        if armed[0]:
            armed[0] = False
            raise Stop

    def disturbed(call: Callable[[], object]) -> bool:
        try:
            try:
                armed[0] = True
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-6, 60e-6))
                call()
                armed[0] = False
                return True
            except Stop:
                return False
        except Stop:  # between the one and the other
            return False

    signal.signal(signal.SIGALRM, stop)
    with comm.split(0) as group, uncollected():
        for _ in range(4):  # kernels are loaded, which Numba does not let interrupt
            if group.rank == 0:
                group.send(x, 1)
            elif group.rank == 1:
                group.recv(got, 0)
        if group.rank == 0:
            for turn in range(500):
                x[:] = turn
                while not disturbed(lambda: group.send(x, 1)):
                    pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        group.barrier()  # so that all is there: a receive that waits may be broken off for good
        if group.rank == 1:
            last = -1
            while last < 499:
                disturbed(lambda: group.recv(got, 0))
                assert (got == got[0]).all() and got[0] in (last, last + 1)
                last = int(got[0])
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_a_handler_that_sends_in_the_middle_of_a_known_send_is_refused(
    comm: Communicator, interrupt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sent with a new tag, which moved the count that the send was about to add to."""
    x, got = np.zeros(4), np.zeros(4)
    count = Ordinals.at

    def disturbed(ordinals: Ordinals, tag: int) -> int:
        found = count(ordinals, tag)
        signal.raise_signal(signal.SIGALRM)
        return found

    with comm.split(0) as group:
        signal.signal(signal.SIGALRM, lambda *_: group.send(np.ones(1), 1, 50))
        for turn in range(6):
            x[:] = turn
            if group.rank == 0:
                if turn == 4:
                    with monkeypatch.context() as patch:
                        patch.setattr(Ordinals, "at", disturbed)
                        with pytest.raises(CommError, match="has interrupted the works"):
                            group.send(x, 1)
                group.send(x, 1)
            elif group.rank == 1:
                group.recv(got, 0)
                assert (got == turn).all()


def test_what_sends_at_once_is_made_while_nothing_else_takes_memory(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread's message could lie in the same pages."""
    made: list[bool] = []
    make = Boxes.express

    def watched(boxes: Boxes, *arguments: Any) -> Any:
        made.append(comm._progress._advancing)
        return make(boxes, *arguments)

    monkeypatch.setattr(Boxes, "express", watched)
    x, got = np.zeros(4), np.zeros(4)
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for _ in range(3):
        comm.isend(x, right, 3)
        comm.recv(got, left, 3)
    assert made == [True, True]
