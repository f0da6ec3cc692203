"""How everything here is timed, and how results are written.

A repetition starts when all ranks are lined up and ends when the data is there; its time is that
of the slowest rank. Warm-up repetitions are not counted, medians are reported, and the result of a
timed call is checked.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ringfold
from ringfold.cli import BUSBW


@dataclass(frozen=True)
class Timing:
    """Seconds of one repetition, slowest rank each: median and 99th percentile of `repeats`."""

    median: float
    p99: float
    repeats: int


def measure(
    comm: ringfold.Communicator,
    operation: Callable[[], object],
    *,
    prepare: Callable[[], object] = lambda: None,
    repeats: int = 20,
    warmup: int = 3,
) -> Timing:
    """Time an operation that all ranks of comm take part in; every rank gets the same Timing.

    prepare: runs before each repetition, untimed; ranks fill their buffers there.
    """
    times = np.empty(repeats)
    for turn in range(-warmup, repeats):
        prepare()
        comm.barrier()
        start = time.perf_counter()
        operation()
        seconds = time.perf_counter() - start
        if turn >= 0:
            times[turn] = seconds
    comm.allreduce(times, "max")
    return Timing(float(np.median(times)), float(np.percentile(times, 99)), repeats)


def rates(collective: str, nbytes: int, ranks: int, seconds: float) -> tuple[float, float]:
    """Return (algbw, busbw) in GB/s, as nccl-tests' doc/PERFORMANCE.md defines them."""
    algbw = nbytes / seconds / 1e9 if seconds > 0 else 0.0
    factor = BUSBW.get(collective, lambda size: 1.0)(ranks)
    return algbw, algbw * factor


def machine() -> dict[str, Any]:
    """Describe where a result was measured."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    from mpi4py import MPI

    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "mpi": MPI.Get_library_version().strip("\0").splitlines()[0],
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def write_json(path: Path, benchmark: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the rows with the record of the machine."""
    record = {"benchmark": benchmark, "machine": machine(), "rows": list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def table(rows: list[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Lay rows out: columns maps a key to the format of its values."""
    cells = [list(columns)]
    cells += [[format(row[key], form) for key, form in columns.items()] for row in rows]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )
