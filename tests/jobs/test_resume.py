"""train.py killed in the middle and resumed: the weights of the unbroken run, on any grid."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TRAIN = Path(__file__).parents[2] / "train.py"

# Rank 1, or rank 0 where it is alone, is killed as by `kill -9` after so many steps.
KILLED = f"""
import os, runpy, signal, sys
from ringfold.workloads.losses import GlobalLosses

steps, *sys.argv[1:] = sys.argv[1:]
add = GlobalLosses.add
seen = []

def count(self, loss):
    add(self, loss)
    seen.append(loss)
    if len(seen) == int(steps) and os.environ.get("OMPI_COMM_WORLD_RANK", "0") != "0":
        os.kill(os.getpid(), signal.SIGKILL)

GlobalLosses.add = count
sys.argv[0] = {str(TRAIN)!r}
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
"""


@pytest.fixture
def train(job: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run train.py on some ranks, and return its report."""

    def run(ranks: int, *options: object) -> dict[str, Any]:
        path = tmp_path / "report.json"
        done = job(ranks, TRAIN, *options, "--report", path, timeout=250)
        assert done.returncode == 0 and not done.leftovers, done.output
        report: dict[str, Any] = json.loads(path.read_text())
        assert len(report["losses"]) == report["steps"]
        return report

    return run


SAME = ((2, 2),)
EVERY = ((4, 2), (1, 1), (2, 1), (2, 2), (4, 1))
"""Ranks, and stages: those that go on; the first are those that are killed."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("grids", [SAME, pytest.param(EVERY, marks=pytest.mark.slow)])
def test_digits_go_on_as_if_nothing_had_happened(
    job: Callable[..., Any],
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    grids: tuple[tuple[int, int], ...],
) -> None:
    # 22 steps are an epoch: the checkpoints lie in the first and in the second.
    options = ("--steps", 27, "--every", 8)
    first, *_ = grids
    ranks, pipe = first
    unbroken = train(ranks, "--pipe", pipe, *options, "--checkpoint", tmp_path / "unbroken")
    assert unbroken["checkpoints"]["count"] == 4  # after 8, 16, 24, and the last
    assert unbroken["checkpoints"]["stood_still_seconds"] > 0
    stop = random.SystemRandom().randint(17, 26)
    store = ("--checkpoint", tmp_path / "killed")
    killed = job(ranks, KILLED, stop, "--pipe", pipe, *options, *store, timeout=250)
    assert killed.returncode != 0 and not killed.leftovers
    for ranks, pipe in grids:
        folder = tmp_path / f"{ranks}-{pipe}"
        shutil.copytree(tmp_path / "killed", folder)
        resumed = train(ranks, "--pipe", pipe, *options, "--checkpoint", folder, "--resume")
        assert resumed["resumed_at"] in (8, 16, 24), stop
        np.testing.assert_allclose(resumed["losses"], unbroken["losses"], rtol=0, atol=1e-5)
        if (ranks, pipe) == first:
            assert resumed["weights_sha256"] == unbroken["weights_sha256"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("workload, steps, every", [("digits", 34, 8), ("text", 7, 2)])
@pytest.mark.parametrize("reduction", ["tree", "bucket"])
def test_every_grid_goes_on_from_two_by_two(
    job: Callable[..., Any],
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    workload: str,
    steps: int,
    every: int,
    reduction: str,
) -> None:
    options = ("--workload", workload, "--reduction", reduction, "--steps", steps)
    unbroken = train(4, "--pipe", 2, *options)
    stop = random.SystemRandom().randint(2 * every, steps - 1)  # the first is whole by then
    store = ("--checkpoint", tmp_path / "killed", "--every", every)
    assert job(4, KILLED, stop, "--pipe", 2, *options, *store).returncode != 0
    for ranks, pipe in EVERY:
        folder = tmp_path / f"{ranks}-{pipe}"
        shutil.copytree(tmp_path / "killed", folder)
        store = ("--checkpoint", folder, "--every", every, "--resume")
        resumed = train(ranks, "--pipe", pipe, *options, *store)
        assert 0 < resumed["resumed_at"] < steps, stop
        np.testing.assert_allclose(resumed["losses"], unbroken["losses"], rtol=0, atol=1e-5)
        if reduction == "tree" or (ranks, pipe) == (4, 2):
            assert resumed["weights_sha256"] == unbroken["weights_sha256"], (ranks, pipe)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_text_goes_on_as_if_nothing_had_happened(
    job: Callable[..., Any], train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    options = ("--workload", "text", "--steps", 7)
    unbroken = train(2, *options)
    stop = random.SystemRandom().randint(5, 6)
    store = ("--checkpoint", tmp_path / "store", "--every", 2)
    assert job(2, KILLED, stop, *options, *store).returncode != 0
    resumed = train(2, *options, *store, "--resume")
    assert resumed["resumed_at"] in (2, 4, 6), stop
    assert resumed["weights_sha256"] == unbroken["weights_sha256"]
    assert resumed["losses"] == unbroken["losses"]


def test_a_checkpoint_is_gone_on_from_only_by_the_run_that_it_belongs_to(
    job: Callable[..., Any], train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    store = ("--checkpoint", tmp_path / "store", "--steps", 2)
    # A run with nothing to resume starts from the beginning, so that one command line does for all.
    assert train(1, *store, "--resume")["resumed_at"] == 0
    assert train(1, *store, "--resume")["resumed_at"] == 2
    for options, shown in (
        (("--steps", 1, "--resume"), "is of step 2, but this run is to have 1 steps"),
        (("--seed", 3, "--resume"), "seed is 3 here, but 0 in the checkpoint"),
        ((), "holds a checkpoint of step 2: go on from it by --resume"),
    ):
        done = job(1, TRAIN, *store, *options)
        assert done.returncode == 2 and shown in done.stderr and "Traceback" not in done.stderr
