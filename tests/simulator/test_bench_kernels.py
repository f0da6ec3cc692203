"""The benchmark of the kernels launches all of them, and counts; no time is looked at."""

import sys
from pathlib import Path

import pytest
from numba import config

pytestmark = [
    pytest.mark.skipif(not config.ENABLE_CUDASIM, reason="make test-simulator"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def test_every_kernel_runs_and_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent.parent / "benchmarks"))
    import gpu_kernels

    from ringfold.kernels.device.launch import Launcher

    launches, copies = [], []

    def seconds(launch):
        launches.append(launch())
        return 2.0 if len(launches) % 2 else 1.0  # a kernel, then its copy

    launcher = Launcher(blocks=2, threads=4)
    rows = gpu_kernels.measure(320, launcher, lambda nbytes: lambda: copies.append(nbytes), seconds)
    names = [row["kernel"] for row in rows]
    assert len(set(names)) == len(names) == 14
    assert len(launches) == 2 * len(rows) and all(row["share"] == 0.5 for row in rows)
    sizes = {row["kernel"]: row["nbytes"] for row in rows}
    assert sizes["pack float32"] == 320 * 8 and sizes["pack bfloat16"] == 320 * 6
    assert sizes["fold of 2, bfloat16"] == 320 * 8 and sizes["combine float32"] == 320 * 12
    assert copies[0] == 320 * 4 and "gpu_kernels" in sys.modules
