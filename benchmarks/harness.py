"""How everything here is timed, and how results are written.

A repetition starts when all ranks are lined up and ends when the data is there; its time is that
of the slowest rank. Warm-up repetitions are not counted, medians are reported, and the result of a
timed call is checked.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ringfold
from ringfold.units import bus_factor

LEAST = 5
"""Repetitions that there are whatever they take."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one repetition, slowest rank each: median and 99th percentile of `repeats`."""

    median: float
    p99: float
    repeats: int


@dataclass(frozen=True)
class Contender:
    """One implementation in a contest.

    run: what is timed; returns when the data is there. prepare: runs before it, untimed; ranks fill
    their buffers there. after: the same, once it has ended on this rank. wrong: of what run has
    returned, how many elements on this rank differ from what they have to be; all ranks call it at
    the same place.
    """

    impl: str
    run: Callable[[], Any]
    prepare: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    wrong: Callable[[Any], int] = lambda result: 0
    algorithm: str = "-"
    transport: str = "-"


@dataclass(frozen=True)
class Outcome:
    """What a contender came to: its Timing, and wrong elements of its last run, over all ranks."""

    contender: Contender
    timing: Timing
    wrong: int


def contest(
    comm: ringfold.Communicator,
    contenders: Sequence[Contender],
    *,
    repeats: int = 20,
    warmup: int = 3,
    budget: float | None = None,
) -> list[Outcome]:
    """Time contenders in turn within each repetition, so that noise hits all alike.

    Collective: every rank gets the same outcomes.

    budget: seconds for the repetitions together; there are fewer of them where it would not do, but
        five at least. The repetitions that warm up say what one takes.
    """
    line_up = comm.plan("barrier")
    spans = np.zeros((warmup, len(contenders)))
    for turn in range(warmup):
        _once(line_up, contenders, turn, spans[turn])
    if budget is not None and warmup:
        # The first one has what is done only once, such as compiling.
        took = float(comm.allreduce(spans.min(axis=0), "max").sum())
        repeats = max(min(repeats, int(budget / max(took, 1e-9))), min(repeats, LEAST))
    spans = np.zeros((repeats, len(contenders)))
    wrong = np.zeros(len(contenders), np.int64)
    before = gc.isenabled()
    gc.disable()
    try:
        for turn in range(repeats):
            # Checked at once, since contenders share buffers.
            _once(line_up, contenders, turn, spans[turn], wrong if turn == repeats - 1 else None)
    finally:
        if before:
            gc.enable()
    comm.allreduce(spans, "max")
    comm.allreduce(wrong, "sum")
    return [
        Outcome(
            contender,
            Timing(float(np.median(times)), float(np.percentile(times, 99)), repeats),
            int(elements),
        )
        for contender, times, elements in zip(contenders, spans.T, wrong, strict=True)
    ]


def _once(
    line_up: Callable[[], object],
    contenders: Sequence[Contender],
    turn: int,
    spans: NDArray[np.float64],
    wrong: NDArray[np.int64] | None = None,
) -> None:
    # In an order that changes, equal on all ranks: nobody always follows the same neighbour.
    for place in np.random.default_rng(turn).permutation(len(contenders)):
        contender = contenders[place]
        contender.prepare()
        line_up()
        line_up()  # the first one ends early for who came last
        start = time.perf_counter()
        result = contender.run()
        spans[place] = time.perf_counter() - start
        # Where ranks share a core, one that goes on here would keep another from seeing the end.
        line_up()
        contender.after()
        if wrong is not None:
            wrong[place] = contender.wrong(result)


def measure(
    comm: ringfold.Communicator,
    operation: Callable[[], object],
    *,
    prepare: Callable[[], object] = lambda: None,
    repeats: int = 20,
) -> Timing:
    """Time an operation that all ranks of comm take part in; every rank gets the same Timing.

    prepare: runs before each repetition, untimed; ranks fill their buffers there.
    """
    alone = Contender("", operation, prepare)
    return contest(comm, [alone], repeats=repeats)[0].timing


def rates(collective: str, nbytes: int, ranks: int, seconds: float) -> tuple[float, float]:
    """Return (algbw, busbw) in GB/s, as nccl-tests' doc/PERFORMANCE.md defines them."""
    algbw = nbytes / seconds / 1e9 if seconds > 0 else 0.0
    return algbw, algbw * bus_factor(collective, ranks)


def machine(mpi: str | None = None) -> dict[str, Any]:
    """Describe where a result was measured; mpi: its version, where this process is no rank."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "mpi": mpi or mpi_version(),
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        "commit": commit_of(Path(__file__).parents[1]),
        "date": time.strftime("%Y-%m-%d"),
    }


def mpi_version() -> str:
    """Return the first line of what the MPI library says of itself."""
    from mpi4py import MPI

    return MPI.Get_library_version().strip("\0").splitlines()[0]


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout, with -dirty where a file of it is another than it was there.

    Results are no such files: a run of several benchmarks writes them between two.
    """
    of_code = ["--", ".", ":(exclude)benchmarks/results"]
    try:
        name = _git(checkout, "describe", "--always")
        changed = _git(checkout, "status", "--porcelain", "--untracked-files=no", *of_code)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write_json(
    path: Path, benchmark: str, rows: Iterable[Mapping[str, Any]], mpi: str | None = None
) -> None:
    """Write the rows with the record of the machine."""
    record = {"benchmark": benchmark, "machine": machine(mpi), "rows": list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def verdict(rows: Iterable[Mapping[str, Any]], *, speak: bool = True) -> int:
    """Return the exit status, 1 where a result was wrong, and name those rows."""
    failed = [row for row in rows if row["wrong"]]
    for row in failed if speak else ():
        what = ", ".join(f"{key} {row[key]}" for key in ("impl", "nbytes", "ranks") if key in row)
        print(f"failed: {what}: {row['wrong']} elements are wrong", file=sys.stderr)
    return int(bool(failed))


def table(rows: list[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Lay rows out: columns maps a key to the format of its values."""
    cells = [list(columns)]
    cells += [[format(row[key], form) for key, form in columns.items()] for row in rows]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )
