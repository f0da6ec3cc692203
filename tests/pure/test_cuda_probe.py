"""Whether MPI sends device memory is tried by a process that may die of it, once per library."""

import os
import resource
from pathlib import Path

import pytest

from ringfold.comm.settings import beside_the_job
from ringfold.comm.transport.cuda_probe import Verdict, gpu_aware, probe, recalled, remember

FINE = "print('sent device memory')"


@pytest.mark.parametrize(
    ("child", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11: without a word"),
        ("import sys; sys.exit('not what was sent')", "status 1: not what was sent"),
        ("print('something else')", "status 0: without a word"),
        ("import cupy_of_another_world", "No module named"),
    ],
)
def test_only_a_child_that_sent_says_yes(child: str, words: str) -> None:
    verdict = probe(os.environ, child)
    assert not verdict.aware and words in verdict.reason


def test_a_child_that_sent() -> None:
    assert probe(os.environ, FINE).aware


def test_a_child_that_crashes_leaves_no_core() -> None:
    """Of a process with a GPU's memory, in the folder where somebody has asked doctor."""
    child = "import sys; sys.exit(f'core {resource.getrlimit(resource.RLIMIT_CORE)[0]}')"
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        verdict = probe(os.environ, child)
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    assert verdict.reason.endswith("status 1: core 0"), verdict


def test_a_child_that_hangs_is_ended() -> None:
    verdict = probe(os.environ, "import time; time.sleep(60)", seconds=0.5)
    assert verdict == Verdict(False, "the process that tried has not ended after 0.5 s")


def test_the_answer_is_kept_by_library(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "gpu-aware.json"
    assert gpu_aware(os.environ, path, "library 1", FINE).aware
    assert gpu_aware(os.environ, path, "library 1", "raise SystemExit(1)").aware
    assert not gpu_aware(os.environ, path, "library 2", "raise SystemExit(1)").aware
    assert recalled(path, "library 1") == Verdict(True, "a process that tried sent device memory")
    assert sorted(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[]", '{"a": {"aware": true}}', '{"a": 3}'])
def test_a_damaged_file_is_no_answer(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    assert recalled(path, "a") is None
    remember(path, "a", Verdict(True, "tried"))
    assert recalled(path, "a") == Verdict(True, "tried")


def test_the_child_is_no_rank_of_the_job() -> None:
    kept = {"HOME": "/h", "OMPI_ALLOW_RUN_AS_ROOT": "1", "PATH": "p"}
    told = {"OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1", "PMI_RANK": "0", "PRTE_X": "y"}
    assert beside_the_job({**kept, **told}) == kept
