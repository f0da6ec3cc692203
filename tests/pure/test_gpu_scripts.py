"""What the GPU benchmark says where it cannot run."""

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_the_benchmark_without_a_gpu() -> None:
    done = run(sys.executable, str(BENCHMARKS / "gpu.py"))
    assert done.returncode == 77
    assert "no GPU can be used" in done.stderr and "nothing was measured" in done.stderr


def test_the_script_names_a_wrong_option() -> None:
    done = run("bash", str(BENCHMARKS / "gpu.sh"), "--wheels", "/no/such/folder")
    assert done.returncode == 2 and "--wheels /no/such/folder: no such folder" in done.stderr
    done = run("bash", str(BENCHMARKS / "gpu.sh"), "--fast")
    assert done.returncode == 2 and "unknown option --fast" in done.stderr
