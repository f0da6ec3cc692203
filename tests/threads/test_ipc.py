"""Ranks that read each other's device memory, ordered by events; the devices are always late."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from contract import FOLDS, data, expected, lengths
from fake_device import (
    AWARE,
    UNAWARE,
    FakeArray,
    FakeGpu,
    FakeNode,
    HostMessages,
    SharedEvent,
    use_fake,
)

from ringfold import CommError, Communicator, Settings, run_local
from ringfold.comm.chunks import bounds
from ringfold.comm.transport.local import LocalTransport

SETTINGS = Settings(timeout=20)


def late(gpu: FakeGpu, values: np.ndarray, registered: bool = True) -> FakeArray:
    return FakeArray(gpu, np.empty_like(values), registered=registered).filled_late(values)


def on_node(size: int, main: Callable[[Communicator, FakeGpu], Any]) -> list[Any]:
    node = FakeNode()
    found = run_local(size, lambda comm: main(comm, use_fake(comm, node=node)), settings=SETTINGS)
    assert node.opened == 0 and not node.opened_events
    return found


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_op_and_length(size: int) -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> None:
        for count in lengths(size):
            for op in FOLDS:
                x = late(gpu, data(comm.rank, count, np.float32))
                work = comm.allreduce(x, op, blocking=False)
                assert work.wait() is x
                assert work.receipt.transport == ("ipc" if count else "staged, local")
                np.testing.assert_array_equal(x.get(), expected(op, size, count, np.float32))

    on_node(size, main)


def test_complex_numbers_are_added_on_the_host() -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> None:
        for op in ("sum", "mean"):
            x = late(gpu, data(comm.rank, 1001, np.complex64))
            work = comm.allreduce(x, op, blocking=False)
            work.wait()
            assert work.receipt.transport == "staged, local"
            np.testing.assert_array_equal(x.get(), expected(op, 2, 1001, np.complex64))
        part = comm.reduce_scatter(late(gpu, data(comm.rank, 1001, np.complex64)))
        low, high = bounds(1001, 2, comm.rank)
        right = expected("sum", 2, 1001, np.complex64)[low:high]
        np.testing.assert_array_equal(part.get(), right)

    on_node(2, main)


@pytest.mark.parametrize(("size", "cards"), [(2, 1), (5, 1), (4, 2), (5, 3)])
def test_of_ranks_that_share_a_card_one_folds(size: int, cards: int) -> None:
    """The results are the same; ranks that take turns on a card need not wait for their turn."""
    node = FakeNode()

    def main(comm: Communicator) -> None:
        gpu = use_fake(comm, node=node, card=f"card {comm.rank % cards}")
        comm.allreduce(late(gpu, np.ones(1, np.float32)))
        for count in lengths(size)[1:]:
            for op in FOLDS:
                x = late(gpu, data(comm.rank, count, np.float32))
                before = len(gpu.log)
                work = comm.allreduce(x, op, blocking=False)
                work.wait()
                assert work.receipt.transport == "ipc"
                launched = [entry for entry in gpu.log[before:] if entry[0] == "launch"]
                assert len(launched) <= (comm.rank < cards), launched
                if comm.rank >= cards:  # which runs behind its own work, and the folders'
                    follows = [entry for entry in gpu.log[before:] if entry[0] == "follow"]
                    assert len(follows) == cards + 2, follows
                np.testing.assert_array_equal(x.get(), expected(op, size, count, np.float32))
                comm.barrier()  # a peer's stream may still have to read
            for root in (0, size - 1):
                check_reduce(comm, gpu, count, root)
                check_reduce_scatter(comm, gpu, count, root)
                check_allgather(comm, gpu, count, root)
                comm.barrier()

    run_local(size, main, settings=SETTINGS)


def rows(comm: Communicator, count: int) -> np.ndarray:
    return np.stack([data(rank, count, np.float32) for rank in range(comm.size)])


def ended(work: Any) -> Any:
    assert work.receipt.transport == "ipc", work.receipt
    return work.wait()


def check_reduce(comm: Communicator, gpu: FakeGpu, count: int, root: int) -> None:
    x = late(gpu, data(comm.rank, count, np.float32))
    ended(comm.reduce(x, root, "max", blocking=False))
    at_root = comm.rank == root
    wanted = rows(comm, count).max(0) if at_root else data(comm.rank, count, np.float32)
    np.testing.assert_array_equal(x.get(), wanted)


def check_reduce_scatter(comm: Communicator, gpu: FakeGpu, count: int, root: int) -> None:
    x = late(gpu, data(comm.rank, count, np.float32))
    piece = ended(comm.reduce_scatter(x, "sum", blocking=False))
    low, high = bounds(count, comm.size, comm.rank)
    wanted = expected("sum", comm.size, count, np.float32)[low:high]
    np.testing.assert_array_equal(piece.get(), wanted)
    np.testing.assert_array_equal(x.get(), data(comm.rank, count, np.float32))


def check_broadcast(comm: Communicator, gpu: FakeGpu, count: int, root: int) -> None:
    """Into memory that is registered nowhere but at the root, as the root alone knows."""
    x = late(gpu, data(comm.rank, count, np.float32), registered=comm.rank == root)
    before = len(gpu.log)
    work = comm.broadcast(x, root, blocking=False)
    work.wait()
    assert work.receipt.transport == "ipc"
    assert "to_host" not in {entry[0] for entry in gpu.log[before:]}
    np.testing.assert_array_equal(x.get(), data(root, count, np.float32))


def check_allgather(comm: Communicator, gpu: FakeGpu, count: int, root: int) -> None:
    x = late(gpu, data(comm.rank, count, np.float32))
    np.testing.assert_array_equal(ended(comm.allgather(x, blocking=False)).get(), rows(comm, count))


def check_gather(comm: Communicator, gpu: FakeGpu, count: int, root: int) -> None:
    x = late(gpu, data(comm.rank, count, np.float32))
    found = ended(comm.gather(x, root, blocking=False))
    if comm.rank == root:
        np.testing.assert_array_equal(found.get(), rows(comm, count))
    else:
        assert found is None


def check_alltoall(comm: Communicator, gpu: FakeGpu, count: int, root: int) -> None:
    sent = [
        data(rank, comm.size * count, np.float32).reshape(-1, count) for rank in range(comm.size)
    ]
    found = ended(comm.alltoall(late(gpu, sent[comm.rank]), blocking=False))
    np.testing.assert_array_equal(found.get(), np.stack([x[comm.rank] for x in sent]))


COLLECTIVES = {
    "reduce": check_reduce,
    "reduce_scatter": check_reduce_scatter,
    "broadcast": check_broadcast,
    "allgather": check_allgather,
    "gather": check_gather,
    "alltoall": check_alltoall,
}


@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_other_collectives(size: int, name: str) -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> None:
        for count in (n for n in lengths(size) if n):
            for root in (0, comm.size - 1):
                COLLECTIVES[name](comm, gpu, count, root)
                comm.barrier()  # a peer's stream may still have to read

    on_node(size, main)


def test_types_that_no_kernel_folds_are_moved() -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> None:
        flags = np.arange(20) % (comm.rank + 2) == 0
        found = ended(comm.allgather(late(gpu, flags), blocking=False)).get()
        for rank, row in enumerate(found):
            np.testing.assert_array_equal(row, np.arange(20) % (rank + 2) == 0)
        x = late(gpu, flags)
        work = comm.allreduce(x, "max", blocking=False)
        work.wait()
        assert work.receipt.transport == "staged, local"
        comm.barrier()

    on_node(2, main)


def test_ranks_whose_roots_differ_are_told() -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> str:
        with pytest.raises(CommError) as caught:  # who hears it first ends, and is lost to others
            comm.reduce(late(gpu, np.ones(8, np.float32)), root=comm.rank)
        return str(caught.value)

    node = FakeNode()
    told = run_local(
        2, lambda comm: main(comm, use_fake(comm, node=node)), settings=Settings(timeout=5)
    )
    assert any("root 0" in words and "root 1" in words for words in told), told


def test_no_host_waits_and_nothing_is_copied() -> None:
    """When wait() returns, no kernel has run; the caller's stream is what waits."""

    def main(comm: Communicator, gpu: FakeGpu) -> None:
        comm.allreduce(late(gpu, np.ones(3, np.float32)))
        x = late(gpu, np.ones(100, np.float32))
        before = len(gpu.log)
        comm.allreduce(x)
        names = {entry[0] for entry in gpu.log[before:]}
        assert names == {"record", "follow", "launch"}
        assert (x.get() == comm.size).all()
        comm.barrier()

    on_node(3, main)


def test_the_same_array_again_and_again_without_reading_it() -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> None:
        x = late(gpu, np.ones(50, np.float32))
        halve = lambda: np.multiply(x.values, 1 / comm.size, out=x.values)  # noqa: E731
        for _ in range(20):
            comm.allreduce(x)
            gpu.launch(7, halve)
        assert (x.get() == 1).all()
        comm.barrier()  # a peer's stream may still have to read

    on_node(2, main)


@pytest.mark.parametrize("registered", [True, False])
def test_what_nobody_waits_for_holds_up_no_stream(registered: bool) -> None:
    """Kernels that are launched between an allreduce and its wait() do not wait for other ranks."""

    def main(comm: Communicator, gpu: FakeGpu) -> None:
        comm.allreduce(late(gpu, np.ones(3, np.float32)))
        x = late(gpu, np.ones(100, np.float32), registered=registered)
        before = len(gpu.log)
        work = comm.allreduce(x, blocking=False)
        while not work.ended:
            comm._progress.advance()
        follows = [entry for entry in gpu.log[before:] if entry[:2] == ("follow", 7)]
        assert not follows and "follow" in {entry[0] for entry in gpu.log[before:]}
        assert work.done() and work.wait() is x
        assert gpu.log[-1][:2] == ("follow", 7)
        assert [entry[:2] for entry in gpu.log[before:]].count(("follow", 7)) == 1
        assert (x.get() == comm.size).all()
        comm.barrier()

    on_node(2, main)


@pytest.mark.parametrize("name", ["registered", "staged", "direct", "message"])
def test_who_waits_under_another_stream_sees_the_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where backward ends on another stream than its gradients were reduced on."""

    def main(comm: Communicator) -> None:
        gpu = use_fake(comm, node=None if name in ("staged", "direct") else node, aware=verdict)
        comm.allreduce(late(gpu, np.ones(3, np.float32)))
        x = late(gpu, np.full(100, comm.rank + 1.0, np.float32), registered=name == "registered")
        if name == "message":
            comm.isend(x, 1 - comm.rank)
            x = late(gpu, np.zeros(100, np.float32))
            work = comm.irecv(x, 1 - comm.rank)
        else:
            work = comm.allreduce(x, blocking=False)
        x.stream = x.__cuda_array_interface__["stream"] = 8
        assert work.wait() is x
        follows = {entry[1] for entry in gpu.log if entry[0] == "follow"}
        assert {7, 8} <= follows
        gpu.synchronize(8)
        assert (x.values == (2 - comm.rank if name == "message" else 3)).all()
        comm.barrier()

    node, verdict = FakeNode(), UNAWARE
    if name == "direct":
        verdict = AWARE
        monkeypatch.setattr(LocalTransport, "device_messages", property(HostMessages))
    run_local(2, main, settings=SETTINGS)


def test_a_stream_follows_what_nobody_has_waited_for_before_its_memory_is_free() -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> None:
        comm.allreduce(late(gpu, np.ones(3, np.float32)))
        x = late(gpu, np.ones(100, np.float32))
        work = comm.allreduce(x, blocking=False)
        while not work.ended:
            comm._progress.advance()
        before = len(gpu.log)
        del work
        assert [entry[:2] for entry in gpu.log[before:]] == [("follow", 7)]
        assert (x.get() == comm.size).all()
        comm.barrier()

    on_node(2, main)


def test_a_rank_without_registered_memory_sends_all_the_staged_way() -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> None:
        for count in (1, 100):
            x = late(gpu, data(comm.rank, count, np.float32), registered=comm.rank != 1)
            comm.allreduce(x)
            np.testing.assert_array_equal(x.get(), expected("sum", 3, count, np.float32))

    on_node(3, main)


def test_a_part_of_registered_memory() -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> None:
        whole = np.zeros(40, np.float32)
        x = FakeArray(gpu, whole, registered=True)
        y = FakeArray(gpu, whole[10:30]).filled_late(data(comm.rank, 20, np.float32))
        work = comm.allreduce(y, blocking=False)
        work.wait()
        assert work.receipt.transport == "ipc"
        np.testing.assert_array_equal(y.get(), expected("sum", 2, 20, np.float32))
        assert (x.values[:10] == 0).all() and (x.values[30:] == 0).all()
        comm.barrier()

    on_node(2, main)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("make_event", "make_event is refused"),
        ("open_event", "open_event is refused"),
        ("trial", "OSError: no compiler"),
        ("export", "export is refused"),
        ("open", "memory cannot be opened: open is refused"),
        ("launch", "a trial could not be launched: RuntimeError: module has no attribute"),
        ("right", "OSError: illegal address"),
        ("wrong", "a trial gave wrong sums"),
    ],
)
def test_what_one_rank_refuses_no_rank_uses(call: str, words: str) -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> str:
        if comm.rank == 1:
            gpu.peering.refuses, gpu.peering.wrong = call, call == "wrong"
        x = late(gpu, data(comm.rank, 100, np.float32))
        work = comm.allreduce(x, blocking=False)
        work.wait()
        assert work.receipt.transport == "staged, local"
        np.testing.assert_array_equal(x.get(), expected("sum", 2, 100, np.float32))
        return work.receipt.reason

    node = FakeNode()
    reasons = run_local(2, lambda comm: main(comm, use_fake(comm, node=node)), settings=SETTINGS)
    assert words in reasons[1] and "no ipc" in reasons[0]
    assert node.opened == 0 and not node.opened_events


@pytest.mark.parametrize("which", ["ready", "done"])
def test_the_fake_catches_events_that_nobody_follows(which: str) -> None:
    """Mutation: without the one, a peer is read too early; without the other, a result is.

    Of three ranks, because the one that looks first makes its own and rank 0's kernels run.
    """

    def main(comm: Communicator, gpu: FakeGpu) -> bool:
        comm.allreduce(late(gpu, np.ones(3, np.float32)))
        follow, seen = gpu.follow, itertools.count()

        def forgetful(stream: int, event: Any) -> None:
            shared = isinstance(event, SharedEvent)
            if shared and (next(seen) < comm.size) == (which == "ready"):
                return
            follow(stream, event)

        gpu.follow = forgetful  # type: ignore[method-assign]
        x = late(gpu, np.ones(100, np.float32))
        comm.allreduce(x)
        right = bool((x.get() == comm.size).all())
        comm.barrier()
        return right

    node = FakeNode()
    found = run_local(3, lambda comm: main(comm, use_fake(comm, node=node)), settings=SETTINGS)
    assert not all(found)
