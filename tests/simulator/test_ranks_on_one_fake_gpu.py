"""Ranks as processes on a pretended GPU: what fails there, and that the pretence can say no."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from numba import config

pytestmark = pytest.mark.skipif(not config.ENABLE_CUDASIM, reason="make test-simulator")

TESTS = Path(__file__).parent.parent


def run(ranks: int, job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("there is no mpirun on PATH")
    command = [mpirun, "-n", str(ranks), sys.executable, str(TESTS / job), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, errors="replace")


@pytest.mark.parametrize("call", ["ipcOpenMemHandle", "ipcOpenEventHandle", "ipcGetMemHandle"])
def test_what_one_rank_cannot_do_is_staged(call: str, tmp_path: Path) -> None:
    done = run(3, "refusing_job.py", str(tmp_path), call)
    assert done.returncode == 0 and done.stdout.count("right") == 3, done.stdout + done.stderr


@pytest.mark.parametrize("part", ["messages", "collectives"])
def test_events_that_nobody_follows_are_told(part: str, tmp_path: Path) -> None:
    done = run(2, "ipc_job.py", "3001", str(tmp_path), part)
    assert done.returncode != 0 and "AssertionError" in done.stderr, done.stdout + done.stderr


def test_doctor_tells_the_ways_of_gpu_memory(tmp_path: Path) -> None:
    done = run(3, "doctor_job.py", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GPU messages     ipc, for all 3 pairs of ranks" in done.stdout, done.stdout
    assert "GPU allreduce    right, ipc" in done.stdout, done.stdout
