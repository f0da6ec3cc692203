"""Ranks that wait for each other in different calls, and those that only seem to."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from contract import data

from ringfold import CommTimeout, Communicator, MismatchError, run_local
from ringfold.comm.cycles import Cycles, needs
from ringfold.comm.notices import Probe, Row, Standing, decode, encode
from ringfold.comm.trace import Signature

SECONDS = 20.0
HERE = Path(__file__).name
LONG = 2.0
"""Seconds in which a cycle would have been found."""


def on_two_groups(main: Callable[[Communicator, Communicator], None], ranks: int = 3) -> None:
    def both(comm: Communicator) -> None:
        parts = [comm.split(0, key * comm.rank) for key in (1, -1)]
        assert parts[0] is not None and parts[1] is not None
        main(parts[0], parts[1])

    run_local(ranks, both)


def reduce(group: Communicator) -> None:
    group.allreduce(np.ones(100))


def wait(group: Communicator) -> None:
    group.allreduce(np.ones(100_000), blocking=False).wait()


def by_ring(group: Communicator) -> None:
    group.allreduce(np.ones(1000), algorithm="ring")


def gather(group: Communicator) -> None:
    group.allgather(np.ones(10))


def part(group: Communicator) -> None:
    group.split(0)


CALLS = [wait, by_ring, gather, Communicator.barrier, part]


@pytest.mark.parametrize(
    ("first", "second"),
    [*((call, reduce) for call in CALLS), (part, part)],
    ids=lambda call: call.__name__,
)
def test_groups_in_another_order(
    first: Callable[[Communicator], None], second: Callable[[Communicator], None]
) -> None:
    def main(one: Communicator, two: Communicator) -> None:
        start = time.monotonic()
        with pytest.raises(
            MismatchError, match="ranks wait for each other, in different"
        ) as caught:
            if one.rank == 0:
                first(one)
            second(two)
            first(one)
        assert time.monotonic() - start < SECONDS
        text = str(caught.value)
        for group in (one, two):
            name = re.escape(group.name)
            row = rf"rank \d for rank \d in {name}, in [^;]* at [^;]*{HERE}:\d+ \(#"
            assert re.search(row, text), text

    on_two_groups(main)


def receive(one: Communicator, two: Communicator) -> None:
    ahead, behind = (one.rank + 1) % one.size, (one.rank - 1) % one.size
    one.recv(np.ones(9), behind)
    one.send(np.ones(9), ahead)


def receive_and_reduce(one: Communicator, two: Communicator) -> None:
    if one.rank == 0:
        one.recv(np.ones(9), 1)
    two.allreduce(np.ones(9))
    if one.rank == 1:
        one.send(np.ones(9), 0)


@pytest.mark.parametrize("calls", [receive, receive_and_reduce], ids=lambda c: c.__name__)
def test_messages(calls: Callable[[Communicator, Communicator], None]) -> None:
    def main(one: Communicator, two: Communicator) -> None:
        for tag in (0, 1):  # messages that came are none that may come
            work = one.isend(np.ones(9), (one.rank + 1) % one.size, tag)
            one.recv(np.ones(9), (one.rank - 1) % one.size, tag)
            work.wait()
        start = time.monotonic()
        with pytest.raises(MismatchError, match=r"wait for each other.* recv\(float64\)"):
            calls(one, two)
        assert time.monotonic() - start < SECONDS

    on_two_groups(main)


def test_messages_under_way_may_be_what_is_waited_for() -> None:
    """Here they are not, for their tag; but nobody has counted tags."""

    def main(one: Communicator, two: Communicator) -> None:
        if one.rank == 2:
            return
        work = one.isend(np.ones(9), 1 - one.rank, tag=1)
        start = time.monotonic()
        with pytest.raises(CommTimeout):
            one._progress.timeout = LONG
            one.recv(np.ones(9), 1 - one.rank)
        assert time.monotonic() - start >= LONG
        del work

    on_two_groups(main)


def test_what_goes_on_is_no_cycle() -> None:
    def main(one: Communicator, two: Communicator) -> None:
        x, y = data(one.rank, 5, np.int64), data(one.rank, 5, np.int64)
        sums = sum(data(rank, 5, np.int64) for rank in range(one.size))
        # Each begins both before it waits, in another order.
        first, second = (one, two) if one.rank == 0 else (two, one)
        works = {first: first.allreduce(x, blocking=False)}
        works[second] = second.allreduce(y, blocking=False)
        time.sleep(LONG if one.rank == 0 else 0)
        works[second].wait()
        works[first].wait()
        np.testing.assert_array_equal(x, sums)
        np.testing.assert_array_equal(y, sums)

    on_two_groups(main)


def test_a_wait_that_may_end_is_no_cycle() -> None:
    """The program waits for so long, and then calls what the others wait for."""

    def main(one: Communicator, two: Communicator) -> None:
        x = np.ones(3)
        if one.rank == 0:
            work = one.allreduce(x, blocking=False)
            with pytest.raises(CommTimeout):
                work.wait(timeout=LONG)
            two.barrier()
            work.wait()
        else:
            two.barrier()
            one.allreduce(x)
        assert (x == one.size).all()

    on_two_groups(main)


def test_where_another_thread_calls_there_is_no_cycle() -> None:
    def main(one: Communicator, two: Communicator) -> None:
        x = np.ones(3)
        if one.rank != 0:
            two.barrier()
            two.barrier()
            one.allreduce(x)
        else:
            ready = threading.Event()

            def late() -> None:
                two.barrier()
                ready.set()
                time.sleep(LONG)
                two.barrier()

            other = threading.Thread(target=late)
            other.start()
            ready.wait()
            one.allreduce(x)
            other.join()
        assert (x == one.size).all()

    on_two_groups(main)


def row(sequence: int) -> Row:
    return Row(
        sequence, Signature("allreduce", "sum", "float32", 5), f"train.py:{sequence}", "ring"
    )


def waiting(rank: int, group: str, sequence: int, wait: int = 1) -> Standing:
    return Standing(rank, rank, wait, group, row(sequence), members=(0, 1, 2))


def test_a_probe_is_sent_on_by_who_waits_and_has_not_made_the_call() -> None:
    sent: list[tuple[list[int], Probe]] = []
    begun = {"a": 3, "b": 6}
    cycles = Cycles(
        2,
        lambda ranks, probe: sent.append((list(ranks), probe)),
        lambda one: begun[one.group] < one.row.sequence,
    )
    own = waiting(2, "b", 7)
    for number, first, expected in [
        (1, waiting(0, "a", 4), True),  # which this rank has not made
        (2, waiting(0, "a", 3), False),  # which it has
        (3, waiting(3, "a", 4), False),  # whose own probe comes round to it from this rank
        (4, waiting(0, "a", 4), True),
        (4, waiting(0, "a", 4), False),  # by another way
    ]:
        sent.clear()
        probe = decode(encode(Probe(number, (first,))))
        assert isinstance(probe, Probe)
        cycles.hear(probe)
        assert cycles.look(own, 0.0, lambda: [5, 6]) == ()
        assert sent == ([([5, 6], Probe(number, (first, own)))] if expected else [])


def test_a_second_probe_that_comes_back_has_found_a_cycle_while_the_waits_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[Probe] = []
    cycles = Cycles(0, lambda ranks, probe: sent.append(probe), lambda one: one.row.sequence > 6)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def back(number: int, last: Standing, wait: int = 1) -> bool:
        """Tell what this rank finds by its probe of that number, which it sends where it is due."""
        nonlocal now
        own = waiting(0, "a", 4, wait)
        now += 0.6
        cycles.look(own, 0.0, lambda: [1])
        cycles.hear(Probe(number, (own, last)))
        found = cycles.look(own, 0.0, lambda: [1])
        assert found in ((), (own, last))
        return bool(found)

    assert not back(0, waiting(1, "b", 6)) and not back(1, waiting(1, "b", 6))  # it has called
    assert not back(1, waiting(1, "b", 7))
    assert not back(2, waiting(1, "b", 7, wait=2))  # another wait
    assert not back(2, waiting(1, "b", 7, wait=2))  # by another way
    assert back(3, waiting(1, "b", 7, wait=2))
    assert not back(4, waiting(1, "b", 7, wait=2), wait=2)  # of this rank
    numbers = [probe.number for probe in sent]
    assert numbers == list(range(1, len(sent) + 1)) and len(sent) >= 4


def test_a_probe_that_came_long_before_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    sent: list[Probe] = []
    cycles = Cycles(1, lambda ranks, probe: sent.append(probe), lambda one: True)
    for number, later in enumerate((0.0, 0.5, 2.0), 1):
        monkeypatch.setattr(time, "monotonic", lambda: now)
        cycles.hear(Probe(number, (waiting(0, "b", 7),)))
        monkeypatch.setattr(time, "monotonic", lambda later=later: now + later)
        cycles.look(waiting(1, "a", 4), 0.0, lambda: [])
    assert [probe.number for probe in sent if len(probe.chain) == 2] == [1, 2]


def test_what_a_rank_has_yet_to_call() -> None:
    def main(comm: Communicator) -> None:
        runner, other = comm._runner, 1 - comm.rank

        def lacks(operation: str, sequence: int, count: int = 0) -> bool:
            called = Row(sequence, Signature(operation, "", "float32", 5), "train.py:1", "")
            return runner.lacks(Standing(other, other, 1, comm.name, called, count))

        begun = int(runner.counter[0])
        work = comm.allreduce(np.ones(3), blocking=False)
        assert not lacks("allreduce", begun + 1) and lacks("barrier", begun + 2)
        work.wait()
        assert lacks("recv", 1, 0)  # it has sent nothing
        comm.isend(np.ones(3), other)
        assert not lacks("recv", 1, 0) and lacks("recv", 1, 1)
        comm.barrier()
        assert lacks("send", 1, 1)  # it receives nothing
        get = comm.irecv(np.ones(3), other, tag=1)
        assert not lacks("send", 1, 1) and not lacks("send", 2, 2)
        comm.barrier()
        comm.recv(np.ones(3), other)
        comm.isend(np.ones(3), other, tag=1)
        get.wait()
        assert not lacks("send", 2, 2) and lacks("send", 3, 3)
        comm.barrier()
        comm._transport.soiled = True  # as after an error
        assert not lacks("barrier", 99)

    run_local(2, main)


@pytest.mark.parametrize(
    ("operation", "elements", "root", "expected"),
    [
        ("allreduce", 5, -1, [0, 2]),
        ("allreduce", 0, -1, []),
        ("barrier", 0, -1, [0, 2]),
        ("close", 0, -1, [0, 2]),
        ("reduce_scatter", 3, -1, [0, 2]),
        ("reduce_scatter", 2, -1, []),  # this rank's part may be nothing
        ("broadcast", 5, 2, [2]),
        ("broadcast", 5, 1, []),
        ("gather", 5, 1, [0, 2]),
        ("gather", 5, 2, []),
        ("scatter", 0, 0, [0]),
        ("send", 5, 2, [2]),
        ("recv", 0, 1, []),  # from itself
    ],
)
def test_whose_call_a_rank_needs(
    operation: str, elements: int, root: int, expected: list[int]
) -> None:
    assert needs(Signature(operation, "", "float32", elements, root), 1, 3) == expected


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", ["send", "recv"])
def test_a_rank_that_waits_for_itself(name: str, size: int) -> None:
    """A ring of one rank that sends before it receives waited until time was up."""

    def main(comm: Communicator) -> None:
        x, y = np.full(3, comm.rank), np.zeros(3, int)
        work = comm.irecv(y, comm.rank)
        comm.send(x, comm.rank)
        assert (work.wait() == x).all()
        work = comm.isend(x, comm.rank, 2)
        assert (comm.recv(y, comm.rank, 2) == x).all()
        work.wait()
        text = f"rank {comm.rank} waits for itself, in world, in {name}"
        with pytest.raises(MismatchError, match=text):
            getattr(comm, name)(x, comm.rank)

    run_local(size, main)
