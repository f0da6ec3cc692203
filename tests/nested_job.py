"""Collectives on GPU memory where each two ranks pass for a node, on a GPU or a fake one.

mpirun -n 4 python nested_job.py LARGEST [FOLDER]   # FOLDER: of `fake_cupy`, which is then used
"""

import sys

import numpy as np

LARGEST = int(sys.argv[1])
if len(sys.argv) > 2:
    import fake_cupy

    fake_cupy.install(sys.argv[2])

import cupy  # noqa: E402
from mpi4py import MPI  # noqa: E402

import ringfold  # noqa: E402
from ringfold.comm import device_nesting  # noqa: E402
from ringfold.comm.transport.mpi import MpiTransport  # noqa: E402

MpiTransport.node = lambda self: self.split(MPI.COMM_WORLD.rank // 2, self.rank)
if len(sys.argv) > 2:
    device_nesting.NEST_BYTES, device_nesting.PIECE_BYTES = 4, 9000


def done(work: ringfold.Work) -> object:
    found = work.wait()
    assert work.receipt.transport.startswith("ipc in nodes, "), work.receipt
    return found


def right(comm: ringfold.Communicator, x: object, op: str, dtype: str) -> None:
    size, rank = comm.size, comm.rank
    mine = np.arange(x.size) % 97

    def fresh() -> object:
        x[...] = cupy.asarray((mine + rank).astype(dtype))
        return x

    ranks = size * (size - 1) // 2
    wanted = {"sum": mine * size + ranks, "mean": mine + ranks / size, "max": mine + size - 1}
    total = wanted[op].astype(dtype)
    base, extra = divmod(x.size, size)
    low = rank * base + min(rank, extra)
    part = total[low : low + base + (rank < extra)]
    rows = np.stack([(mine + other).astype(dtype) for other in range(size)])
    for found, expected in (
        (lambda: comm.allreduce(fresh(), op, blocking=False), total),
        (lambda: comm.reduce(fresh(), 1, op, blocking=False), total if rank == 1 else rows[rank]),
        (lambda: comm.broadcast(fresh(), 2, blocking=False), rows[2]),
        (lambda: comm.reduce_scatter(fresh(), op, blocking=False), part),
        (lambda: comm.allgather(fresh(), blocking=False), rows),
        (lambda: comm.gather(fresh(), 3, blocking=False), rows if rank == 3 else None),
    ):
        got = done(found())
        same = got is None if expected is None else np.array_equal(got.get(), expected)
        assert same, (x.size, op, dtype)


def exchanged(comm: ringfold.Communicator, x: object, dtype: str) -> None:
    size, rank = comm.size, comm.rank
    shape = (size, *x.shape)
    sent = (np.arange(size * x.size) % 97).reshape(shape) + np.arange(size).reshape(-1, 1, 1)
    x[...] = cupy.asarray(sent[rank].astype(dtype))
    found = done(comm.alltoall(x, blocking=False))
    assert np.array_equal(found.get(), sent[:, rank].astype(dtype)), (shape, dtype)


with ringfold.Communicator() as comm, cupy.cuda.Stream(non_blocking=True):
    for count in (200, LARGEST) if len(sys.argv) > 2 else (300_000, LARGEST):
        for op, dtype in (("sum", "float32"), ("mean", "float16"), ("mean", "float64"),
                          ("max", "int32")):  # fmt: skip
            right(comm, comm.empty(count, dtype, device="cuda"), op, dtype)
            right(comm, cupy.empty(count, dtype), op, dtype)
            exchanged(comm, cupy.empty((comm.size, count // comm.size), dtype), dtype)
    x = comm.empty(count, np.float32, device="cuda")
    x[...] = 1
    step = comm.plan("allreduce", x)
    for _ in range(5):
        step()
        x *= 1 / comm.size
    assert bool((x == 1).all())
print("right")
