"""Allreduces of device memory over several nodes of threads; the devices are always late."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from contract import FOLDS, data, expected
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
from ringfold.comm import device_nesting
from ringfold.comm.transport.cuda_probe import Verdict
from ringfold.comm.transport.local import LocalTransport

SETTINGS = Settings(timeout=20, segment_bytes=400, max_message_bytes=200)
NESTED = "ipc in nodes, staged, local between them"
SHAPES = [(2, 2), (2, 3), (3, 2)]


def late(gpu: FakeGpu, values: np.ndarray, registered: bool = True, **more: Any) -> FakeArray:
    return FakeArray(gpu, np.empty_like(values), registered=registered, **more).filled_late(values)


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_nesting, "NEST_BYTES", 4)
    monkeypatch.setattr(device_nesting, "PIECE_BYTES", 12000)
    monkeypatch.setattr(LocalTransport, "device_messages", property(HostMessages))


@pytest.fixture
def on_nodes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Run main on nodes of some widths."""

    def run(
        widths: tuple[int, ...],
        main: Callable[[Communicator, FakeGpu], Any],
        aware: Verdict = UNAWARE,
        timeout: float = 20,
    ) -> list[Any]:
        node_of = [node for node, width in enumerate(widths) for _ in range(width)]
        nodes = [FakeNode() for _ in widths]

        def node(self: LocalTransport) -> LocalTransport:
            return self.split(node_of[self._members[self.rank]], self.rank)  # type: ignore[return-value]

        monkeypatch.setattr(LocalTransport, "node", node)
        found = run_local(
            sum(widths),
            lambda comm: main(comm, use_fake(comm, node=nodes[node_of[comm.rank]], aware=aware)),
            settings=Settings(timeout=timeout, segment_bytes=400, max_message_bytes=200),
        )
        assert all(node.opened == 0 for node in nodes)
        return found

    return run


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_op_and_length(on_nodes, shape, registered) -> None:
    nodes, width = shape

    def main(comm: Communicator, gpu: FakeGpu) -> None:
        for count in (1, 17, 100, 1000, 10007):
            for op in FOLDS:
                x = late(gpu, data(comm.rank, count, np.float32), registered)
                work = comm.allreduce(x, op, blocking=False)
                assert work.wait() is x
                assert work.receipt.transport == NESTED, work.receipt
                assert work.receipt.algorithm == "hierarchical"
                wanted = expected(op, comm.size, count, np.float32)
                np.testing.assert_allclose(x.get(), wanted, rtol=1e-6 if op == "mean" else 0)
                comm.barrier()  # a peer's stream may still have to read

    on_nodes((width,) * nodes, main)


def test_other_types(on_nodes) -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> None:
        for dtype in (np.int32, np.int64, np.float64, np.uint8):
            x = late(gpu, data(comm.rank, 1000, dtype))
            comm.allreduce(x, "max")
            np.testing.assert_array_equal(x.get(), expected("max", 4, 1000, dtype))
        x = late(gpu, np.arange(20) % (comm.rank + 2) == 0)
        work = comm.allreduce(x, "min", blocking=False)
        work.wait()
        assert work.receipt.transport == "staged, local"
        assert x.get().tolist() == [at % 60 == 0 for at in range(20)]

    on_nodes((2, 2), main)


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
def test_halves_are_rounded_once(on_nodes, op) -> None:
    """To the last bit as float32 sums of the same order are; in half width they are others."""
    torch = pytest.importorskip("torch")

    def main(comm: Communicator, gpu: FakeGpu) -> tuple[np.ndarray, bool]:
        drawn = [np.random.default_rng(r).normal(size=1001).astype(np.float32) for r in range(4)]
        rows = [torch.from_numpy(row).to(torch.bfloat16) for row in drawn]
        bits = rows[comm.rank].view(torch.uint16).numpy().copy()
        x = late(gpu, bits, dtype="bfloat16")
        work = comm.allreduce(x, op, blocking=False)
        work.wait()
        assert work.receipt.transport == NESTED
        wide = [row.float() / (4 if op == "mean" else 1) for row in rows]
        add = torch.maximum if op == "max" else torch.add
        wanted = add(add(wide[0], wide[1]), add(wide[2], wide[3])).to(torch.bfloat16)
        rough = rows[0] + rows[1] + rows[2] + rows[3]
        got = x.get().copy()
        np.testing.assert_array_equal(got, wanted.view(torch.uint16).numpy())
        comm.barrier()
        return got, bool((rough == wanted).all())

    found = on_nodes((2, 2), main)
    assert all((got == found[0][0]).all() for got, _ in found)
    assert op != "sum" or not found[0][1]


def test_between_nodes_the_library_sends_device_memory(on_nodes) -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> None:
        for count in (5, 1000, 10007):
            x = late(gpu, data(comm.rank, count, np.float32))
            work = comm.allreduce(x, blocking=False)
            work.wait()
            assert work.receipt.transport == "ipc in nodes, gpu-aware mpi between them"
            np.testing.assert_array_equal(x.get(), expected("sum", 6, count, np.float32))
            comm.barrier()
        assert not gpu.pinned and not any(e[0].startswith("to_") for e in gpu.log)
        work = comm.allgather(x, blocking=False)
        work.wait()
        assert work.receipt.transport == "gpu-aware mpi"

    on_nodes((3, 3), main, AWARE)


@pytest.mark.parametrize(
    ("widths", "what"),
    [
        ((2, 1), "unequal"),
        ((1, 1), "alone"),
        ((2, 2), "small"),
        ((2, 2), "refused"),
        ((2, 2), "no kernels"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_goes_another_way(on_nodes, widths, what, monkeypatch) -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> None:
        if what == "refused" and comm.rank == 1:
            gpu.peering.refuses = "open"
        if what == "no kernels" and comm.rank == 1:
            gpu.arithmetic = None
        x = late(gpu, data(comm.rank, 100, np.float32))
        work = comm.allreduce(x, blocking=False)
        work.wait()
        assert work.receipt.transport == "staged, local"
        np.testing.assert_array_equal(x.get(), expected("sum", comm.size, 100, np.float32))
        work = comm.allreduce(x, algorithm="ring", blocking=False)
        work.wait()
        assert work.receipt.transport == "staged, local"

    if what == "small":
        monkeypatch.setattr(device_nesting, "NEST_BYTES", 401)
    on_nodes(widths, main)


def test_several_at_once_beside_other_operations(on_nodes) -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> None:
        arrays = [
            late(gpu, data(comm.rank, 500, np.float32) + k, registered=k % 2 == 0, stream=7 + k)
            for k in range(4)
        ]
        flags = [late(gpu, np.arange(8) == k + comm.rank, stream=20 + k) for k in range(4)]
        works = []
        for x, y in zip(arrays, flags, strict=True):
            works += [comm.allreduce(x, blocking=False), comm.allreduce(y, "max", blocking=False)]
        for work in reversed(works):
            work.wait()
        for k, (x, y) in enumerate(zip(arrays, flags, strict=True)):
            wanted = expected("sum", 4, 500, np.float32) + 4 * k
            np.testing.assert_array_equal(x.get(), wanted)
            assert y.get().tolist() == [k <= at < k + 4 for at in range(8)]
        comm.barrier()

    on_nodes((2, 2), main)


@pytest.mark.parametrize("registered", [True, False])
def test_again_and_again_without_reading_it(on_nodes, registered) -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> int:
        x = late(gpu, np.ones(3500, np.float32), registered)
        step = comm.plan("allreduce", x)
        allocated = 0
        for turn in range(12):
            step()
            gpu.launch(7, lambda: np.multiply(x.values, 1 / comm.size, out=x.values))
            if turn == 2:
                allocated = gpu.arithmetic.allocated
        assert (x.get() == 1).all()
        comm.barrier()
        return gpu.arithmetic.allocated - allocated

    assert max(on_nodes((2, 2), main)) <= (0 if registered else 2)


def test_ranks_of_a_node_that_call_differently_are_told(on_nodes) -> None:
    def main(comm: Communicator, gpu: FakeGpu) -> str:
        comm.allreduce(late(gpu, np.ones(8, np.float32)))
        with pytest.raises(CommError) as caught:
            comm.allreduce(late(gpu, np.ones(8 + comm.rank, np.float32)))
        return str(caught.value)

    told = on_nodes((2, 2), main, timeout=3)
    assert any("calls differ" in text for text in told), told


@pytest.mark.parametrize("late_rank", [1, 2])
def test_who_is_waited_for_is_named(on_nodes, late_rank) -> None:
    """By the numbers of the caller's group, in the node and in the lane alike."""

    def main(comm: Communicator, gpu: FakeGpu) -> str:
        comm.allreduce(late(gpu, np.ones(8, np.float32)))
        if comm.rank == late_rank:
            time.sleep(1.5)
            return ""
        work = comm.allreduce(late(gpu, np.ones(800, np.float32)), blocking=False)
        with pytest.raises(CommError) as caught:
            work.wait(timeout=0.5)
        return str(caught.value)

    told = on_nodes((2, 2), main, timeout=30)
    assert f"for ranks [{late_rank}]" in told[0], told


@pytest.mark.parametrize("which", ["ready", "again", "done"])
def test_the_fake_catches_events_that_nobody_follows(on_nodes, which) -> None:
    """Mutation: of the three times that a rank follows all events of its node, one is left out."""
    at = ["ready", "again", "done"].index(which)

    def main(comm: Communicator, gpu: FakeGpu) -> bool:
        comm.allreduce(late(gpu, np.ones(3, np.float32)))
        follow, seen = gpu.follow, itertools.count()

        def forgetful(stream: int, event: Any) -> None:
            if isinstance(event, SharedEvent) and next(seen) // comm.node.size % 3 == at:
                return
            follow(stream, event)

        gpu.follow = forgetful  # type: ignore[method-assign]
        right = True
        for turn in range(3):
            x = late(gpu, data(comm.rank + turn, 900, np.float32))
            comm.allreduce(x)
            wanted = sum(data(rank + turn, 900, np.float32) for rank in range(comm.size))
            # The next kernel of the caller's; where a peer still reads, it reads this.
            copy = np.empty_like(x.values)
            gpu.launch(7, lambda x=x, copy=copy: np.copyto(copy, x.values))
            gpu.launch(7, lambda x=x: x.values.fill(-1))
            gpu.synchronize(7)
            right = right and bool((copy == wanted).all())
            comm.barrier()
        return right

    assert not all(on_nodes((3, 3), main))
