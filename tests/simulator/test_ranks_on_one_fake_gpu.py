"""Ranks as processes on a pretended GPU: what fails there, and that the pretence can say no."""

import json
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


@pytest.mark.parametrize("kernel", ["", "fold"])
def test_kernels_that_one_rank_cannot_launch_are_staged(kernel: str, tmp_path: Path) -> None:
    """All of them, which is found before the trial, or the one of the trial alone."""
    done = run(3, "kernelless_job.py", str(tmp_path), kernel)
    assert done.returncode == 0 and done.stdout.count("right") == 3, done.stdout + done.stderr


@pytest.mark.parametrize("part", ["messages", "collectives"])
def test_events_that_nobody_follows_are_told(part: str, tmp_path: Path) -> None:
    done = run(2, "ipc_job.py", "3001", str(tmp_path), part)
    assert done.returncode != 0 and "AssertionError" in done.stderr, done.stdout + done.stderr


def test_events_live_until_all_ranks_have_closed(tmp_path: Path) -> None:
    done = run(2, "parting_job.py", str(tmp_path))
    assert done.returncode == 0 and done.stdout.count("right") == 2, done.stdout + done.stderr


def test_groups_that_have_closed_leave_nothing(tmp_path: Path) -> None:
    """Each left three streams and four events of other ranks on the GPU."""
    done = run(2, "leaving_job.py", str(tmp_path))
    assert done.returncode == 0 and done.stdout.count("right") == 2, done.stdout + done.stderr


def test_doctor_tells_the_ways_of_gpu_memory(tmp_path: Path) -> None:
    done = run(3, "doctor_job.py", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GPU kernels      compiled and run" in done.stdout, done.stdout
    assert "GPU messages     ipc, for all 3 pairs of ranks" in done.stdout, done.stdout
    assert "GPU allreduce    right, ipc" in done.stdout, done.stdout
    assert "3 ranks on 1 card take turns there" in done.stdout, done.stdout


def test_the_benchmark_of_allreduce(tmp_path: Path) -> None:
    options = ("--sizes", "4KiB", "--budget", "0.5", "--json", str(tmp_path / "found.json"))
    done = run(2, "gpu_bench_job.py", str(tmp_path), "gpu.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    ways = {row["impl"]: row["transport"] for row in rows}
    assert ways["ours, registered"] == ways["ours, registered, in a row"] == "ipc"
    assert ways["ours"] == "staged, shared", ways
    assert {"copy, on the device", "copy, to the host", "limit"} < ways.keys()
    assert all(row["wrong"] == 0 and row["microseconds"] > 0 for row in rows)
    assert all(row["host_us"] > 0 for row in rows if row["impl"].startswith("ours"))


def test_the_benchmark_of_kernels(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    job = [str(TESTS / "gpu_bench_job.py"), str(tmp_path), "gpu_kernels.py"]
    command = [sys.executable, *job, "--sizes", "1KiB", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 14 and all(row["card"] == "a pretended GPU" for row in rows)
