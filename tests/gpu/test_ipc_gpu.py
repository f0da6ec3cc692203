"""Ranks as processes that open each other's memory on one GPU, or on several."""

import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

JOB = """
import cupy, numpy as np, ringfold
with ringfold.Communicator() as comm, cupy.cuda.Stream(non_blocking=True):
    for count in (1, 3, 1000, 4_000_001):
        x = comm.empty(count, np.float32, device="cuda")
        x[...] = comm.rank + 1
        work = comm.allreduce(x, blocking=False)
        work.wait()
        assert work.receipt.transport == "ipc", work.receipt
        assert bool((x == comm.size * (comm.size + 1) / 2).all())
    x[...] = 1
    for _ in range(50):
        x *= 1 / comm.size
        comm.allreduce(x)
    assert bool((abs(x - 1) < 1e-5).all())
    for call in (
        lambda x: comm.reduce(x, 0, "max", blocking=False),
        lambda x: comm.reduce_scatter(x, blocking=False),
        lambda x: comm.allgather(x, blocking=False),
        lambda x: comm.gather(x, 0, blocking=False),
        lambda x: comm.broadcast(x, 0, blocking=False),
        lambda x: comm.alltoall(x, blocking=False),
    ):
        device = comm.empty((comm.size, 1001), np.float32, device="cuda")
        host = np.arange(comm.size * 1001, dtype=np.float32).reshape(comm.size, 1001)
        host = host % 97 + comm.rank
        device[...] = cupy.asarray(host)
        work, twin = call(device), call(host)
        assert work.receipt.transport.startswith("ipc"), work.receipt
        found, wanted = work.wait(), twin.wait()
        assert (found is None) == (wanted is None), work.receipt
        assert found is None or np.array_equal(found.get(), wanted), work.receipt
    y = cupy.arange(1000, dtype=cupy.float32)
    comm.allreduce(y, "mean")
    assert bool((y == cupy.arange(1000)).all())
print("right")
"""


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_collectives(ranks: int) -> None:
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("there is no mpirun on PATH")
    command = [mpirun, "-n", str(ranks), sys.executable, "-c", JOB]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.count("right") == ranks, done.stdout + done.stderr
