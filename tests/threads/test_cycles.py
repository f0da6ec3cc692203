"""Ranks that wait for each other in calls of different groups, and those that only seem to."""

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

SECONDS = 5.0
HERE = Path(__file__).name
LONG = 1.3
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


CALLS = [reduce, wait, by_ring, gather, Communicator.barrier, part]


@pytest.mark.parametrize("first", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("second", [reduce, part], ids=lambda call: call.__name__)
def test_groups_in_another_order(
    first: Callable[[Communicator], None], second: Callable[[Communicator], None]
) -> None:
    def main(one: Communicator, two: Communicator) -> None:
        start = time.monotonic()
        with pytest.raises(MismatchError, match="ranks wait for each other, in calls of") as caught:
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
    return Standing(rank, wait, group, row(sequence))


def test_a_probe_is_sent_on_by_who_waits_and_has_not_made_the_call() -> None:
    sent: list[tuple[list[int], Probe]] = []
    begun = {"a": 3, "b": 7, "closed": None}
    cycles = Cycles(2, lambda ranks, probe: sent.append((list(ranks), probe)), begun.get)
    cycles.wait("b", row(7), (1, 2), 0.0)
    own = Standing(2, 1, "b", row(7), (1, 2))
    for first, expected in [
        (waiting(0, "a", 4), True),  # which this rank has not made
        (waiting(0, "a", 3, wait=2), False),  # which it has
        (waiting(1, "closed", 9), False),  # of which it knows nothing
        (waiting(3, "a", 4), False),  # whose own probe comes round to it from this rank
        (waiting(0, "a", 4), False),  # as just now
        (waiting(0, "a", 4, wait=3), True),  # another wait
    ]:
        sent.clear()
        probe = decode(encode(Probe((first,))))
        assert isinstance(probe, Probe)
        cycles.hear(probe)
        assert cycles.look(lambda: [5, 6]) == ()
        assert sent == ([([5, 6], Probe((first, own)))] if expected else [])


def test_a_probe_that_comes_back_has_found_a_cycle_while_the_wait_is_the_same() -> None:
    cycles = Cycles(0, lambda ranks, probe: None, {"a": 4, "b": 6}.get)
    cycles.wait("a", row(4), (0, 1), 0.0)
    for last, found in [(waiting(1, "b", 6), False), (waiting(1, "b", 7), True)]:
        chain = waiting(0, "a", 4), last
        cycles.hear(Probe(chain))
        assert cycles.look(lambda: []) == (chain if found else ())
    cycles.hear(Probe(chain))
    cycles.wait("a", row(4), (0, 1), 0.0)
    assert cycles.look(lambda: []) == ()


def test_a_probe_that_came_long_before_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    cycles = Cycles(0, lambda ranks, probe: None, {"b": 6}.get)
    cycles.wait("a", row(4), (0, 1), 0.0)
    cycles.hear(Probe((waiting(0, "a", 4), waiting(1, "b", 7))))
    monkeypatch.setattr(time, "monotonic", lambda: now + 2)
    assert cycles.look(lambda: []) == ()


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
        ("send", 5, 2, []),
    ],
)
def test_whose_call_a_rank_needs(
    operation: str, elements: int, root: int, expected: list[int]
) -> None:
    assert needs(Signature(operation, "", "float32", elements, root), 1, 3) == expected
