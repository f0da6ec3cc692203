"""Device memory, staged through the host, on a device that is always late (PR-12)."""

from typing import Any

import numpy as np
import pytest
from fake_device import FakeArray, FakeGpu, use_fake
from staged_contract import CHECKS, late, run

from ringfold import Communicator, Settings, run_local
from ringfold.comm.device import describe, on_device


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_contract(size: int, name: str) -> None:
    run_local(size, lambda comm: run(comm, name), settings=Settings(timeout=20))


OPERATIONS: dict[str, Any] = {
    "allreduce": lambda comm, x: comm.allreduce(x),
    "reduce": lambda comm, x: comm.reduce(x),
    "allgather": lambda comm, x: comm.allgather(x),
    "alltoall": lambda comm, x: comm.alltoall(x),
    "reduce_scatter": lambda comm, x: comm.reduce_scatter(x),
    "send and recv": lambda comm, x: comm.send(x, 1) if comm.rank == 0 else comm.recv(x, 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_copies_follow_the_callers_stream_and_it_follows_them(name: str) -> None:
    """MPI read memory that the queued kernel had not written yet (PR-12); here the log tells."""

    def main(comm: Communicator) -> None:
        gpu = use_fake(comm)
        x = late(gpu, np.ones((2, 40), np.float32), stream=9)
        OPERATIONS[name](comm, x)
        log = [entry for entry in gpu.log if entry[0] != "ended"]
        copies = [at for at, entry in enumerate(log) if entry[0] in ("to_host", "to_device")]
        assert log[0] == ("launch", 9) and copies
        recorded = next(at for at, entry in enumerate(log) if entry[:2] == ("record", 9))
        for stream in {log[at][1] for at in copies}:
            assert stream != 9
            first = next(at for at in copies if log[at][1] == stream)
            follows = [e for e in log[recorded:first] if e[:3] == ("follow", stream, 9)]
            assert follows, f"the copies on stream {stream} do not wait for the caller's"
        if log[copies[-1]][0] == "to_device":
            last = log[copies[-1]][1]
            assert any(e[:3] == ("follow", 9, last) for e in log[copies[-1] :])

    run_local(2, main, settings=Settings(timeout=20))


def test_no_byte_is_exchanged_before_its_copy_has_ended() -> None:
    def main(comm: Communicator) -> None:
        gpu = use_fake(comm, window_bytes=1 << 10)
        x = late(gpu, np.full(1000, comm.rank + 1.0, np.float32))
        send = comm._transport.isend

        def logged(data: Any, *arguments: Any) -> Any:
            gpu.log.append(("isend", data.nbytes))
            assert not (np.asarray(data) == 0xEE).all()
            return send(data, *arguments)

        comm._transport.isend = logged  # type: ignore[method-assign]
        if comm.rank == 0:
            comm.send(x, 1)
            names = [entry[0] for entry in gpu.log]
            assert names.index("to_host") < names.index("ended") < names.index("isend")
        else:
            comm.recv(x, 0)
        assert (x.get() == 1).all()

    run_local(2, main, settings=Settings(timeout=20))


def test_the_fake_catches_a_read_that_does_not_wait() -> None:
    """Mutation: with events that are ended at once, the same operation gives what was there."""

    def main(comm: Communicator) -> bool:
        gpu = use_fake(comm)
        record = gpu.record

        def hasty(stream: int) -> Any:
            event = record(stream)
            event.ended = lambda: True  # type: ignore[method-assign]
            return event

        gpu.record = hasty  # type: ignore[method-assign]
        x = late(gpu, np.ones(100, np.float32))
        comm.allreduce(x)
        return bool((x.get() == comm.size).all())

    assert run_local(2, main, settings=Settings(timeout=20)) == [False, False]


def test_staging_memory_is_used_again() -> None:
    def main(comm: Communicator) -> int:
        gpu = use_fake(comm, window_bytes=1 << 12)
        for _ in range(20):
            comm.allreduce(late(gpu, np.ones(5000, np.float32))).get()
        return len(gpu.pinned)

    assert max(run_local(2, main, settings=Settings(timeout=20))) <= 4


def test_copies_have_ended_when_a_group_is_closed() -> None:
    """With it goes the pinned memory that they read, and the streams that they are on."""

    def main(comm: Communicator) -> None:
        with comm.split(0) as group:
            gpu = use_fake(group)
            x = late(gpu, np.full(30, comm.rank + 1.0, np.float32))
            group.allreduce(x)
        assert not any(gpu._streams[stream] for stream in (101, 102))
        assert (x.get() == 3).all()

    run_local(2, main, settings=Settings(timeout=20))


def test_a_plan_and_a_receipt() -> None:
    def main(comm: Communicator) -> None:
        gpu = use_fake(comm, window_bytes=400)
        x = late(gpu, np.ones(250, np.float32))
        step = comm.plan("allreduce", x)
        for turn in range(3):
            step()
            assert (x.get() == comm.size ** (turn + 1)).all()
        receipt = comm.allreduce(x, blocking=False).receipt
        assert receipt.transport == "staged, local" and receipt.algorithm == "3 windows"
        assert receipt.nbytes == 1000 and "pinned" in receipt.reason

    run_local(2, main, settings=Settings(timeout=20))


def strided(**interface: Any) -> FakeArray:
    return FakeArray(FakeGpu(), np.zeros((4, 6), np.float32), **interface)


@pytest.mark.parametrize(
    ("interface", "error", "words"),
    [
        ({"strides": (48, 4)}, ValueError, "not contiguous"),
        ({"strides": (4, 16)}, ValueError, "not contiguous"),
        ({"mask": object()}, TypeError, "masked"),
        ({"data": (64, True)}, ValueError, "read-only"),
        ({"stream": 0}, ValueError, "stream 0"),
    ],
)
def test_what_cannot_be_moved_is_refused(
    interface: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        x = strided()
        x.__cuda_array_interface__ |= interface
        describe(x, writable=True)


def test_an_unknown_type_is_refused() -> None:
    x = strided()
    x.dtype = "fake.something"
    x.__cuda_array_interface__["typestr"] = "<M8[s]"
    with pytest.raises(TypeError, match="x: dtype datetime64"):
        describe(x, writable=False)


def test_a_negated_tensor_is_refused() -> None:
    x = strided(strides=(24, 4))
    x.is_neg = lambda: True
    with pytest.raises(TypeError, match="x: a tensor whose memory holds its values negated"):
        describe(x, writable=False)


def test_what_is_contiguous_in_other_words() -> None:
    x = strided(strides=(24, 4))
    assert describe(x, writable=True).count == 24
    one = FakeArray(FakeGpu(), np.zeros((1, 6), np.float32), strides=(999, 4))
    assert describe(one, writable=True).nbytes == 24
    none = FakeArray(FakeGpu(), np.zeros((0, 6), np.float32), strides=(7, 7))
    assert describe(none, writable=True) == describe(none, writable=False)


def test_host_memory_is_not_on_a_device() -> None:
    import torch

    for x in (np.zeros(2), torch.zeros(2), torch.zeros(2, requires_grad=True), memoryview(b"a"), 3):
        assert not on_device(x)
    assert on_device(strided())


def test_scatter_says_why_not() -> None:
    def main(comm: Communicator) -> None:
        gpu = use_fake(comm)
        with pytest.raises(TypeError, match="scatter takes host memory only"):
            comm.scatter(late(gpu, np.ones(2, np.float32)))

    run_local(1, main)


def test_arguments_are_checked_before_anything_is_sent() -> None:
    def main(comm: Communicator) -> None:
        gpu = use_fake(comm)
        x = late(gpu, np.ones((3, 2), np.int32))
        for call, error, words in (
            (lambda: comm.allreduce(x, "mean"), TypeError, "not defined for int32"),
            (lambda: comm.broadcast(x, 2), ValueError, "root 2 is outside"),
            (lambda: comm.alltoall(x), ValueError, "first axis of 2"),
            (lambda: comm.send(x, 5), ValueError, "dst 5 is outside"),
            (lambda: comm.recv(x, 0, -1), ValueError, "tag -1"),
        ):
            with pytest.raises(error, match=words):
                call()

    run_local(2, main, settings=Settings(timeout=20))
