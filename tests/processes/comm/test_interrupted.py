"""What the handler of a signal raises inside of a call: memory that peers may use stays theirs."""

import gc
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ringfold import CommError, Communicator
from ringfold.kernels import meeting

pytestmark = pytest.mark.usefixtures("sharing")


class Stop(Exception):
    """What the handler raises."""


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
