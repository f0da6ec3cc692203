"""Measure how long training stands still for a checkpoint.

mpirun -n 2 python benchmarks/checkpoint.py

Every rank holds the same model, as in data-parallel training, and keeps multiplying matrices, as a
stand-in for training, while checkpoints are written. Each one begins when the one before is whole.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import ringfold


def main() -> None:
    parser = argparse.ArgumentParser(description="How long training stands still for a checkpoint.")
    parser.add_argument("--megabytes", type=int, default=200, help="size of one checkpoint")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    with ringfold.Communicator() as comm, tempfile.TemporaryDirectory(dir=options.folder) as own:
        measure(comm, shared_folder(comm, own), options.megabytes, options.repeats)


def shared_folder(comm: ringfold.Communicator, own: str) -> Path:
    """Return rank 0's folder on every rank."""
    name = np.zeros(4096, np.uint8)
    name[: len(own.encode())] = np.frombuffer(own.encode(), np.uint8)
    return Path(bytes(comm.broadcast(name)).rstrip(b"\0").decode())


def measure(comm: ringfold.Communicator, folder: Path, megabytes: int, repeats: int) -> None:
    count = megabytes * 10**6 // 4 // 20
    state = {"model": {f"layer{i}": torch.full((count,), float(i)) for i in range(20)}}
    work = torch.ones(256, 256)
    with ringfold.Checkpoints(folder, comm, keep=1) as checkpoints:
        rows = []
        for step in range(repeats):
            before = checkpoints.stood_still, checkpoints.writing
            start = time.perf_counter()
            checkpoints.save(state, step)
            while checkpoints.busy:
                work @ work
            checkpoints.wait()
            rows.append(
                (
                    checkpoints.stood_still - before[0],
                    checkpoints.writing - before[1],
                    time.perf_counter() - start,
                )
            )
    # What counts is the slowest rank.
    slowest = comm.allreduce(np.array(rows), op="max")
    if comm.rank == 0:
        print(f"{megabytes} MB on {comm.size} ranks, measured, the slowest rank, seconds")
        print(f"{'':>8} {'stood still':>12} {'writing':>9} {'ratio':>7} {'until whole':>12}")
        for step, (still, writing, whole) in enumerate(slowest):
            ratio = still / writing
            print(f"{step:>8} {still:>12.4f} {writing:>9.3f} {ratio:>7.3f} {whole:>12.3f}")


if __name__ == "__main__":
    main()
