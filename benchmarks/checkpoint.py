"""Measure how long training stands still for a checkpoint.

mpirun -n 2 python benchmarks/checkpoint.py [--json FILE]

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
from harness import table, write_json
from options import plain_parser, read

import ringfold
from ringfold.comm.texts import gather_texts
from ringfold.output import status_of
from ringfold.workloads.numbers import path, whole
from ringfold.workloads.options import UsageError


def check_folder(options: argparse.Namespace, num_ranks: int) -> None:
    """Raise UsageError where there is no such folder."""
    if options.folder is not None and not options.folder.is_dir():
        raise UsageError(f"--folder {options.folder}: there is no such folder")


def main() -> int:
    parser = plain_parser("How long training stands still for a checkpoint.", repeats=3)
    parser.add_argument("--megabytes", type=whole(1), default=200, help="size of one checkpoint")
    parser.add_argument(
        "--sessions",
        type=whole(1),
        default=3,
        help="of --repeats checkpoints; the first of each has no memory yet",
    )
    parser.add_argument("--folder", type=path, help="where to write (default: a temporary folder)")
    options = read(parser, check_folder)
    with ringfold.Communicator() as comm, tempfile.TemporaryDirectory(dir=options.folder) as own:
        folder = Path(gather_texts(comm, own)[0])  # rank 0's, on every rank
        nbytes = options.megabytes * 10**6
        # As in training, which has loaded compiled code long before.
        measure(comm, folder / "warm", 8000, 1, train=0.0)
        rows = [
            row
            for session in range(options.sessions)
            for row in measure(comm, folder / str(session), nbytes, options.repeats)
        ]
        if comm.rank == 0:
            print(f"{options.megabytes} MB on {comm.size} ranks, measured, the slowest rank")
            columns = {"checkpoint": "d", "stood_still": ".4f", "seconds": ".3f", "ratio": ".3f"}
            print(table(rows, columns))
            if options.json is not None:
                write_json(options.json, "checkpoint", rows, comm.library)
    return 0


def measure(
    comm: ringfold.Communicator, folder: Path, nbytes: int, repeats: int, train: float = 1.0
) -> list[dict[str, float]]:
    """Write checkpoints, one after the other; return a row for each, in seconds.

    stood_still: in `save`, for the first with `prepare`, `train` seconds before.
    seconds: that writing took.  Each is that of the slowest rank.
    """
    count = nbytes // 4 // 20
    state = {"model": {f"layer{i}": torch.full((count,), float(i)) for i in range(20)}}
    work = torch.ones(256, 256)
    times = []
    with ringfold.Checkpoints(folder, comm, keep=1) as checkpoints:
        before = 0.0, 0.0
        comm.barrier()  # as steps keep ranks together: a rank that comes late is no cost of this
        checkpoints.prepare(state)
        end = time.perf_counter() + train
        while time.perf_counter() < end:
            work @ work
        for step in range(repeats):
            comm.barrier()
            checkpoints.save(state, step)
            while checkpoints.busy:
                work @ work
            still = checkpoints.stood_still - before[0]
            checkpoints.wait()
            times.append((still, checkpoints.writing - before[1]))
            before = checkpoints.stood_still, checkpoints.writing
    slowest = comm.allreduce(np.array(times), op="max")
    return [
        {
            "ranks": comm.size,
            "nbytes": nbytes,
            "checkpoint": step,
            "stood_still": still,
            "seconds": seconds,
            "ratio": still / seconds,
        }
        for step, (still, seconds) in enumerate(slowest.tolist())
    ]


if __name__ == "__main__":
    raise SystemExit(status_of("checkpoint.py", main))
