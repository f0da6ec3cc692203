"""The conftest of tests/processes, judged from outside on tests that are made to fail."""

from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent.parent / "processes" / "conftest.py"
HEAD = """
import time
import pytest
from mpi4py import MPI

rank = MPI.COMM_WORLD.rank
"""


@pytest.fixture
def session(job, tmp_path):
    def run(ranks, source, timeout=60):
        folder = tmp_path / "suite"
        folder.mkdir()
        (folder / "conftest.py").write_text(CONFTEST.read_text())
        (folder / "test_it.py").write_text(HEAD + source)
        pytest_command = [
            "-m",
            "pytest",
            "--color=no",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(folder),
        ]
        result = job(ranks, [*pytest_command, str(folder)], timeout=timeout)
        assert not result.timed_out, result.output
        assert result.leftovers == ()
        return result

    return run


def test_agreement_passes_and_only_rank_0_reports(session):
    result = session(3, "def test_one(): pass\ndef test_two(): pass\n")
    assert result.returncode == 0, result.output
    assert result.stdout.count("test session starts") == 1
    assert result.stdout.count("2 passed") == 1


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_failure_on_one_rank_fails_all_and_shows_its_traceback(session, culprit):
    result = session(
        3,
        f"""
def test_bad():
    local_name_of_culprit = rank
    assert rank != {culprit}, f"told by {{rank}}"

def test_good():
    MPI.COMM_WORLD.Barrier()
""",
    )
    assert result.returncode != 0
    assert f"rank {culprit} of 3, call" in result.stdout
    assert "local_name_of_culprit = rank" in result.stdout
    assert f"told by {culprit}" in result.stdout
    assert "1 failed, 1 passed" in result.stdout


def test_no_rank_enters_a_test_whose_setup_failed_elsewhere(session):
    result = session(
        2,
        """
@pytest.fixture
def half():
    assert rank == 0, "no fixture here"

def test_collective(half):
    MPI.COMM_WORLD.Barrier()
""",
    )
    assert result.returncode != 0
    assert "no fixture here" in result.stdout
    assert "1 error" in result.stdout
    assert result.seconds < 30  # well below the limit at which the stacks are written


def test_ranks_must_agree_whether_to_skip(session):
    result = session(2, "def test_half():\n    if rank: pytest.skip('not me')\n")
    assert result.returncode != 0
    assert "do not agree whether to skip" in result.stdout


def test_a_failure_while_others_wait_ends_the_job_with_its_traceback(session):
    result = session(
        2,
        """
def test_half():
    assert rank == 0, "rank 1 leaves early"
    MPI.COMM_WORLD.Barrier()
    MPI.COMM_WORLD.recv(source=1)
""",
    )
    assert result.returncode != 0
    assert "[rank 1] " in result.stderr
    assert "rank 1 leaves early" in result.stderr
    assert result.seconds < 30


def test_a_hang_ends_within_its_limit_and_shows_the_stacks_of_all_ranks(session):
    result = session(
        2,
        """
@pytest.mark.limit(2)
def test_hang():
    MPI.COMM_WORLD.recv(source=1 - rank)
""",
    )
    assert result.returncode != 0
    for rank in (0, 1):
        assert f"[rank {rank}] test_it.py::test_hang (call) passed its limit of 2 s" in (
            result.stderr
        )
        assert any(
            line.startswith(f"[rank {rank}]") and "in test_hang" in line
            for line in result.stderr.splitlines()
        )
    assert result.seconds < 30


def test_a_failed_collection_on_one_rank_fails_all(session):
    result = session(2, "assert rank == 0, 'cannot import here'\ndef test_one(): pass\n")
    assert result.returncode != 0
    assert "cannot import here" in result.stdout
    assert "1 passed" not in result.stdout


def test_the_ranks_must_collect_the_same_tests(session):
    result = session(2, "@pytest.mark.parametrize('r', [rank])\ndef test_one(r): pass\n")
    assert result.returncode != 0
    assert "rank 1 collected other tests than rank 0" in result.stdout
    assert "test_one[1]" in result.stdout
