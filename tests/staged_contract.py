"""What device memory owes its users on every transport: one body for threads and processes.

Every array is filled by a kernel that has not run when the operation starts, and is read on the
caller's stream without any other synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from contract import FOLDS, data, expected, lengths
from fake_device import UNAWARE, FakeArray, FakeGpu, use_fake

from ringfold import Communicator
from ringfold.comm.chunks import bounds
from ringfold.comm.transport.cuda_probe import Verdict


def late(gpu: FakeGpu, values: np.ndarray, stream: int | None = 7) -> FakeArray:
    return FakeArray(gpu, np.empty_like(values), stream=stream).filled_late(values)


def reductions(comm: Communicator, gpu: FakeGpu, count: int) -> None:
    for op in FOLDS:
        x = late(gpu, data(comm.rank, count, np.float32))
        assert comm.allreduce(x, op) is x
        wanted = expected(op, comm.size, count, np.float32)
        np.testing.assert_array_equal(x.get(), wanted)
    root = comm.size - 1
    mine = data(comm.rank, count, np.int64)
    x = late(gpu, mine)
    comm.reduce(x, root)
    wanted = expected("sum", comm.size, count, np.int64)
    np.testing.assert_array_equal(x.get(), wanted if comm.rank == root else mine)
    x = late(gpu, data(comm.rank, count, np.float64))
    part = comm.reduce_scatter(x)
    low, high = bounds(count, comm.size, comm.rank)
    np.testing.assert_array_equal(
        part.get(), expected("sum", comm.size, count, np.float64)[low:high]
    )


def movements(comm: Communicator, gpu: FakeGpu, count: int) -> None:
    rows = np.stack([data(rank, count, np.float32) for rank in range(comm.size)])
    root = comm.size // 2
    x = late(gpu, rows[comm.rank])
    comm.broadcast(x, root)
    np.testing.assert_array_equal(x.get(), rows[root])
    x = late(gpu, rows[comm.rank])
    np.testing.assert_array_equal(comm.allgather(x).get(), rows)
    whole = comm.gather(x, root)
    if comm.rank == root:
        np.testing.assert_array_equal(whole.get(), rows)
    else:
        assert whole is None
    cells = np.stack([rows + 100 * (rank + 1) for rank in range(comm.size)])
    x = late(gpu, cells[comm.rank])
    np.testing.assert_array_equal(comm.alltoall(x).get(), cells[:, comm.rank])


def messages(comm: Communicator, gpu: FakeGpu, count: int) -> None:
    """Around the ring, and between host and device memory."""
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    x, y = late(gpu, data(comm.rank, count, np.float32)), late(gpu, np.zeros(count, np.float32))
    receiving = comm.irecv(y, before, tag=3)
    sending = comm.isend(x, after, tag=3)
    assert receiving.wait() is y
    sending.wait()
    np.testing.assert_array_equal(y.get(), data(before, count, np.float32))
    host = np.empty(count, np.float32)
    receiving = comm.irecv(host, before)
    comm.isend(x, after).wait()
    receiving.wait()
    np.testing.assert_array_equal(host, data(before, count, np.float32))
    z = late(gpu, np.zeros(count, np.float32))
    assert comm.sendrecv(x, after, z, before) is z
    np.testing.assert_array_equal(z.get(), data(before, count, np.float32))


def overlapping(comm: Communicator, gpu: FakeGpu, count: int) -> None:
    """Several at once, with the host's own operations between them, ended in another order."""
    arrays = [late(gpu, data(comm.rank, count, np.float32) + k, stream=7 + k) for k in range(4)]
    hosts = [data(comm.rank, count, np.float64) * k for k in range(4)]
    works = []
    for x, host in zip(arrays, hosts, strict=True):
        works.append(comm.allreduce(x, blocking=False))
        works.append(comm.allreduce(host, blocking=False))
    for work in reversed(works):
        work.wait()
    wanted = expected("sum", comm.size, count, np.float32)
    for k in range(4):
        np.testing.assert_array_equal(arrays[k].get(), wanted + k * comm.size)
        np.testing.assert_array_equal(hosts[k], wanted * k)


def halves(comm: Communicator, gpu: FakeGpu, count: int) -> None:
    """bfloat16 is added in float32 and rounded once, as on the host."""
    torch = pytest.importorskip("torch")
    mine = torch.from_numpy(data(comm.rank, count, np.float32) / 3).to(torch.bfloat16)
    bits = mine.view(torch.uint16).numpy().copy()
    x = FakeArray(gpu, np.empty_like(bits), dtype="bfloat16").filled_late(bits)
    comm.allreduce(x, "mean")
    comm.allreduce(mine, "mean")
    np.testing.assert_array_equal(x.get(), mine.view(torch.uint16).numpy())


CHECKS: dict[str, Callable[[Communicator, FakeGpu, int], Any]] = {
    check.__name__: check for check in (reductions, movements, messages, overlapping, halves)
}


def run(comm: Communicator, name: str, aware: Verdict = UNAWARE) -> None:
    """Run one check: short lengths over windows of a few elements, long ones over many windows."""
    short = [count for count in lengths(comm.size) if count < 100]
    for window_bytes, counts in ((40, short), (1 << 12, [2, 1000, 10007])):
        group = comm.split(0, comm.rank)
        assert group is not None
        with group:
            gpu = use_fake(group, window_bytes, aware=aware)
            for count in counts:
                CHECKS[name](group, gpu, count)
