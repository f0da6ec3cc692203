"""Ranks as processes that open each other's memory on one GPU, or on several."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "ranks"), [("ipc", 2), ("ipc", 3), ("ipc", 4), ("nested", 4)], ids=str
)
def test_ranks_open_each_others_memory(name: str, ranks: int, tmp_path: Path) -> None:
    import cupy

    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("there is no mpirun on PATH")
    fake = getattr(cupy, "fake", False)  # whose kernels are slow
    job = [str(TESTS / f"{name}_job.py"), *(["3001", str(tmp_path)] if fake else ["4000001"])]
    done = subprocess.run(
        [mpirun, "-n", str(ranks), sys.executable, *job],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0 and done.stdout.count("right") == ranks, done.stdout + done.stderr
