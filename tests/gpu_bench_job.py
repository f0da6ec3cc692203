"""A benchmark of GPUs on the pretended one: python gpu_bench_job.py FOLDER NAME [OPTION ...]."""

import runpy
import sys
from pathlib import Path

import fake_cupy

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

folder, name, *options = sys.argv[1:]
fake_cupy.install(folder)
sys.path.insert(0, str(BENCHMARKS))

import gpu_clock  # noqa: E402

# The pretended device is slow enough.
gpu_clock.HOLD_BYTES = 1 << 16
gpu_clock.Clock.__init__.__defaults__ = (2, 1)  # launches, batches
sys.argv = [name, *options]
runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
