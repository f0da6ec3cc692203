"""What comes in between the steps of a work: an interrupt, a signal handler, a finalizer."""

import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import pytest

from ringfold import CommError, CommTimeout, Communicator, run_local
from ringfold.comm.progress import Progress
from ringfold.comm.transport.local import LocalTransport, World
from ringfold.comm.work import Receipt, Steps, Work


def in_flight(progress: Progress, comes_in: Callable[[], None], late: int = 1) -> Work:
    """Start a work that something comes in at, as a signal would.

    late: how often it is advanced without that.
    """

    def steps() -> Steps:
        for _ in range(late):
            yield []
        comes_in()
        return 5

    transport = LocalTransport(World(1), (0,), 0)
    receipt = Receipt("recv", "message", "local", 1, 0)
    return progress.start(lambda: Work(steps(), receipt, transport, progress), False)


def throwing(error: BaseException) -> Callable[..., Any]:
    def throw(*_: object) -> None:
        raise error

    return throw


def time_is_up(*_: object) -> None:
    raise TimeoutError("the limit of the step")


@pytest.fixture
def alarm() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, time_is_up)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("what", [KeyboardInterrupt, TimeoutError])
def test_an_interrupt_is_raised_by_the_wait_that_it_comes_in_not_by_the_work_it_meets(
    alarm: None, what: type[BaseException]
) -> None:
    """Ctrl-C ended an irecv posted early, and the allreduce that was waited for went on."""

    def interrupt() -> None:
        if what is TimeoutError:
            signal.raise_signal(signal.SIGALRM)
        raise KeyboardInterrupt

    progress = Progress(60, threads=False)
    early = in_flight(progress, interrupt, late=2)
    waited_for = in_flight(progress, lambda: None)
    with pytest.raises(what):
        waited_for.wait()
    assert isinstance(early.exception(), what)
    assert waited_for.exception() is None and waited_for.wait() == 5
    assert not progress.works


class Handler:
    """A handler that is an object, or a method of one."""

    def __call__(self, number: int, frame: object) -> None:
        time_is_up()

    def method(self, number: int, frame: object) -> None:
        time_is_up()


def of_its_own(what: str, number: int, frame: object) -> None:
    raise TimeoutError(what)


def once(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise TimeoutError


def forgetful(number: int, frame: object) -> None:
    del frame
    raise TimeoutError


@pytest.mark.parametrize(
    "handler",
    [partial(of_its_own, "limit"), Handler(), Handler().method, once, forgetful],
    ids=["partial", "object", "method", "once", "forgetful"],
)
def test_what_any_kind_of_handler_raises_is_raised_where_the_rank_waits(
    alarm: None, handler: Callable[[int, object], None]
) -> None:
    """That of a partial ended another work, in silence, and the wait went on to its timeout."""
    signal.signal(signal.SIGALRM, handler)
    progress = Progress(60, threads=False)
    early = in_flight(progress, lambda: signal.raise_signal(signal.SIGALRM), late=2)
    waited_for = in_flight(progress, lambda: None)
    with pytest.raises(TimeoutError):
        waited_for.wait()
    assert isinstance(early.exception(), TimeoutError)
    assert waited_for.wait() == 5


def test_what_comes_right_behind_a_step_breaks_the_steps_off_at_once() -> None:
    """They were kept as they were by the traceback, as long as anybody looked at that."""
    ended: list[str] = []

    class Interrupted:
        """Steps that a signal comes behind, before what they have yielded is taken."""

        def send(self, patient: bool | None) -> Any:
            raise KeyboardInterrupt

        def close(self) -> None:
            ended.append("closed")

    progress = Progress(60, threads=False)
    transport, steps = LocalTransport(World(1), (0,), 0), cast(Any, Interrupted())
    receipt = Receipt("recv", "message", "local", 1, 0)
    with pytest.raises(KeyboardInterrupt) as caught:
        progress.start(lambda: Work(steps, receipt, transport, progress), False)
    assert ended == ["closed"], caught
    progress.advance()
    assert not progress.works


def test_a_receive_that_is_interrupted_leaves_its_message_to_the_next() -> None:
    """The next one got the message behind, and the one after that waited in vain."""

    def main(comm: Communicator) -> None:
        pause = comm._transport.pause
        for error in (KeyboardInterrupt(), CommTimeout("time is up")):
            comm._transport.pause = throwing(error)  # type: ignore[method-assign]
            with pytest.raises(type(error)):
                comm.recv(np.zeros(3), 0)
            assert not comm._progress.works
        comm._transport.pause = pause  # type: ignore[method-assign]
        for k in (1, 2):
            comm.isend(np.full(3, k), 0)
        assert [comm.recv(np.zeros(3, int), 0)[0] for _ in range(2)] == [1, 2]

    run_local(1, main)


def test_a_receive_that_is_interrupted_before_another_refuses_those_behind() -> None:
    def main(comm: Communicator) -> None:
        first, second = (comm.irecv(np.zeros(3), 0) for _ in range(2))
        first.pending[0].done = throwing(KeyboardInterrupt())  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            first.wait()
        for k in (1.0, 2.0):
            comm.isend(np.full(3, k), 0)
        assert second.wait()[0] == 2
        with pytest.raises(CommError, match="an earlier receive from rank 0 with tag 0 was broken"):
            comm.recv(np.zeros(3), 0)
        comm.isend(np.full(3, 3.0), 0, 1)
        assert comm.recv(np.zeros(3), 0, 1)[0] == 3

    run_local(1, main)


def test_a_signal_handler_may_ask_whether_works_are_done() -> None:
    """It advanced the work that it had interrupted: "generator already executing"."""
    progress = Progress(60, threads=False)
    asked: list[bool] = []
    works: list[Work] = []

    def ask() -> None:
        asked.extend(work.done() for work in works)

    works += [in_flight(progress, ask, late=2), in_flight(progress, ask)]
    assert [work.wait() for work in reversed(works)] == [5, 5]
    assert asked == [False] * 2 + [True, False] and not progress.works


def test_an_error_of_a_works_own_waits_for_who_waits_for_it() -> None:
    def fail() -> None:
        time_is_up()

    progress = Progress(60, threads=False)
    early = in_flight(progress, fail, late=2)
    assert in_flight(progress, lambda: None).wait() == 5
    with pytest.raises(TimeoutError):
        early.wait()


@pytest.mark.parametrize("call", ["start", "wait", "close"])
def test_a_signal_handler_that_would_wait_for_what_it_interrupts_is_told_so(call: str) -> None:
    seen: list[Any] = []

    def main(comm: Communicator) -> None:
        other = comm.irecv(np.zeros(3), 0)
        calls: dict[str, Callable[[], Any]] = {
            "start": lambda: comm.allreduce(np.ones(3)),
            "wait": other.wait,
            "close": comm.close,
        }

        def handler() -> None:
            with pytest.raises(CommError, match="signal handler or a finalizer") as caught:
                calls[call]()
            seen.append(caught.value)

        assert in_flight(comm._progress, handler).wait() == 5
        comm.send(np.full(3, 7.0), 0)
        assert (other.wait() == 7).all()

    run_local(1, main)
    assert len(seen) == 1
