"""Rank 0 cannot launch kernels on the pretended GPU, and all ranks' memory is staged.

python kernelless_job.py FOLDER KERNEL      # KERNEL: how the names begin of those that fail
"""

import sys
from collections.abc import Callable
from typing import Any

import fake_cupy
import numpy as np

fake_cupy.install(sys.argv[1])

import ringfold  # noqa: E402
from ringfold.kernels.device.launch import Launcher  # noqa: E402

with ringfold.Communicator() as comm:
    if comm.rank == 0:  # which folds for all on its card
        made = type(Launcher())
        prepared = made.prepared

        def failing(
            self: Launcher, kernel: Any, *arguments: Any, keeps: object = None
        ) -> Callable[[], bool]:
            def launch() -> bool:
                raise RuntimeError(f"kernel {kernel.__name__}: module has no attribute")

            fails = kernel.__name__.startswith(sys.argv[2])
            return launch if fails else prepared(self, kernel, *arguments, keeps=keeps)

        made.prepared = failing
    for turn in range(2):
        x = comm.empty(1000, np.float32, device="cuda")
        x[...] = comm.rank + 1 + turn
        work = comm.allreduce(x, blocking=False)
        work.wait()
        wanted = comm.size * (comm.size + 1) / 2 + comm.size * turn
        assert bool((x == wanted).all()), x.get()
        assert work.receipt.transport == "staged, shared", work.receipt
        assert comm.rank or "has no attribute" in work.receipt.reason, work.receipt
print("right")
