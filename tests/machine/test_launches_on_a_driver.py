"""What Numba asks a driver for, told by a pretended one: all that lies between `Launcher` and CUDA.

Neither the simulator nor the machine that runs PTX has contexts, streams, modules or launches.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(
    COMPILER is None or importlib.util.find_spec("numba_cuda") is None,
    reason="needs a C compiler, and numba-cuda (extra gpu-test)",
)
SOURCE = Path(__file__).parent.parent / "pretended_driver.c"

SCRIPT = """
import sys, threading
import numpy as np
from numba.cuda import cuda_paths
from numba.cuda.cudadrv import nvrtc

# Which is asked for no more than the name of the architecture.
cuda_paths._get_nvrtc_path = lambda: None
nvrtc.get_arch_option = lambda major, minor, suffix="": f"compute_{major}{minor}{suffix}"
from ringfold.kernels.device import combine, table
from ringfold.kernels.device.launch import Launcher
from ringfold.kernels.device.usable import why_not

say = lambda text: print(text, file=sys.stderr)
here, there = Launcher(0, 1), Launcher(0, 0x5550)
values = np.arange(70_000, dtype=np.float32)
one, two = table.place(values, here), table.place(values, there)
assert np.array_equal(one.read(), values) and here.max_blocks == 8 * 132
say(f"arguments: {one.span.address} {two.span.address} {values.size}")

def launch():
    assert combine.combine("sum", "float32", one.span, two.span, there)

assert combine.combine("sum", "float32", one.span, two.span, here)
launch()
thread = threading.Thread(target=launch)
thread.start()
thread.join()
say(why_not(0))
"""


def test_contexts_copies_modules_and_launches(tmp_path: Path) -> None:
    assert COMPILER is not None
    library = str(tmp_path / "libcuda.so.1")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    beside = os.environ.get("LD_LIBRARY_PATH", "")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        env=os.environ | {"LD_LIBRARY_PATH": f"{tmp_path}:{beside}", "NUMBA_ENABLE_CUDASIM": "0"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()
    at = next(i for i, line in enumerate(told) if line.startswith("arguments: "))
    wanted = told[at].removeprefix("arguments: ")
    assert told[: at + 5] == [
        "copy in on 0x1",
        "copy in on 0x5550",
        "copy out on 0x1",
        told[at],
        "module",
        f"launch 35 x 256 on 0x1: {wanted}",
        f"launch 35 x 256 on 0x5550: {wanted}",
        f"launch 35 x 256 on 0x5550: {wanted}",
    ]
    # It is compiled, launched and read by why_not, too, but nothing has run.
    assert told[-1] == "a kernel has added 1 and 2 wrongly"
    assert any(line.startswith("launch 1 x 256 on 0x1: ") for line in told[at:])
    assert told.count("module") == 1
