"""Rank 1 cannot do something with the memory of other ranks; messages are right all the same.

python refusing_job.py FOLDER CALL      # CALL: of CUDA's runtime, which then fails on rank 1
"""

import sys

import fake_cupy
import numpy as np
from ipc_numbers import numbers

runtime = fake_cupy.install(sys.argv[1])

import cupy  # noqa: E402

import ringfold  # noqa: E402


def refuse(*arguments: object) -> None:
    raise fake_cupy.CUDARuntimeError("refused")


with ringfold.Communicator() as comm, cupy.cuda.Stream(non_blocking=True):
    if comm.rank == 1:
        setattr(runtime, sys.argv[2], refuse)
    ahead, behind = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    ways = []
    for turn in range(3):
        x, y = cupy.asarray(numbers(comm.rank, 3000) + turn), cupy.zeros(3000, np.float32)
        receiving, sending = comm.irecv(y, behind), comm.isend(x, ahead)
        receiving.wait()
        assert np.array_equal(y.get(), numbers(behind, 3000) + turn)
        sending.wait()
        ways.append((sending.receipt.transport, receiving.receipt.transport))
    sends, receives = zip(*ways, strict=True)
    into, out = ahead == 1, comm.rank == 1
    told, staged = sending.receipt.reason, "staged, shared"
    if sys.argv[2] == "ipcGetMemHandle":  # rank 1 shows nothing to others
        assert sends == ((staged,) * 3 if out else ("ipc",) * 3), sends
        assert receives == ((staged,) * 3 if behind == 1 else ("ipc",) * 3), receives
        assert ("refused" in told) == out, told
    else:  # it opens nothing of others
        assert receives == ((staged,) * 3 if out else receives), receives
        assert sends[-1] == (staged if into or (out and "Event" in sys.argv[2]) else "ipc"), sends
        assert ("refuses this one's memory" in told) == into, told
    # What one rank refuses is not held against another.
    x = cupy.asarray(numbers(comm.rank, 3000))
    if comm.rank == 0:
        works = [comm.isend(x, 2, tag) for tag in (1, 2)]
        for work in works:
            work.wait()
        assert [work.receipt.transport for work in works] == [staged, "ipc"], works
    elif comm.rank == 2:
        host = comm.recv(np.zeros(3000, np.float32), 0, 1)
        device = comm.recv(cupy.zeros(3000, np.float32), 0, 2)
        assert np.array_equal(host, numbers(0, 3000))
        assert np.array_equal(device.get(), numbers(0, 3000))
print("right")
