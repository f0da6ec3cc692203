"""Allreduce beside MPI's own, gloo's, and what memory allows.

mpirun -n 2 python benchmarks/allreduce.py [--sizes 4,64KiB,1MiB] [--dtype float32,bfloat16]
    [--peers mpi,gloo] [--json FILE] [--plot FILE]

The columns are those of nccl-tests; see collectives.py.
"""

from __future__ import annotations

from functools import partial

from collectives import main

from ringfold.output import status_of

if __name__ == "__main__":
    raise SystemExit(status_of("allreduce.py", partial(main, "allreduce")))
