"""Allreduce beside MPI's own, gloo's, and what memory allows.

mpirun -n 2 python benchmarks/allreduce.py [--sizes 4,64KiB,1MiB] [--dtype float32,bfloat16]
    [--peers mpi,gloo] [--json FILE] [--plot FILE]

The columns are those of nccl-tests; see collectives.py.
"""

from __future__ import annotations

from collectives import main

if __name__ == "__main__":
    raise SystemExit(main("allreduce"))
