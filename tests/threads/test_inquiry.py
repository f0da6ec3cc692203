"""What ranks tell each other while they wait, with the watchdog's part played by a thread."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from ringfold import Communicator, run_local
from ringfold.comm.deadlocks import Deadlocks
from ringfold.comm.inquiry import Inquiry
from ringfold.comm.notices import Called, Verdict, decode, encode
from ringfold.comm.trace import Ring
from ringfold.comm.transport.local import LocalTransport, World


def two_ranks() -> tuple[LocalTransport, LocalTransport, Inquiry]:
    world = World(2)
    here, there = (LocalTransport(world, (0, 1), rank) for rank in (0, 1))
    deadlocks = Deadlocks(here, Ring(), lambda group: None, lambda: True)
    return here, there, Inquiry(here, Ring(), deadlocks)


def test_the_watchdog_may_hear_of_groups_while_the_rank_looks_at_what_it_has_heard() -> None:
    """A rank that waited ended with "dictionary changed size during iteration"."""
    here, there, inquiry = two_ranks()
    heard: list[threading.Thread] = []

    class Slow(dict[Any, Any]):
        """Another is told of while this is gone through."""

        def __iter__(self) -> Iterator[Any]:
            for key in super().__iter__():
                there.tell([0], encode(Called("world.9", (), answer=True)))
                heard.append(threading.Thread(target=inquiry.listen))
                heard[-1].start()
                heard[-1].join(0.2)
                yield key

    inquiry._told = Slow({("world.1", 1): ()})
    receipt = SimpleNamespace(operation="allreduce")
    work: Any = SimpleNamespace(
        group="world", home="world", pending=[], transport=here, told=True, receipt=receipt
    )
    inquiry.look(work, 0.0, True)
    assert len(heard) == 1
    heard[0].join()
    assert ("world.9", 1) in inquiry._told


def test_nothing_is_kept_of_a_group_that_is_closed_and_what_comes_late_is_answered() -> None:
    _, there, inquiry = two_ranks()
    for late in (False, True):
        for group in ("world.1", "world.2"):
            there.tell([0], encode(Called(group, ())))
            there.tell([0], encode(Verdict(group, 3, "they differ")))
        inquiry.listen()
        if not late:
            inquiry.forget("world.1")
    assert [group for group, _ in inquiry._told] == ["world.2"] == list(inquiry._verdicts)
    answers = [decode(data) for _, data in there.heard()]
    assert [answer.group for answer in answers if isinstance(answer, Called)] == [
        "world.1",
        "world.2",
    ] * 2


def test_closing_forgets_the_group() -> None:
    def main(comm: Communicator) -> None:
        part = comm.split(0)
        inquiry = comm._progress.inquiry
        assert part is not None and inquiry is not None
        inquiry._settled[part.name] = comm.rank + 1
        part.close()
        assert part.name not in inquiry._settled

    run_local(2, main)
