"""Allreduce of GPU memory where each two ranks pass for a node; for mpirun, on a GPU or a fake one.

python nested_job.py LARGEST [FOLDER]   # FOLDER: of `fake_cupy`, which is then used
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


def right(comm: ringfold.Communicator, x: object, op: str, dtype: str) -> None:
    mine = np.arange(x.size) % 97
    x[...] = cupy.asarray((mine + comm.rank).astype(dtype))
    work = comm.allreduce(x, op, blocking=False)
    work.wait()
    assert work.receipt.transport.startswith("ipc in nodes, "), work.receipt
    ranks = comm.size * (comm.size - 1) // 2
    wanted = {"sum": mine * comm.size + ranks, "mean": mine + ranks / comm.size, "max": mine + 3}
    assert np.array_equal(x.get(), wanted[op].astype(dtype)), (x.size, op, dtype)


with ringfold.Communicator() as comm, cupy.cuda.Stream(non_blocking=True):
    for count in (200, LARGEST) if len(sys.argv) > 2 else (300_000, LARGEST):
        for op, dtype in (("sum", "float32"), ("mean", "float16"), ("mean", "float64"),
                          ("max", "int32")):  # fmt: skip
            right(comm, comm.empty(count, dtype, device="cuda"), op, dtype)
            right(comm, cupy.empty(count, dtype), op, dtype)
    x = comm.empty(count, np.float32, device="cuda")
    x[...] = 1
    step = comm.plan("allreduce", x)
    for _ in range(5):
        step()
        x *= 1 / comm.size
    assert bool((x == 1).all())
print("right")
