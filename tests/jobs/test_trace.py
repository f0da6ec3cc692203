"""train.py --trace and --check-finite as a user starts them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TRAIN = Path(__file__).parents[2] / "train.py"


@pytest.mark.timeout(200)
def test_a_trace_of_a_pipeline_has_every_rank_and_action(
    job: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    options = ("--workload", "digits", "--pipe", 2, "--microbatches", 2, "--steps", 3)
    done = job(2, TRAIN, *options, "--trace", path, timeout=120)
    assert done.returncode == 0, done.output
    assert "exposed" in done.stdout and "bubble" in done.stdout
    found = json.loads(path.read_text())
    events = [event for event in found["traceEvents"] if event["ph"] == "X"]
    for rank in range(2):
        compute = [e["name"] for e in events if e["pid"] == rank and e["cat"] == "compute"]
        assert compute.count("optimizer") == 3
        assert sorted(name for name in compute if name != "optimizer") == sorted(
            ["F0", "F1", "B0", "B1"] * 3
        )
    assert found["otherData"]["lost_operations"] == 0


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--steps 5 --check-finite", "step 1, micro-batch 0, rank 0: the gradient of"),
        ("--steps 5", "the loss of step 1 is"),
        ("--workload linear --steps 1 --lr 3e38", "the final metric test_mean_squared_error is"),
    ],
)
def test_a_run_that_blows_up_says_once_where(
    job: Callable[..., Any], tmp_path: Path, option: str, told: str
) -> None:
    report = tmp_path / "report.json"
    options = ("--lr", "1e30", *option.split(), "--report", report)
    done = job(2, TRAIN, *options, timeout=120)
    assert done.returncode == 1 and not report.exists(), done.output
    assert done.output.count(told) == 1 and "Traceback" not in done.output
    assert told in done.stderr


@pytest.mark.timeout(200)
def test_a_disk_that_is_full_at_the_end_costs_the_files_and_not_the_result(
    job: Callable[..., Any], tmp_path: Path
) -> None:
    """There was a traceback instead of the evaluation (--trace), or after it (--report)."""
    link = tmp_path / "trace.json"
    link.symlink_to("/dev/full")  # one file for both is refused
    done = job(2, TRAIN, "--steps", 3, "--trace", link, "--report", "/dev/full", timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.output, done.output
    assert "test_accuracy" in done.stdout and "exposed" in done.stdout
    for what in (f"the trace: {link}: No space left", "the report: /dev/full: No space left"):
        assert done.stderr.count(what) == 1, done.output
