"""Several works in flight at once, and thousands: in which order they go on."""

import numpy as np
import pytest

from ringfold.comm.letters import Message
from ringfold.comm.progress import Progress
from ringfold.comm.serving import Waiting
from ringfold.comm.transport.local import LocalTransport, World
from ringfold.comm.work import Receipt, Steps, Work
from ringfold.kernels.mailbox_words import Letter
from ringfold.kernels.records import Status


def test_a_start_does_not_advance_all_others_each_time() -> None:
    """4,000 receives posted early took 40 s: each advanced all before it."""
    advanced, count = 0, 1000
    over = False

    def steps() -> Steps:
        nonlocal advanced
        while not over:
            advanced += 1
            yield []

    transport = LocalTransport(World(1), (0,), 0)
    receipt = Receipt("recv", "message", "local", 1, 0)
    progress = Progress(60, threads=False)
    works = [
        progress.start(lambda: Work(steps(), receipt, transport, progress), False)
        for _ in range(count)
    ]
    assert count <= advanced < count**2 / 5  # by chance of the clock; all each time: half of it
    over = True
    for work in works:
        work.wait()
    assert not progress.works


def test_a_start_takes_its_own_first_step_before_the_others() -> None:
    """Two ranks that began to receive, and then to send, received one after the other."""
    order: list[str] = []

    def steps(name: str) -> Steps:
        while name not in over:
            order.append(name)
            yield []

    over: set[str] = set()
    transport = LocalTransport(World(1), (0,), 0)
    receipt = Receipt("recv", "message", "local", 1, 0)
    progress = Progress(60, threads=False)

    def start(name: str) -> Work:
        return progress.start(lambda: Work(steps(name), receipt, transport, progress), False)

    first = start("recv")
    order.clear()
    assert not progress.at_once(steps("send"))
    assert order == ["send", "recv"]
    order.clear()
    second = start("isend")
    assert order[:2] == ["isend", "recv"]
    over.update({"recv", "isend"})
    first.wait(), second.wait()


def test_what_takes_long_to_copy_is_not_copied_by_the_first_step() -> None:
    """A large receive kept the send behind it waiting."""
    calls: list[int] = []

    def advance(address: int) -> int:
        calls.append(address)
        return Status.DONE

    for later in (True, False):
        calls.clear()
        words = np.zeros(Letter.WORDS, np.int64).data
        steps = Message(words, 0, 1, 0, None, advance).steps((3, 4), later)
        if later:
            (waiting,) = next(steps)
            assert not calls and isinstance(waiting, Waiting) and waiting.work.running
        with pytest.raises(StopIteration) as stop:
            next(steps)
        assert stop.value.value == Status.DONE and len(calls) == 1


def test_the_background_holds_no_lock_while_compiled_code_can_go_on() -> None:
    """It copied 16 MiB under the lock that a start in the other thread waited for."""
    transport = LocalTransport(World(1), (0,), 0)
    receipt = Receipt("recv", "message", "local", 1, 0)
    progress = Progress(60, threads=False)
    words = np.zeros(Letter.WORDS, np.int64).data
    advanced = 0

    def advance(_: int) -> int:
        nonlocal advanced
        advanced += 1
        return int(words[Letter.STATUS])

    message = Message(words, 0, 1, 0, None, advance)
    work = progress.start(
        lambda: Work(message.steps((0, 0), True), receipt, transport, progress), True
    )
    assert [one.work for one in progress.look()] == [message] and not advanced
    words[Letter.STATUS] = Status.DONE  # as compiled code has left it
    assert progress.look() == [] and advanced == 1
    assert work.ended
