"""Random sequences of operations on device memory beside their definitions in NumPy.

Ranks are on one node or several, share cards or not, some arrays are registered, the library sends
device memory or not, and works are waited for in any order; the devices are always late.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from contract import FOLDS
from fake_device import AWARE, UNAWARE, FakeArray, FakeGpu, FakeNode, HostMessages, use_fake

from ringfold import Communicator, Settings, run_local
from ringfold.comm import device_nesting
from ringfold.comm.chunks import bounds
from ringfold.comm.transport.local import LocalTransport

STEPS = 14
DTYPES = ("float32", "float64", "int32", "float16")
Check = Callable[[Any], None]


class Sequence:
    """One rank's side: what all ranks draw from `shared` is alike, from `own` it is not."""

    def __init__(self, comm: Communicator, gpu: FakeGpu, seed: int) -> None:
        self.comm, self.gpu, self.seed = comm, gpu, seed
        self.shared, self.own = (
            np.random.default_rng(seed),
            np.random.default_rng([seed, comm.rank]),
        )
        self.pending: list[tuple[Any, Check]] = []
        self.ways: set[str] = set()
        self.step = 0

    def data(self, rank: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """What a rank brings to this step: whole numbers whose sums and products are exact."""
        rng = np.random.default_rng([self.seed, self.step, rank])
        return rng.integers(1, 4, shape).astype(dtype)

    def array(self, values: np.ndarray) -> FakeArray:
        registered = bool(self.own.random() < 0.6)
        made = FakeArray(
            self.gpu,
            np.empty_like(values),
            registered=registered,
            stream=int(self.own.integers(7, 10)),
        )
        return made.filled_late(values)

    def run(self) -> None:
        for self.step in range(STEPS):
            count = int(self.shared.choice([0, 1, 5, 64, 257]))
            dtype = str(self.shared.choice(DTYPES))
            name = str(self.shared.choice(list(KINDS)))
            self.pending += KINDS[name](self, count, dtype)
            while self.pending and self.own.random() < 0.4:
                self.end(int(self.own.integers(len(self.pending))))
        while self.pending:
            self.end(int(self.own.integers(len(self.pending))))
        self.comm.barrier()  # a peer's stream may still have to read

    def end(self, which: int) -> None:
        work, check = self.pending.pop(which)
        check(work.wait())
        self.ways.add(work.receipt.transport)

    def rows(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.stack([self.data(rank, shape, dtype) for rank in range(self.comm.size)])


Started = list[tuple[Any, Check]]


def equals(wanted: np.ndarray) -> Check:
    def check(found: FakeArray) -> None:
        np.testing.assert_array_equal(found.get(), wanted)

    return check


def reduction(s: Sequence, count: int, dtype: str, name: str) -> Started:
    op = str(s.shared.choice(["sum", "max", "prod"]))
    root = int(s.shared.integers(s.comm.size))
    rows = s.rows((count,), dtype)
    total = FOLDS[op](rows).astype(dtype)
    x = s.array(rows[s.comm.rank])
    if name == "allreduce":
        return [(s.comm.allreduce(x, op, blocking=False), equals(total))]
    if name == "reduce":
        wanted = total if s.comm.rank == root else rows[s.comm.rank]
        return [(s.comm.reduce(x, root, op, blocking=False), equals(wanted))]
    low, high = bounds(count, s.comm.size, s.comm.rank)
    return [(s.comm.reduce_scatter(x, op, blocking=False), equals(total[low:high]))]


def movement(s: Sequence, count: int, dtype: str, name: str) -> Started:
    root = int(s.shared.integers(s.comm.size))
    shape = (s.comm.size, count) if name == "alltoall" else (count,)
    rows = s.rows(shape, dtype)
    x = s.array(rows[s.comm.rank])
    if name == "broadcast":
        return [(s.comm.broadcast(x, root, blocking=False), equals(rows[root]))]
    if name == "allgather":
        return [(s.comm.allgather(x, blocking=False), equals(rows))]
    if name == "alltoall":
        return [(s.comm.alltoall(x, blocking=False), equals(rows[:, s.comm.rank]))]

    def check(found: Any) -> None:
        assert (found is None) == (s.comm.rank != root)
        assert found is None or (found.get() == rows).all()

    return [(s.comm.gather(x, root, blocking=False), check)]


def message(s: Sequence, count: int, dtype: str, name: str) -> Started:
    """Around the ring; either end may be in host memory."""
    size, rank = s.comm.size, s.comm.rank
    before = (rank - 1) % size
    mine, theirs = s.data(rank, (count,), dtype), s.data(before, (count,), dtype)
    target: Any = np.zeros(count, dtype)
    if s.own.random() < 0.7:
        target = s.array(target)
    source: Any = s.array(mine) if s.own.random() < 0.7 else mine
    receiving = s.comm.irecv(target, before, s.step)
    sending = s.comm.isend(source, (rank + 1) % size, s.step)

    def came(found: Any) -> None:
        values = found.get() if isinstance(found, FakeArray) else found
        np.testing.assert_array_equal(values, theirs)

    return [(receiving, came), (sending, lambda _: None)]


def on_host(s: Sequence, count: int, dtype: str, name: str) -> Started:
    x = s.data(s.comm.rank, (count,), dtype)
    wanted = s.rows((count,), dtype).max(0)

    def check(found: np.ndarray) -> None:
        np.testing.assert_array_equal(found, wanted)

    return [(s.comm.allreduce(x, "max", blocking=False), check)]


def kind(make: Callable[..., Started], name: str) -> Callable[[Sequence, int, str], Started]:
    return lambda s, count, dtype: make(s, count, dtype, name)


KINDS = {
    **{name: kind(reduction, name) for name in ("allreduce", "reduce", "reduce_scatter")},
    **{name: kind(movement, name) for name in ("broadcast", "allgather", "gather", "alltoall")},
    **{name: kind(message, name) for name in ("message", "another message")},
    "on the host": kind(on_host, ""),
}


@pytest.fixture
def sequence(monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """Run what a seed draws; return the ways that were taken."""
    monkeypatch.setattr(device_nesting, "NEST_BYTES", 64)
    monkeypatch.setattr(device_nesting, "PIECE_BYTES", 700)
    monkeypatch.setattr(LocalTransport, "device_messages", property(HostMessages))

    def run(seed: int, change: Callable[[FakeGpu], None] = lambda gpu: None) -> set[str]:
        rng = np.random.default_rng([7, seed])
        widths = WIDTHS[int(rng.integers(len(WIDTHS)))]
        node_of = [node for node, width in enumerate(widths) for _ in range(width)]
        nodes = [FakeNode() for _ in widths]
        cards, opens = int(rng.integers(1, 3)), bool(rng.random() < 0.8)
        aware = AWARE if rng.random() < 0.5 else UNAWARE
        window = int(rng.choice([40, 256, 1 << 12]))

        def node(self: LocalTransport) -> Any:
            return self.split(node_of[self._members[self.rank]], self.rank)

        monkeypatch.setattr(LocalTransport, "node", node)

        def main(comm: Communicator) -> set[str]:
            shared = nodes[node_of[comm.rank]] if opens else None
            card = f"card {comm.node.rank % cards}"
            gpu = use_fake(comm, window, node=shared, aware=aware, card=card)
            change(gpu)
            sequence = Sequence(comm, gpu, seed)
            sequence.run()
            return sequence.ways

        settings = Settings(timeout=20, segment_bytes=400, max_message_bytes=200)
        return set.union(*run_local(sum(widths), main, settings=settings))

    return run


WIDTHS = ((2,), (3,), (5,), (2, 2), (3, 3), (2, 1), (1, 1, 1), (2, 2, 2))
"""Ranks of each node."""

SEEDS = range(40)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_sequence(sequence: Callable[..., set[str]], seed: int) -> None:
    sequence(seed)


def test_every_way_is_among_them(sequence: Callable[..., set[str]]) -> None:
    missed = {"ipc", "staged, local", "gpu-aware mpi"}
    missed |= {f"ipc in nodes, {way} between them" for way in ("staged, local", "gpu-aware mpi")}
    for seed in SEEDS:
        missed -= sequence(seed)
        if not missed:
            return
    pytest.fail(f"no sequence went {missed}")


@pytest.mark.parametrize("call", ["follow", "record"])
def test_what_does_not_wait_is_found(sequence: Callable[..., set[str]], call: str) -> None:
    """Mutations: a stream that follows no event, and events that have ended at once."""

    def hasty(gpu: FakeGpu) -> None:
        record = gpu.record

        def recorded(stream: int) -> Any:
            event = record(stream)
            event.ended = lambda: True  # type: ignore[method-assign]
            return event

        if call == "record":
            gpu.record = recorded  # type: ignore[method-assign]
        else:
            gpu.follow = lambda stream, event: None  # type: ignore[method-assign]

    found = 0
    for seed in range(6):
        try:
            sequence(seed, hasty)
        except AssertionError:
            found += 1
    assert found >= 3
