"""What there is to pay before the first result: import, first allreduce, and memory besides.

    python benchmarks/startup.py [--ranks 2] [--json FILE]

import: `import ringfold` and its Communicator, in a new process, NumPy's own import included.
First allreduce: from the start of the imports to the result, on the slowest rank, with the compiled
code of an earlier run (warm), and with none (cold, in a cache folder of its own).  memory: how far
the memory of a rank has ever risen above what it held before an allreduce of 64 MiB on an ordinary
array.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import table, write_json
from options import plain_parser, read_alone

from ringfold.output import status_of
from ringfold.workloads.numbers import whole

IMPORT = """
import time
start = time.perf_counter()
import ringfold
ringfold.Communicator
print(time.perf_counter() - start)
"""

FIRST = """
import json, resource, time
start = time.perf_counter()
import numpy as np
import ringfold

def resident():
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmRSS"].split()[0]) / 1024

with ringfold.Communicator() as comm:
    x = np.full(1000, comm.rank + 1, np.float32)
    comm.allreduce(x)
    first = time.perf_counter() - start
    assert (x == comm.size * (comm.size + 1) / 2).all()
    for count in (1, 1 << 12, 1 << 16):
        comm.allreduce(np.ones(count, np.float32))
    x = np.ones(1 << 24, np.float32)
    before = resident()
    for _ in range(3):
        comm.allreduce(x)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = np.array([first, max(peak, resident()) - before])
    comm.allreduce(found, "max")
    if comm.rank == 0:
        from mpi4py import MPI

        version = MPI.Get_library_version().strip("\\0").splitlines()[0]
        print(json.dumps([*found.tolist(), version]))
"""


def output(command: list[str], **more: str) -> str:
    """Run a command and return the last line of what it prints."""
    done = subprocess.run(
        command, env={**os.environ, **more}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1]


def measured(ranks: int, repeats: int) -> tuple[list[dict[str, Any]], str]:
    """Start the processes; return the rows, and the version of MPI."""
    launcher = shutil.which("mpirun")
    if launcher is None:
        raise SystemExit("there is no mpirun on PATH")
    imports = [float(output([sys.executable, "-c", IMPORT])) for _ in range(repeats)]
    job = [launcher, "-n", str(ranks), sys.executable, "-c", FIRST]
    output(job)
    warm = [json.loads(output(job)) for _ in range(repeats)]
    with tempfile.TemporaryDirectory() as folder:
        cold = json.loads(output(job, NUMBA_CACHE_DIR=folder))
        compiled = any(Path(folder).rglob("*.nbc"))
    rows: list[dict[str, Any]] = [
        {"what": "import", "seconds": statistics.median(imports)},
        {
            "what": "first allreduce, warm",
            "ranks": ranks,
            "seconds": statistics.median(first for first, _, _ in warm),
        },
    ]
    if compiled:  # else the cache is elsewhere, and this was no cold start
        rows.append({"what": "first allreduce, cold", "ranks": ranks, "seconds": cold[0]})
    rows.append({"what": "memory", "ranks": ranks, "mib": max(mib for _, mib, _ in warm)})
    return rows, cold[2]


def main() -> int:
    """Run the benchmark."""
    parser = plain_parser(__doc__, repeats=5)
    parser.add_argument("--ranks", type=whole(1), default=2)
    arguments = read_alone(parser)
    rows, mpi = measured(arguments.ranks, arguments.repeats)
    shown = []
    for row in rows:
        unit = "s" if "seconds" in row else "MiB"
        shown.append(
            {"what": row["what"], "value": row.get("seconds", row.get("mib")), "unit": unit}
        )
    print(table(shown, {"what": "s", "value": ".3f", "unit": "s"}))
    if arguments.json:
        write_json(arguments.json, "startup", rows, mpi)
    return 0


if __name__ == "__main__":
    raise SystemExit(status_of("startup.py", main))
