"""Device memory that the library sends as it lies there, on a device that is always late."""

from typing import Any

import numpy as np
import pytest
from contract import data, expected
from fake_device import AWARE, UNAWARE, FakeArray, FakeGpu, HostMessages, use_fake
from staged_contract import CHECKS, late, run

from ringfold import Communicator, Settings, run_local
from ringfold.comm.transport.local import LocalTransport
from ringfold.comm.ways import device_ways
from ringfold.doctor_gpu import gpu_memory
from ringfold.findings import Finding, State

SETTINGS = Settings(timeout=20, segment_bytes=400, max_message_bytes=200)


@pytest.fixture(autouse=True)
def sends_device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalTransport, "device_messages", property(HostMessages))


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_contract(size: int, name: str) -> None:
    run_local(size, lambda comm: run(comm, name, AWARE), settings=SETTINGS)


def receipts(comm: Communicator, x: FakeArray) -> dict[str, Any]:
    works = {
        "allreduce": comm.allreduce(x, blocking=False),
        "reduce": comm.reduce(x, blocking=False),
        "broadcast": comm.broadcast(x, blocking=False),
        "allgather": comm.allgather(x, blocking=False),
        "gather": comm.gather(x, blocking=False),
        "reduce_scatter": comm.reduce_scatter(x, blocking=False),
        "alltoall": comm.alltoall(x, blocking=False),
        "send": comm.isend(x, (comm.rank + 1) % comm.size),
        "recv": comm.irecv(x, (comm.rank - 1) % comm.size),
    }
    for work in works.values():
        work.wait()
    return {name: work.receipt for name, work in works.items()}


def test_the_receipt_names_the_way() -> None:
    def main(comm: Communicator) -> None:
        gpu = use_fake(comm, aware=AWARE)
        for name, receipt in receipts(comm, late(gpu, np.ones((3, 5), np.float32))).items():
            assert receipt.transport == "gpu-aware mpi", name
            assert receipt.operation == name and receipt.nbytes >= 60
        assert not gpu.pinned and not any(e[0].startswith("to_") for e in gpu.log)

    run_local(3, main, settings=SETTINGS)


@pytest.mark.parametrize("name", ["allgather", "gather", "reduce_scatter", "alltoall"])
def test_what_takes_the_result_is_made_when_the_caller_calls(name: str) -> None:
    """Later another stream may be the current one, whose pool lends memory that it is still at.

    What the caller's stream is at then is not followed: recorded behind the making, it is.
    """

    def main(comm: Communicator) -> None:
        gpu = use_fake(comm, aware=AWARE)
        x = late(gpu, np.ones((2, 5), np.float32))
        getattr(comm, name)(x)  # at the first call ranks try each other
        like, made = gpu.like, []

        def logged(*arguments: Any) -> Any:
            made.append(len([entry for entry in gpu.log if entry[:2] == ("record", 7)]))
            return like(*arguments)

        gpu.like = logged  # type: ignore[method-assign]
        before = len([entry for entry in gpu.log if entry[:2] == ("record", 7)])
        work = getattr(comm, name)(x, blocking=False)
        assert work.receipt.transport == "gpu-aware mpi"
        gone = name == "gather" and comm.rank != 0
        assert made == ([] if gone else [before])
        work.wait()
        assert len(made) == (not gone)

    run_local(2, main, settings=SETTINGS)


def test_where_the_probe_says_no_all_is_staged_and_told() -> None:
    def main(comm: Communicator) -> None:
        gpu = use_fake(comm, aware=UNAWARE)
        for name, receipt in receipts(comm, late(gpu, np.ones((3, 5), np.float32))).items():
            assert receipt.transport == "staged, local", name
            if name not in ("send", "recv"):
                assert "no gpu-aware MPI: the test says no" in receipt.reason

    run_local(3, main, settings=SETTINGS)


@pytest.mark.parametrize("kind", ["verdict", "kernels"])
def test_collectives_need_all_ranks_and_messages_each_its_own(kind: str) -> None:
    """A pair may differ: one end sends the device's memory, the other receives into the host's."""

    def main(comm: Communicator) -> None:
        lacks = comm.rank == 1
        gpu = use_fake(comm, aware=UNAWARE if lacks and kind == "verdict" else AWARE)
        if lacks and kind == "kernels":
            gpu.arithmetic = None
        x = late(gpu, data(comm.rank, 100, np.float32))
        work = comm.allreduce(x, blocking=False)
        work.wait()
        assert work.receipt.transport == "staged, local"
        np.testing.assert_array_equal(x.get(), expected("sum", 3, 100, np.float32))
        y = late(gpu, np.zeros(100, np.float32))
        sending = comm.isend(x, (comm.rank + 1) % 3)
        comm.recv(y, (comm.rank - 1) % 3)
        sending.wait()
        staged = lacks and kind == "verdict"
        assert sending.receipt.transport == ("staged, local" if staged else "gpu-aware mpi")
        np.testing.assert_array_equal(y.get(), x.get())

    run_local(3, main, settings=SETTINGS)


def empty(gpu: FakeGpu) -> FakeArray:
    return late(gpu, np.zeros(1000, np.float32))


def exact(comm: Communicator) -> tuple[np.ndarray, np.ndarray]:
    mine = (np.arange(1000) + comm.rank).astype(np.float32)
    return mine, mine * comm.size + sum(range(comm.size)) - comm.rank * comm.size


@pytest.mark.parametrize("fault", ["raises", "loses"])
def test_doctor_tells_of_a_rank_whose_memory_fails(fault: str) -> None:
    def main(comm: Communicator) -> list[Finding]:
        gpu = use_fake(comm, aware=AWARE)

        def make() -> FakeArray:
            if comm.rank == 1 and fault == "raises":
                raise MemoryError("out of memory\nat once")
            x = empty(gpu)
            if comm.rank == 1:
                x.set = lambda values: None  # type: ignore[method-assign]
            return x

        return gpu_memory(comm, make, *exact(comm))

    told = run_local(3, main, settings=SETTINGS)
    assert told[0] == told[1] == told[2]
    (finding,) = told[0]
    assert finding.state is State.BROKEN and finding.advice
    words = {"raises": "rank 1: MemoryError: out of memory at once", "loses": "rank 1: what was"}
    assert finding.value.startswith(words[fault])


def test_doctor_tells_each_pairs_way_and_checks_a_sum() -> None:
    def main(comm: Communicator) -> list[str]:
        gpu = use_fake(comm, aware=UNAWARE if comm.rank == 2 else AWARE)
        found = gpu_memory(comm, lambda: empty(gpu), *exact(comm))
        assert [finding.state for finding in found] == [State.GOOD] * 2
        assert found[1].value.startswith("right, staged, local")
        ways = device_ways(comm, late(gpu, np.zeros(1)))
        assert ways[0][1] == "gpu-aware mpi" and ways[0][2] == "gpu-aware mpi at one end"
        return [finding.value for finding in found]

    told = run_local(3, main, settings=SETTINGS)
    assert told[0] == told[1]
    assert "gpu-aware mpi: 1 pairs" in told[0][0] and "at one end: 2 pairs" in told[0][0]


def test_doctor_calls_a_wrong_sum_broken() -> None:
    def main(comm: Communicator) -> None:
        gpu = use_fake(comm, aware=AWARE)
        x, looks = empty(gpu), iter((0, comm.rank))
        honest = x.get
        x.get = lambda: honest() + next(looks)  # type: ignore[method-assign]
        found = gpu_memory(comm, lambda: x, *exact(comm))
        assert found[1].state is State.BROKEN and "1000 elements wrong" in found[1].value

    run_local(2, main, settings=SETTINGS)


def test_types_that_no_kernel_adds_are_staged() -> None:
    def main(comm: Communicator) -> None:
        gpu = use_fake(comm, aware=AWARE)
        x = late(gpu, np.array([comm.rank == 1, False]))
        work = comm.allreduce(x, "max", blocking=False)
        work.wait()
        assert work.receipt.transport == "staged, local"
        assert x.get().tolist() == [True, False]
        work = comm.broadcast(x, blocking=False)
        work.wait()
        assert work.receipt.transport == "gpu-aware mpi"

    run_local(2, main, settings=SETTINGS)


@pytest.mark.parametrize("algorithm", ["ring", "pairwise", "recursive_doubling", "tree"])
def test_named_algorithms_over_many_segments(algorithm: str) -> None:
    def main(comm: Communicator) -> None:
        gpu = use_fake(comm, aware=AWARE)
        for count in (0, 1, 2, 501):
            x = late(gpu, data(comm.rank, count, np.float64))
            work = comm.allreduce(x, algorithm=algorithm, blocking=False)
            work.wait()
            assert work.receipt.algorithm == algorithm
            np.testing.assert_array_equal(x.get(), expected("sum", 3, count, np.float64))

    run_local(3, main, settings=SETTINGS)


def test_scratch_memory_is_used_again() -> None:
    def main(comm: Communicator) -> int:
        gpu = use_fake(comm, aware=AWARE)
        for _ in range(20):
            x = late(gpu, np.ones(500, np.float32))
            comm.reduce(x)
            x.get()
        return gpu.allocated

    assert max(run_local(2, main, settings=SETTINGS)) <= 6


def test_a_plan() -> None:
    def main(comm: Communicator) -> None:
        gpu = use_fake(comm, aware=AWARE)
        x = late(gpu, np.ones(250, np.float32))
        step = comm.plan("allreduce", x, "mean")
        for _ in range(3):
            gpu.launch(7, lambda: np.multiply(x.values, 3, out=x.values))
            step()
        assert (x.get() == 27).all()

    run_local(2, main, settings=SETTINGS)


def hasty(gpu: FakeGpu, own: bool) -> None:
    """Let events seem ended at once: those on the caller's stream, or those behind kernels."""
    record = gpu.record

    def recorded(stream: int) -> Any:
        event = record(stream)
        if (stream == 7) == (not own):
            event.ended = lambda: True  # type: ignore[method-assign]
        return event

    gpu.record = recorded  # type: ignore[method-assign]


@pytest.mark.parametrize("what", ["send", "collective"])
def test_the_fake_catches_a_library_that_reads_too_early(what: str) -> None:
    """Mutation: the host does not wait for events, and what goes out is what was there (PR-12)."""

    def main(comm: Communicator) -> bool:
        gpu = use_fake(comm, aware=AWARE)
        hasty(gpu, own=what == "collective")
        x = late(gpu, np.ones(100, np.float32))
        if what == "collective":
            comm.allreduce(x)
            return bool((x.get() == 2).all())
        y = FakeArray(gpu, np.zeros(100, np.float32))
        sending = comm.isend(x, 1 - comm.rank)
        comm.recv(y, 1 - comm.rank)
        sending.wait()
        return bool((y.get() == 1).all())

    assert run_local(2, main, settings=SETTINGS) == [False, False]


class LoggedMessages(HostMessages):
    """Write into the device's log when the library touches memory."""

    def isend_device(self, address: int, nbytes: int, *where: Any) -> Any:
        LOGS[self.transport.world[self.transport.rank]].append(("mpi", address, nbytes))
        return super().isend_device(address, nbytes, *where)

    def irecv_device(self, address: int, nbytes: int, *where: Any) -> Any:
        LOGS[self.transport.world[self.transport.rank]].append(("mpi", address, nbytes))
        return super().irecv_device(address, nbytes, *where)


LOGS: dict[int, list[Any]] = {}

OPERATIONS: dict[str, Any] = {
    "allreduce": lambda comm, x: comm.allreduce(x),
    "reduce": lambda comm, x: comm.reduce(x),
    "broadcast": lambda comm, x: comm.broadcast(x),
    "allgather": lambda comm, x: comm.allgather(x),
    "gather": lambda comm, x: comm.gather(x),
    "reduce_scatter": lambda comm, x: comm.reduce_scatter(x),
    "alltoall": lambda comm, x: comm.alltoall(x),
    "send and recv": lambda comm, x: comm.send(x, 1) if comm.rank == 0 else comm.recv(x, 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_library_touches_nothing_before_the_arrays_stream_was_waited_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PR-12: MPI read a buffer that the queued kernel had not filled; one log of both tells."""
    monkeypatch.setattr(LocalTransport, "device_messages", property(LoggedMessages))

    def main(comm: Communicator) -> None:
        gpu = use_fake(comm, aware=AWARE)
        LOGS[comm.rank] = gpu.log
        x = late(gpu, np.ones((2, 40), np.float32), stream=9)
        OPERATIONS[name](comm, x)
        log = gpu.log
        touched = next(at for at, entry in enumerate(log) if entry[0] == "mpi")
        launched = log.index(("launch", 9))
        recorded = next(e for e in log[launched:touched] if e[:2] == ("record", 9))
        ended = [e for e in log[:touched] if e[0] == "ended"]
        own = [e[1] for e in log[:touched] if e[0] == "follow" and e[2:] == recorded[1:]]
        # Either this event was waited for, or one of a stream that follows it.
        assert ("ended", *recorded[1:]) in ended or any(e[1] in own for e in ended)

    run_local(2, main, settings=SETTINGS)
