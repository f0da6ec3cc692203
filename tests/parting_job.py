"""A rank closes while its copies of what it has sent are still to run: parting_job.py FOLDER."""

import sys

import fake_cupy
import numpy as np
from ipc_numbers import numbers

fake_cupy.install(sys.argv[1])

import cupy  # noqa: E402

import ringfold  # noqa: E402

found = []
with ringfold.Communicator() as comm:
    if comm.rank == 0:
        fake_cupy.LATE = 0.5
        sent = [comm.isend(cupy.asarray(numbers(turn, 3000)), 1) for turn in range(3)]
        for work in sent:
            work.wait()
        assert work.receipt.transport == "ipc", work.receipt
    else:
        for _ in range(3):
            found.append(comm.recv(cupy.zeros(3000, np.float32), 0))
for turn, array in enumerate(found):
    assert np.array_equal(array.get(), numbers(turn, 3000))
print("right")
