import math
import os
from pathlib import Path
from typing import Any

import pytest

from ringfold.comm.settings import (
    Settings,
    beside_the_job,
    fit_to_start_mpi,
    free_place,
    hold_place,
    holder,
    started_in,
    started_together,
    unlike,
)

COMPONENTS = "OMPI_MCA_btl"


def test_names_are_read() -> None:
    environ = {
        "RINGFOLD_TIMEOUT": "2.5",
        "RINGFOLD_SEGMENT_BYTES": "100",
        "RINGFOLD_MAX_MESSAGE_BYTES": "1000",
        "RINGFOLD_ABORT": "0",
        "OTHER": "x",
    }
    assert Settings.read(environ) == Settings(2.5, 100, 1000, False)
    assert Settings.read({}) == Settings()
    table = Path("ringfold/tuning.json")
    assert Settings.read({"HOME": "/h"}).tuning == Path("/h/.cache") / table
    assert Settings.read({"HOME": "/h", "XDG_CACHE_HOME": "/c"}).tuning == Path("/c") / table


def test_fields_count_more_than_names() -> None:
    environ = {"RINGFOLD_TIMEOUT": "2.5", "RINGFOLD_SHARED": "0"}
    assert Settings.read(environ, timeout=60) == Settings(60, shared=False)


def test_what_is_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="RINGFOLD_TIMEOUT=0: timeout must be above 0 s"):
        Settings.read({"RINGFOLD_TIMEOUT": "0", "RINGFOLD_SHARED": "0"})


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("TIMEOUT", "soon", "seconds, such as 60"),
        ("TIMEOUT", "", "seconds, such as 60"),
        ("SEGMENT_BYTES", "1.5", "a whole number of bytes, such as 524288"),
        ("MAX_MESSAGE_BYTES", "512KiB", "a whole number of bytes, such as 524288"),
        ("ABORT", "yes", "0 or 1"),
        ("SHARED", "no", "0 or 1"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, value: str, expected: str) -> None:
    """It was said that it cannot be read, and not what can."""
    with pytest.raises(ValueError, match=f"^RINGFOLD_{name}: expected {expected}, got '{value}'$"):
        Settings.read({f"RINGFOLD_{name}": value})


def test_settings_that_ranks_must_share_are_compared() -> None:
    """They met in shared memory, or not: an error of another call, or a hang, told of it."""
    base = Settings()
    assert unlike([base.alike] * 3) == ""
    free = Settings(timeout=2, abort=False, compiled=False, tuning=Path("x"))
    assert unlike([base.alike, free.alike]) == ""
    rows = [base.alike, Settings(cma=False, segment_bytes=8).alike, base.alike]
    assert unlike(rows) == (
        "segment_bytes (RINGFOLD_SEGMENT_BYTES) is 524288 on ranks 0, 2, 8 on rank 1; "
        "cma (RINGFOLD_CMA) is True on ranks 0, 2, False on rank 1"
    )
    many = [base.alike] + [Settings(watch=False).alike] * 20
    assert unlike(many).endswith("False on ranks 1, 2, 3, 4, 5, 6, 7, 8 and 12 more")


@pytest.mark.parametrize(
    "changes",
    [
        {"timeout": 0},
        {"timeout": math.nan},
        {"segment_bytes": 0},
        {"segment_bytes": 1 << 31},
        {"max_message_bytes": 1 << 31},
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Settings(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"timeout": "60"}, {"segment_bytes": 1e6}, {"shared": "no"}, {"abort": None}, {"tuning": "x"}],
)
def test_settings_of_another_type_are_refused_at_once(changes: dict[str, Any]) -> None:
    """A float opened a communicator, and broke its first large message off; "no" was yes."""
    with pytest.raises(TypeError, match=f"{next(iter(changes))}: expected .*, got "):
        Settings(**changes)


def test_one_sided_components_are_left_out_at_the_start_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(COMPONENTS, raising=False)
    with pytest.raises(RuntimeError), fit_to_start_mpi():
        assert os.environ[COMPONENTS] == "^ofi,uct"
        raise RuntimeError
    assert COMPONENTS not in os.environ


def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPONENTS, "self,tcp")
    with fit_to_start_mpi():
        assert os.environ[COMPONENTS] == "self,tcp"
    assert os.environ[COMPONENTS] == "self,tcp"


def test_the_folder_of_the_start_is_the_launchers_if_there_is_one(tmp_path: Path) -> None:
    assert started_in({"PWD": str(tmp_path)}) == str(tmp_path)
    for unknown in ({}, {"PWD": "."}, {"PWD": str(tmp_path / "gone")}):
        assert started_in(unknown) == os.getcwd()


def test_how_many_processes_were_started_is_what_the_innermost_launcher_says() -> None:
    """mpirun -n 1 within an srun of four, and a shell of srun's, have one process alone."""
    open_mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    hydra = {"PMI_SIZE": "3", "PMI_RANK": "2"}
    srun = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}
    torchrun = {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    for told in (open_mpi, hydra, srun, torchrun):
        name, count = next(iter(told.items()))
        assert started_together(told) == {name: int(count)}
    assert started_together({**hydra, **srun}) == {"PMI_SIZE": 3, "SLURM_STEP_NUM_TASKS": 4}
    alone = {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}
    shell = {**srun, "SLURM_PTY_PORT": "40000"}
    by_pmi2 = {**shell, **hydra, "PMI_JOBID": "7.0"}
    batch = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    for one in ({}, {**srun, **alone}, shell, by_pmi2, batch, {"WORLD_SIZE": "2"}):
        assert started_together(one) == {}
    assert started_together({**shell, **hydra}) == {"PMI_SIZE": 3}


def test_a_place_in_the_job_is_held_by_the_process_that_has_started_mpi(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a rank started passed for the rank with MPI; newcomers and inner jobs have their own."""
    monkeypatch.setenv("PMIX_NAMESPACE", "prterun-here-7@1")
    monkeypatch.setenv("PMIX_RANK", "3")
    assert holder() is None
    hold_place()
    assert holder() is None  # be it by exec
    inherited = dict(os.environ)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert holder() is not None and holder()[1] == 3
    assert holder(beside_the_job(inherited)) is None
    assert holder({**inherited, "PMIX_NAMESPACE": "prterun-here-7@2"}) is None
    assert holder({**inherited, "PMIX_RANK": "2"}) is None
    free_place()
    assert holder() is None


def test_without_a_launcher_nobody_holds_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PMIX_NAMESPACE", raising=False)
    before = dict(os.environ)
    hold_place()
    assert dict(os.environ) == before
