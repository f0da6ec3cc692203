"""Ranks as processes that open each other's memory on one GPU, or on several."""

from pathlib import Path

import pytest
from gpu_job import run_ranks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("name", "ranks"), [("ipc", 2), ("ipc", 3), ("ipc", 4), ("nested", 4)], ids=str
)
def test_ranks_open_each_others_memory(name: str, ranks: int, tmp_path: Path) -> None:
    import cupy

    fake = getattr(cupy, "fake", False)  # whose kernels are slow
    run_ranks(ranks, name, ["3001", str(tmp_path)] if fake else ["4000001"])
