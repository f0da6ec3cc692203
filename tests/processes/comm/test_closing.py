"""The end of a group: whom it waits for, and what it leaves alone."""

import gc
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from contract import data, reopened
from numpy.typing import NDArray

from ringfold import CommError, Communicator, MismatchError
from ringfold.comm.serving import Waiting

Array = NDArray[np.float64]

pytestmark = pytest.mark.usefixtures("several")


@pytest.fixture
def several(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank waits for nobody")


def late(comm: Communicator, seconds: float = 0.2) -> None:
    """Let the others wait for rank 1 until they look for lost peers."""
    if comm.rank == 1:
        time.sleep(seconds)


def use(group: Communicator) -> None:
    late(group)
    x = data(group.rank, 1001, np.float64)
    group.allreduce(x)
    expected = sum(data(rank, 1001, np.float64) for rank in range(group.size))
    np.testing.assert_allclose(x, expected)


def use_parts(group: Communicator) -> None:
    late(group)
    with group.split(0, -group.rank) as part:
        assert part.rank == group.size - 1 - group.rank
        use(part)


@pytest.mark.parametrize("then", [use, use_parts, late], ids=lambda then: then.__name__)
def test_a_group_outlives_the_one_it_was_split_from(
    comm: Communicator, then: Callable[[Communicator], None]
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Communicator() as world:
        part = world.split(0)
    assert part is not None
    then(part)
    part.close()
    with pytest.raises(CommError, match="closed"):
        world.barrier()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_ranks_without_a_group_close_the_world_at_once(comm: Communicator) -> None:
    world = Communicator()
    part = world.split(None if world.rank == 0 else 7)
    start = time.monotonic()
    world.close()
    assert time.monotonic() - start < 3
    if part is not None:
        part.allreduce(np.ones(3))
        part.close()


def test_groups_that_were_dropped_are_counted_where_mpi_refuses_one(comm: Communicator) -> None:
    """MPICH holds 2048: "Too many communicators" did not say that dropped groups keep theirs."""
    from mpi4py import MPI

    from ringfold.comm.transport.mpi_departures import groups_held
    from ringfold.comm.transport.mpi_errors import raising

    def refused() -> tuple[int, int]:
        with pytest.raises(CommError) as caught, raising(MPI, "splitting", groups_held):
            raise MPI.Exception(MPI.ERR_OTHER)
        found = re.search(
            r"MPI holds (\d+) groups .* (\d+) of which were dropped", str(caught.value)
        )
        assert found is not None
        return int(found[1]), int(found[2])

    held, dropped = refused()
    part = comm.split(0)
    assert refused() == (held + 2, dropped)
    del part
    assert refused() == (held + 2, dropped + 2)


@pytest.fixture(params=["shared", "messages"])
def group(comm: Communicator, request: pytest.FixtureRequest) -> Iterator[Communicator]:
    with reopened(comm, shared=request.param == "shared") as group:
        yield group


def test_closing_a_group_waits_for_no_other_one(group: Communicator) -> None:
    """A receive of the world, whose message came after the close, stood in the way of it."""
    part = group.split(0)
    assert part is not None
    work = group.irecv(np.zeros(3), 1) if group.rank == 0 else None
    start = time.monotonic()
    part.close()
    assert time.monotonic() - start < 3
    if group.rank == 1:
        group.send(data(1, 3, np.float64), 0)
    if work is not None:
        np.testing.assert_array_equal(work.wait(), data(1, 3, np.float64))


def test_what_was_sent_before_the_close_arrives_and_other_receives_end(
    group: Communicator,
) -> None:
    count = 400_003
    part = group.split(0)
    assert part is not None
    ahead, behind = (part.rank + 1) % part.size, (part.rank - 1) % part.size
    gets = [part.irecv(np.zeros(count), behind, tag) for tag in (0, 1)]
    late(part)
    put = part.isend(data(part.rank, count, np.float64), ahead, 0)
    start = time.monotonic()
    part.close()
    assert time.monotonic() - start < 5
    put.wait()
    np.testing.assert_array_equal(gets[0].wait(), data(behind, count, np.float64))
    text = rf"rank {part.rank}: {part.name} was closed .* recv .* for ranks \[{behind}\]"
    with pytest.raises(CommError, match=text):
        gets[1].wait()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "messages"])
def test_ranks_that_reduce_meanwhile_are_told_and_are_waited_for(
    comm: Communicator, capfd: pytest.CaptureFixture[str], *, shared: bool
) -> None:
    """Who had closed went on to close its node, and they waited for each other."""
    for calls in (1, 2):  # whoever goes on after the error is told again
        with reopened(comm, shared=shared) as group:
            start = time.monotonic()
            x = np.ones(1000)
            group.allreduce(x)
            if group.rank != 1:
                for _ in range(calls):
                    with pytest.raises(MismatchError, match=r"rank 1: close\(\)"):
                        group.allreduce(x)
            group.close()
            assert time.monotonic() - start < 10
    assert "without the others" not in capfd.readouterr().err


def test_who_closes_a_group_that_others_have_left_after_an_error(comm: Communicator) -> None:
    """Nothing was judged in the group, for the error in it, until time was up in it and elsewhere.

    All learn of it in the same call of the group that it was split from, which then goes on.
    """
    with reopened(comm, shared=False) as group:
        part = group.split(0)
        assert part is not None
        start = time.monotonic()
        if group.rank != 1:
            with pytest.raises(MismatchError, match=r"rank 1: close\(\)"):
                part.allreduce(np.ones(3))
        else:
            part.close()
        with pytest.raises(MismatchError, match=r"wait for each other.* in close\(\)"):
            group.allreduce(np.ones(1000), algorithm="ring")  # no rank ends without all others
        part.close()
        assert group.allreduce(np.ones(3))[0] == group.size
        assert time.monotonic() - start < 10


def test_a_group_is_closed_without_the_others_once(
    comm: Communicator, capfd: pytest.CaptureFixture[str]
) -> None:
    """They were waited for again in the group of each node, for as long."""
    with reopened(comm, shared=False, timeout=1.0) as group:
        part = group.split(0)
        assert part is not None
        if group.rank == 1:
            part.close()
            told = capfd.readouterr().err
            assert told.count("without the others") == 1 and f"closing {part.name} " in told
        comm.barrier()


def ping(group: Communicator, x: Array) -> None:
    ahead, behind = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    group.sendrecv(x, ahead, np.empty_like(x), behind)


def listen(group: Communicator, x: Array) -> None:
    group.recv(x, (group.rank + 1) % group.size)


def add(group: Communicator, x: Array) -> None:
    group.allreduce(x)


def spread(group: Communicator, x: Array) -> None:
    group.scatter(np.ones((group.size, 8)) if group.rank == 0 else None)


@pytest.mark.parametrize("call", [ping, listen, add, spread], ids=lambda call: call.__name__)
def test_what_another_thread_goes_on_to_call_reaches_no_later_group(
    comm: Communicator, call: Callable[[Communicator, Array], None]
) -> None:
    """It took the next group's messages: they lay where those of the closed one had lain."""
    for pause in (0.0, 0.004):
        group, ends = comm.split(0), list[str]()
        assert group is not None

        def go_on(group: Communicator = group, ends: list[str] = ends) -> None:
            x = np.zeros(8)
            while not ends:
                try:
                    call(group, x)
                except CommError as error:  # once it may be that this was in flight, or differs
                    if str(error).endswith("the communicator is closed"):
                        ends.append(str(error))

        thread = threading.Thread(target=go_on)
        thread.start()
        time.sleep(pause)
        group.close()
        for number in range(2):
            with comm.split(0) as later:
                x, got = np.full(8, later.rank + number + 1.0), np.empty(8)
                ahead, behind = (later.rank + 1) % later.size, (later.rank - 1) % later.size
                for _ in range(3):
                    assert (later.sendrecv(x, ahead, got, behind) == behind + number + 1).all()
                assert (later.allreduce(np.full(8, 1.0)) == later.size).all()
        thread.join(10)
        assert not thread.is_alive() and ends


def mapped() -> int:
    """Count the memories of ranks that this process has mapped."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum("memfd:ringfold (" in line for line in maps)


def test_closing_unmaps_the_memory_of_the_node(comm: Communicator) -> None:
    """Each is as large as the machine's: what waited for the garbage collector filled the space."""
    gc.collect()
    gc.disable()
    try:
        before = mapped()
        with Communicator() as world:
            part = world.split(0)
            assert part is not None
            x = data(world.rank, 100_003, np.float64)
            world.allreduce(x)
            part.isend(x, (part.rank + 1) % part.size)
            part.recv(x.copy(), (part.rank - 1) % part.size)
            lent = world.empty(7)
            lent[:] = world.rank
            assert mapped() == before + world.node.size
            part.close()
        assert mapped() == before + 1
        assert (lent == world.rank).all()
        del lent
        assert mapped() == before
    finally:
        gc.enable()


def test_what_the_background_goes_on_with_stays_mapped(comm: Communicator) -> None:
    """Where it was late, as it compiled its kernel, it set a bell in memory that was gone."""
    before = mapped()
    with Communicator() as world:
        ahead, behind = (world.rank + 1) % world.size, (world.rank - 1) % world.size
        count = 300_003
        get = world.irecv(np.zeros(count), behind)
        listed = [request for request in get.pending if isinstance(request, Waiting)]
        world.barrier()
        world.send(data(world.rank, count, np.float64), ahead)
        np.testing.assert_array_equal(get.wait(), data(behind, count, np.float64))
        expected = before + (world.node.size if listed else 0)
    assert mapped() == expected
    listed.clear()
    assert mapped() == before
