"""What the GPU benchmark says where it cannot run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_script_sees_what_lies_in_the_environment_of_its_python(tmp_path: Path) -> None:
    """An environment made from one of another environment does not see that one's packages."""
    pytest.importorskip("torch")
    root = BENCHMARKS.parent
    for folder in ("benchmarks", "comm", "kernels", "parallel", "src"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pyc*"))
    script = str(tmp_path / "benchmarks" / "gpu.sh")
    done = run(
        "bash", script, "--python", sys.executable, "--wheels", str(tmp_path), "--setup-only"
    )
    assert "has no torch" not in done.stderr, done.stderr
    assert done.returncode == 0 or "has no cupy" in done.stderr, done.stdout + done.stderr


def test_a_kernel_that_cannot_be_compiled_is_told_in_one_line(tmp_path: Path) -> None:
    """Before anything is run: without NVRTC here, or for a NumPy that Numba does not know."""
    pytest.importorskip("numba_cuda")
    done = run(sys.executable, str(BENCHMARKS / "gpu_compiles.py"))
    assert (done.returncode, done.stdout) == (0, "sm_90\n") or "libnvrtc" in done.stderr
    (tmp_path / "sitecustomize.py").write_text(
        "import numba.cuda\ndef refuse(*_, **__): raise AttributeError('no row_stack\\nhere')\n"
        "numba.cuda.compile = refuse\n"
    )
    done = run("env", f"PYTHONPATH={tmp_path}", sys.executable, str(BENCHMARKS / "gpu_compiles.py"))
    assert (done.returncode, done.stderr) == (1, "AttributeError: no row_stack\n")


STUBS = """
step() { echo "limit $1"; }
find_sanitizer() { echo a sanitizer; }
nvidia-cuda-mps-control() { :; }
python() { :; }
"""


def test_all_limits_together_are_under_ten_minutes(tmp_path: Path) -> None:
    """With a sanitizer and MPS; what runs them is left out, so that nothing does."""
    script = (BENCHMARKS / "gpu.sh").read_text()
    before, marker, steps = script.partition('mkdir -p "$out"')
    steps, num_replaced = re.subn(r"step\(\) \{.*?\n\}", "", steps, flags=re.DOTALL)
    assert marker and num_replaced == 1
    done = run("bash", "-c", f"out={tmp_path}; venv=none\n{STUBS}\nfailed=0{steps}")
    limits = [int(limit) for limit in re.findall(r"^limit (\d+)$", done.stdout, re.MULTILINE)]
    compiling = [int(limit) for limit in re.findall(r"timeout (\d+) python", before)]
    assert done.returncode == 0 and len(limits) == 15 and len(compiling) == 1, done
    assert sum(limits) + sum(compiling) < 600


def test_a_toolkit_is_found_by_its_compiler(tmp_path: Path) -> None:
    script = (BENCHMARKS / "gpu.sh").read_text()
    found = re.search(r'^if \[ -z "\$\{CUDA_HOME.*?^fi$', script, re.MULTILINE | re.DOTALL)
    assert found is not None
    toolkit, links = tmp_path / "cuda-13.0", tmp_path / "bin"
    for folder in (toolkit / "bin", toolkit / "nvvm", links):
        folder.mkdir(parents=True)
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (toolkit / "bin" / "nvcc").chmod(0o755)
    (links / "nvcc").symlink_to(toolkit / "bin" / "nvcc")
    told = f"PATH={links}:$PATH\n{found[0]}\necho ${{CUDA_HOME:-}}"
    clean = ("env", "-u", "CUDA_HOME", "-u", "CUDA_PATH")
    assert run(*clean, "bash", "-euc", told).stdout == f"{toolkit}\n"
    assert run(*clean, "CUDA_HOME=/mine", "bash", "-euc", told).stdout == "/mine\n"
    (toolkit / "nvvm").rmdir()
    assert run(*clean, "bash", "-euc", told).stdout == "\n"
