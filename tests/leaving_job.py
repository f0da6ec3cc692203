"""Groups that have closed leave no stream and no event behind: leaving_job.py FOLDER."""

import gc
import sys

import fake_cupy
import numpy as np

runtime = fake_cupy.install(sys.argv[1])

import cupy  # noqa: E402

import ringfold  # noqa: E402

counts = []
with ringfold.Communicator() as comm:
    x = comm.empty(1000, np.float32, device="cuda")
    for _ in range(4):
        with comm.split(0) as group:
            x[...] = 1
            work = group.allreduce(x, blocking=False)
            work.wait()
            assert work.receipt.transport == "ipc", work.receipt
            group.allreduce(cupy.zeros(10, np.float32))
            for source in range(2):
                if group.rank == source:
                    group.send(x, 1 - source)
                else:
                    group.recv(x, source)
            assert bool((x == comm.size).all())
        gc.collect()
        counts.append((len(runtime.streams), len(runtime.opened_events), len(runtime.opened)))
assert counts == [(0, 0, 0)] * 4, counts
print("right")
