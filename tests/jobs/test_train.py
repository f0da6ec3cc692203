"""train.py as a user starts it: equal losses on every grid, every workload, and clear refusals."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringfold.workloads.digits import layers

TRAIN = Path(__file__).parents[2] / "train.py"
REPORT_KEYS = {
    "workload", "ranks", "data", "pipe", "steps", "seconds", "samples_per_second", "losses",
    "final_metric", "weights_sha256",
}  # fmt: skip


@pytest.fixture
def train(job: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run train.py on some ranks, and return its report."""

    def run(ranks: int, *options: object, timeout: float = 250) -> dict[str, Any]:
        path = tmp_path / "report.json"
        done = job(ranks, TRAIN, *options, "--report", path, timeout=timeout)
        assert done.returncode == 0 and not done.leftovers, done.output
        report = json.loads(path.read_text())
        assert report.keys() >= REPORT_KEYS
        assert len(report["losses"]) == report["steps"] and np.isfinite(report["losses"]).all()
        assert report["ranks"] == ranks == report["data"] * report["pipe"]
        return report

    return run


EVERY = ((4, 1), (2, 2), (1, 4))
SPLITS = (
    (2, 1, "gpipe"),
    (1, 2, "1f1b"),
    (4, 1, "gpipe"),
    (1, 4, "zero-bubble"),
    (2, 2, "zero-bubble"),
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "grids, options",
    [(((2, 2),), ("--steps", 20)), pytest.param(EVERY, (), marks=pytest.mark.slow)],
)
def test_digits_train_alike_on_every_grid(
    train: Callable[..., dict[str, Any]],
    grids: tuple[tuple[int, int], ...],
    options: tuple[object, ...],
) -> None:
    alone = train(1)
    assert alone["workload"] == "digits" and alone["steps"] >= 50
    assert alone["final_metric"]["test_accuracy"] >= 0.97
    if options:  # fewer steps are another schedule of the learning rate
        alone = train(1, *options)
    for data, pipe in grids:
        split = train(4, "--data", data, "--pipe", pipe, *options)
        np.testing.assert_allclose(split["losses"][:50], alone["losses"][:50], rtol=1e-4)
        accuracies = split["final_metric"]["test_accuracy"], alone["final_metric"]["test_accuracy"]
        assert abs(accuracies[0] - accuracies[1]) <= 0.01


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compressed_gradients_come_to_the_accuracy_of_whole_ones(
    train: Callable[..., dict[str, Any]],
) -> None:
    shapes = [tuple(p.shape) for layer in layers() for p in layer.parameters()]
    counts = [math.prod(shape) for shape in shapes]
    flags = 4 * (len(counts) + 1)  # of every parameter, and of a change
    low = 0
    for shape, count in zip(shapes, counts, strict=True):
        n, m = shape[0], count // shape[0]
        low += 4 * min(4 * (n + m), count) if min(n, m) > 1 else 4 * count
    kept = sum(math.ceil(0.01 * count) for count in counts)
    whole = train(2, "--wire", "fp32")
    steps = whole["steps"]
    expected = {
        "powersgd:4": 10 * 4 * sum(counts) + (steps - 10) * low,
        "topk:0.01": steps * 8 * kept,
    }
    accuracy = whole["final_metric"]["test_accuracy"]
    assert accuracy >= 0.97
    assert whole["wire_bytes"] == 2 * steps * (4 * sum(counts) + flags)
    for wire, nbytes in expected.items():
        found = train(2, "--wire", wire)
        assert found["final_metric"]["test_accuracy"] >= accuracy - 0.01
        assert found["wire_bytes"] == 2 * (nbytes + steps * flags)
        assert found["wire_bytes"] < whole["wire_bytes"] / 4


@pytest.mark.slow  # one split of both kinds is compared with the unsplit run below
@pytest.mark.timeout(200)
def test_added_in_a_tree_the_weights_are_equal_on_every_grid(
    train: Callable[..., dict[str, Any]],
) -> None:
    common = ("--steps", 8, "--reduction", "tree", "--microbatches", 8)
    alone = train(1, *common)
    for data, pipe, schedule in SPLITS:
        split = train(data * pipe, *common, "--data", data, "--pipe", pipe, "--schedule", schedule)
        assert split["losses"] == alone["losses"]
        assert split["weights_sha256"] == alone["weights_sha256"]


@pytest.mark.slow  # equal weights on every grid say it too
def test_the_same_run_gives_the_same_weights(train: Callable[..., dict[str, Any]]) -> None:
    one, two, other = (
        train(2, "--steps", 20, "--seed", seed)["weights_sha256"] for seed in (3, 3, 4)
    )
    assert one == two != other


def test_linear_learns(train: Callable[..., dict[str, Any]]) -> None:
    report = train(2, "--workload", "linear", "--steps", 2000)
    assert report["final_metric"]["test_mean_squared_error"] < 0.01
    assert report["losses"][0] > 10 * report["losses"][-1]


@pytest.mark.slow
@pytest.mark.parametrize("pipe", [1, 2])
def test_text_beats_the_single_bytes(train: Callable[..., dict[str, Any]], pipe: int) -> None:
    report = train(2, "--workload", "text", "--pipe", pipe, "--steps", 120)
    metric = report["final_metric"]
    assert metric["validation_bits_per_byte"] < metric["unigram_entropy"] - 0.4


@pytest.mark.parametrize(
    "ranks, options, shown",
    [
        (2, "--data 3", "makes 3 ranks, but this job has 2"),
        (2, "--schedule gpip", "expected a file, or one of: 1f1b, gpipe, interleaved, naive"),
        (2, "--checkpoint /proc/ringfold", "No such file or directory: '/proc/ringfold'"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (2, "--pipe 3", "--pipe 3 does not divide the 2 ranks"),
                (2, "--batch-size 7", "not divisible by the 2 data ranks"),
                (2, "--pipe 2 --microbatches 3", "--microbatches 3 does not divide the 64 samples"),
                (2, "--workload digit", "invalid choice: 'digit'"),
                (2, "--wire-dtype fp8", "invalid choice: 'fp8'"),
                (7, "--workload text --pipe 7", "6 layers"),
                (1, "--membership 0:3,1:2", "there is no rank 1"),
            )
        ),
    ],
)
def test_bad_options_are_refused_once_before_training(
    job: Callable[..., Any], ranks: int, options: str, shown: str
) -> None:
    done = job(ranks, TRAIN, *options.split(), timeout=60)
    assert done.returncode == 2 and not done.leftovers
    assert done.stderr.count("train.py: error:") == 1 and shown in done.stderr
    assert "Traceback" not in done.output and "samples/s" not in done.output


def test_ranks_that_were_given_different_options_do_not_train(job: Callable[..., Any]) -> None:
    script = f"""
import os, runpy, sys
rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"]
sys.argv = ["train.py", "--seed", rank]
sys.path.insert(0, {str(TRAIN.parent)!r})
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
"""
    done = job(2, script, timeout=60)
    assert done.returncode == 2
    assert "ranks that differ from rank 0: [1]" in done.stderr


def test_without_stderr_it_trains_all_the_same(job: Callable[..., Any]) -> None:
    """As behind a shell's 2>&-: it ended without a word, since the bar had nowhere to write."""
    script = f"""
import runpy, sys
sys.stderr, sys.argv = None, ["train.py", "--steps", "3"]
sys.path.insert(0, {str(TRAIN.parent)!r})
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
"""
    done = job(0, script)
    assert done.returncode == 0 and "test_accuracy: " in done.stdout, done.output


def test_compare_names_where_two_runs_part(job: Callable[..., Any], tmp_path: Path) -> None:
    grid = "--data 2 --pipe 2 --schedule zero-bubble"
    weights = []
    for name, ranks, options in (("a", 1, ""), ("b", 4, grid), ("c", 1, "--lr 0.049")):
        options = f"--steps 3 --reduction tree --microbatches 8 --dump {tmp_path}/{name} {options}"
        report = tmp_path / f"{name}.json"
        done = job(ranks, TRAIN, *options.split(), "--report", report)
        assert done.returncode == 0, done.output
        weights.append(json.loads(report.read_text())["weights_sha256"])
    assert weights[0] == weights[1] != weights[2]
    same = job(0, ["-m", "ringfold"], "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert (same.returncode, same.stdout) == (0, "no difference\n")
    other = job(0, ["-m", "ringfold"], "compare", tmp_path / "a.json", tmp_path / "c.json")
    assert other.returncode == 1
    assert other.stdout.startswith("step 1: 0.bias: ")
    assert " of 32 elements, largest relative difference" in other.stdout
    assert "step 2: loss: " in other.stdout
