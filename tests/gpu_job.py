"""A job of ranks that share GPUs, which ends well or tells what its ranks said."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

SECONDS = 70
"""Less than a test may take on a GPU (benchmarks/gpu.sh), so that a job that hangs is told of."""


def run_ranks(
    ranks: int, name: str, arguments: Sequence[str] = (), seconds: float = SECONDS, **env: str
) -> None:
    """Run tests/NAME_job.py on `ranks` ranks; each has to say that all was right."""
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("there is no mpirun on PATH")
    job = subprocess.Popen(
        [mpirun, "-n", str(ranks), sys.executable, str(TESTS / f"{name}_job.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env,
        start_new_session=True,
    )
    for number in (signal.SIGTERM, signal.SIGKILL):  # mpirun ends its ranks on the first
        try:
            out, err = job.communicate(timeout=seconds)
            break
        except subprocess.TimeoutExpired:
            seconds = 5
            os.killpg(job.pid, number)
    else:
        out, err = job.communicate()
    assert job.returncode == 0 and out.count("right") == ranks, out + err
