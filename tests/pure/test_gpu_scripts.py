"""What the GPU benchmark says where it cannot run."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
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
    about = "nvidia_nvvm-13.0.1.dist-info"
    with zipfile.ZipFile(tmp_path / "nvidia_nvvm-13.0.1-py3-none-any.whl", "w") as wheel:
        named = "Metadata-Version: 2.1\nName: nvidia-nvvm\nVersion: 13.0.1\n"
        wheel.writestr(f"{about}/METADATA", named)
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    script = str(tmp_path / "benchmarks" / "gpu.sh")
    done = run(
        "bash", script, "--python", sys.executable, "--wheels", str(tmp_path), "--setup-only"
    )
    assert "has no torch" not in done.stderr, done.stderr
    assert done.returncode == 0 or "has no cupy" in done.stderr, done.stdout + done.stderr
    made = tmp_path / "build" / "gpu" / "venv" / "bin" / "python"
    # Where CUDA libraries of wheels are looked for, such as the compiler's.
    told = run(str(made), "-c", "import site; print(site.getsitepackages())").stdout
    assert repr(sysconfig.get_path("purelib")) in told, told
    # Of the driver's version, whichever the other environment has.
    assert list(made.parent.parent.glob("lib/python3*/site-packages/nvidia_nvvm-13.0.1*")), done


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


def part(begin: str, end: str) -> str:
    """Return what stands in the script from one line's beginning to another's."""
    script = (BENCHMARKS / "gpu.sh").read_text()
    lines = rf"^{re.escape(begin)}.*?^{re.escape(end)}"
    found = re.search(lines, script, re.MULTILINE | re.DOTALL)
    assert found is not None, (begin, end)
    return found[0]


STEPS = """
step 1 sh -c 'echo first; exec sleep 20'
step 9 sh -c "echo to see > $out/result; seq 60; false"
seconds=$((SECONDS + 2))
step 9 sleep 20
seconds=$SECONDS
step 9 true
"""


def test_a_step_that_hangs_or_fails_leaves_the_others_their_time(tmp_path: Path) -> None:
    """What has not begun by the end is left out, and all that was said is in one file."""
    log = tmp_path / "gpu.log"
    say = part("told() {", "# step")
    begun = time.monotonic()
    done = run(
        "bash",
        "-euc",
        f"failed=0 out={tmp_path} log={log} least=1 seconds=60 summary=(); : > $log\n{say}\n"
        f"{part('step() {', '}')}\n{STEPS}"
        "printf '%s\\n' \"${summary[@]}\"; exit $failed",
    )
    assert done.returncode == 1 and time.monotonic() - begun < 19, done
    assert (tmp_path / "result").exists() and "first" in log.read_text()
    assert "\n20\n" not in done.stdout and "\n21\n" in done.stdout and "\n20\n" in log.read_text()
    ends = [line[8:34].strip() for line in done.stdout.splitlines()[-4:]]
    assert ends[:2] == ["ended after 1 s", "failed with 1"]
    assert ends[2] in ("ended after 1 s", "ended after 2 s") and ends[3] == "not begun, time is up"


def test_at_most_eight_files_are_left(tmp_path: Path) -> None:
    """As many as come back from a machine that is lent for a while."""
    script = (BENCHMARKS / "gpu.sh").read_text()
    found = {
        name.replace("$ranks", n) for name in re.findall(r"\$out/([\w$.-]+)", script) for n in "24"
    }
    assert "gpu-train-step-4.json" in found and len(found | {"README.md"}) == 8, found


def test_paths_are_those_of_the_callers_folder(tmp_path: Path) -> None:
    for folder in ("wheels", "repository/benchmarks"):
        (tmp_path / folder).mkdir(parents=True)
    script = (BENCHMARKS / "gpu.sh").read_text().partition("# The package as it would")[0]
    copied = tmp_path / "repository" / "benchmarks" / "gpu.sh"
    copied.write_text(script + 'echo "$python $wheels $out"')
    (tmp_path / "python").symlink_to(sys.executable)
    options = ("--python", "./python", "--wheels", "wheels", "--out", "found")
    done = run(
        "bash", "-c", f"cd {tmp_path}; bash repository/benchmarks/gpu.sh {' '.join(options)}"
    )
    assert done.stdout == f"{tmp_path}/./python {tmp_path}/wheels {tmp_path}/found\n", done
    done = run("bash", str(copied), "--python", "python3")
    assert done.stdout == f"python3  {tmp_path}/repository/benchmarks/results\n", done
    for option, words in (
        ("--out", "--out needs a value"),
        ("--python no/such", "no such program"),
    ):
        done = run("bash", "-c", f"bash {copied} {option}")
        assert done.returncode == 2 and words in done.stderr, done


@pytest.mark.parametrize("folder", ["bin", "compute-sanitizer"])
def test_the_sanitizer_of_a_wheel_is_found_and_can_be_run(folder: str, tmp_path: Path) -> None:
    """Which pip installs as no program."""
    where = tmp_path / "lib" / "python3.12" / "site-packages" / "nvidia" / "cu13" / folder
    where.mkdir(parents=True)
    found = where / "compute-sanitizer"
    found.write_text("#!/bin/sh\necho it runs\n")
    looking = f"command() {{ false; }}\n{part('find_sanitizer() {', '}')}\n"
    done = run("bash", "-euc", f"venv={tmp_path}\n{looking}\n$(find_sanitizer)")
    assert done.stdout == "it runs\n" or Path("/usr/local/cuda/bin/compute-sanitizer").exists()


def test_a_toolkit_is_found_by_its_compiler(tmp_path: Path) -> None:
    """Which may be a script on PATH, and lie beside a library where Numba does not look for it."""
    found = part("# Numba finds the compiler", "lacks() {").removesuffix("lacks() {")
    toolkit, scripts = tmp_path / "cuda-13.0", tmp_path / "bin"
    for folder in (toolkit / "bin", toolkit / "nvvm" / "lib64", toolkit / "lib", scripts):
        folder.mkdir(parents=True)
    (scripts / "nvcc").write_text(f"#!/bin/sh\necho '#$ _HERE_={toolkit}/bin' >&2; false\n")
    (scripts / "nvcc").chmod(0o755)
    told = f"cd {tmp_path}; PATH={scripts}:$PATH\n{found}\necho ${{CUDA_HOME:-}} $LD_LIBRARY_PATH"

    def home(*environment: str) -> list[str]:
        clean = ("env", "-u", "CUDA_HOME", "-u", "CUDA_PATH", "LD_LIBRARY_PATH=/others")
        return run(*clean, *environment, "bash", "-euc", told).stdout.split()

    (toolkit / "lib" / "libnvvm.so.4").touch()
    beside = tmp_path / "build" / "gpu" / "nvvm"
    assert home() == [str(toolkit), f"{beside}:/others"]
    assert [path.name for path in beside.iterdir()] == ["libnvvm.so.4"]
    (toolkit / "nvvm" / "lib64" / "libnvvm.so.4").touch()
    assert home() == [str(toolkit), "/others"]
    assert home(f"CUDA_HOME={toolkit}/lib/..") == [f"{toolkit}/lib/..", "/others"]
    shutil.rmtree(toolkit / "nvvm")
    usual = Path("/usr/local/cuda")
    assert home()[0] == (str(usual) if (usual / "nvvm").exists() else "/others")


def test_what_hangs_before_the_first_step_is_ended(tmp_path: Path) -> None:
    """A driver that did not answer kept all steps from being begun."""
    for name in ("nvidia-smi", "bin/python"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("#!/bin/sh\nexec sleep 50\n")
        (tmp_path / name).chmod(0o755)
    soon = (
        f"PATH={tmp_path}:$PATH venv={tmp_path} log={tmp_path}/log no_kernels=none\n"
        'refuse() { echo "$*"; exit 2; }\ntimeout() { command timeout -k 1 1 "${@:4}"; }\n'
    )
    done = run("bash", "-euc", f"{soon}{part('{', '}')}")
    assert done.returncode == 0 and done.stdout.endswith("none\n"), done
    done = run("bash", "-euc", f"{soon}{part('lacks() {', '}')}\nif lacks numpy; then echo so; fi")
    assert (done.returncode, done.stdout) == (2, "import numpy has not ended in 90 s\n"), done
