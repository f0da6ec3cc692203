"""What ranks do with GPU memory that they open of each other; for mpirun, on a GPU or a fake one.

python ipc_job.py LARGEST [FOLDER]      # FOLDER: of `fake_cupy`, which is then used
"""

import sys

import numpy as np

LARGEST = int(sys.argv[1])
if len(sys.argv) > 2:
    import fake_cupy

    fake_cupy.install(sys.argv[2])

import cupy  # noqa: E402

import ringfold  # noqa: E402


def main(comm: ringfold.Communicator) -> None:
    for count in (1, 3, 1000, LARGEST):
        x = comm.empty(count, np.float32, device="cuda")
        x[...] = comm.rank + 1
        work = comm.allreduce(x, blocking=False)
        work.wait()
        assert work.receipt.transport == "ipc", work.receipt
        assert bool((x == comm.size * (comm.size + 1) / 2).all())
    x[...] = 1
    for _ in range(50 if LARGEST > 10_000 else 5):
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


with ringfold.Communicator() as comm, cupy.cuda.Stream(non_blocking=True):
    main(comm)
print("right")
