"""Whole jobs: scripts started by mpirun as a user would, with proof that nothing is left over."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

MARKER = "RINGFOLD_TEST_JOB"
STARTUP = Path(__file__).parent / "startup"
LEFTOVER_GRACE_SECONDS = 3.0


@dataclass(frozen=True)
class Job:
    """What a job left behind; `leftovers` names processes that outlived it (they were killed)."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    timed_out: bool
    leftovers: tuple[str, ...]

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Run a script on some ranks: job(ranks, script, *args, env=None, timeout=60, cwd=None).

    `script` is Python source text, a path to a file, or ["-m", "module"].  `ranks` 0 starts it
    without a launcher, and with `ft` it survives the death of ranks.  A job that passes its
    timeout is ended and says so in `timed_out`.
    """
    started: list[str] = []

    def run(
        ranks: int,
        script: str | Path | list[str],
        *args: object,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        cwd: Path | None = None,
        ft: bool = False,
    ) -> Job:
        mark = uuid.uuid4().hex
        started.append(mark)
        folder = tmp_path / f"job{len(started)}"
        folder.mkdir()
        command = [*launcher(ranks, ft), sys.executable, *program(script, folder), *map(str, args)]
        environment = {**launcher_environment(), **(env or {}), MARKER: mark}
        return supervise(command, environment, mark, folder, cwd or folder, timeout)

    yield run
    for mark in started:
        end_all(mark)


def launcher(ranks: int, ft: bool = False) -> list[str]:
    if ranks == 0:
        return []
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.fail("there is no mpirun beside the interpreter or on PATH")
    return [found, *(["--with-ft", "ulfm"] if ft else []), "-n", str(ranks)]


def launcher_environment() -> dict[str, str]:
    """This process's environment, made fit to start ranks with any MPI; see the Makefile."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
    }
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    path = os.pathsep.join(filter(None, [str(STARTUP), os.environ.get("PYTHONPATH")]))
    return {**environment, **os.environ, "PYTHONPATH": path}


def program(script: str | Path | list[str], folder: Path) -> list[str]:
    if isinstance(script, list):
        return script
    if isinstance(script, Path):
        return [str(script)]
    path = folder / "script.py"
    path.write_text(script)
    return [str(path)]


def supervise(
    command: list[str],
    environment: Mapping[str, str],
    mark: str,
    folder: Path,
    cwd: Path,
    timeout: float,
) -> Job:
    # Files, not pipes: a process that outlives the job would keep a pipe open, and us reading.
    out, err = folder / "stdout", folder / "stderr"
    start = time.monotonic()
    timed_out = False
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            end_session(process)
        seconds = time.monotonic() - start
    return Job(
        process.returncode,
        out.read_text(errors="replace"),
        err.read_text(errors="replace"),
        seconds,
        timed_out,
        leftovers(mark),
    )


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ask the launcher to end its ranks; make it, if it does not."""
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
            return
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    process.wait(1)


def leftovers(mark: str) -> tuple[str, ...]:
    """Name the processes of a job that are still there after a moment of grace, and kill them."""
    deadline = time.monotonic() + LEFTOVER_GRACE_SECONDS
    while members(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    return end_all(mark)


def end_all(mark: str) -> tuple[str, ...]:
    found = members(mark)
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return tuple(f"{pid}: {command}" for pid, command in found.items())


def members(mark: str) -> dict[int, str]:
    """Find a job's processes by the marker in their environment, whoever their parent is now."""
    needle = f"{MARKER}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(entry.name)] = command.decode(errors="replace").strip()
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found
