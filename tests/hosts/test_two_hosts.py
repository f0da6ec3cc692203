"""The communicator over two hosts with a link of 1 Gbit/s, made on this machine by tools/hosts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs.conftest import MARKER, Job, end_all, launcher_environment, members, supervise

ROOT = Path(__file__).parents[2]
SKIPPED = 77

OnHosts = Callable[..., Job]


@pytest.fixture
def on_hosts(tmp_path: Path) -> Iterator[OnHosts]:
    """Run a program on two hosts: on_hosts(ranks_per_host, *program, timeout=60).

    Skips, with the reason, where the machine does not allow hosts.
    """
    mark = uuid.uuid4().hex

    def run(ranks_per_host: int, *program: str, timeout: float = 60) -> Job:
        command = [*harness(ranks_per_host), *program]
        environment = {**launcher_environment(), MARKER: mark}
        job = supervise(command, environment, mark, tmp_path, ROOT, timeout)
        if job.returncode == SKIPPED:
            pytest.skip(job.stderr.strip())
        return job

    yield run
    end_all(mark)


def harness(ranks_per_host: int) -> list[str]:
    options = ["--ranks-per-host", str(ranks_per_host)]
    return [sys.executable, str(ROOT / "tools" / "hosts"), *options, "--", sys.executable]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks_per_host", [1, 2])
def test_the_contract_holds_over_two_hosts(on_hosts: OnHosts, ranks_per_host: int) -> None:
    files = [f"tests/processes/comm/test_{name}.py" for name in ("collectives", "reports", "nodes")]
    pytest_ = ["-m", "pytest", "--color=no", "-p", "no:cacheprovider", *files]
    job = on_hosts(ranks_per_host, *pytest_, timeout=280)
    assert job.returncode == 0, job.output
    assert " passed" in job.stdout
    assert job.leftovers == ()


def test_there_are_two_nodes_of_equal_size(on_hosts: OnHosts) -> None:
    job = on_hosts(
        2,
        "-c",
        """
import os, socket, ringfold
comm = ringfold.Communicator()
line = f"{comm.rank} {socket.gethostname()} {comm.node.rank}/{comm.node.size}\\n"
os.write(1, line.encode())
comm.close()
""",
    )
    assert job.returncode == 0, job.output
    assert sorted(job.stdout.splitlines()) == [
        "0 hosta 0/2",
        "1 hosta 1/2",
        "2 hostb 0/2",
        "3 hostb 1/2",
    ]


def test_the_benchmark_measures_the_link_and_everybody_on_it(
    on_hosts: OnHosts, tmp_path: Path
) -> None:
    result = tmp_path / "rows.json"
    options = ["--sizes", "64KiB", "--repeats", "2", "--json", str(result)]
    job = on_hosts(2, str(ROOT / "benchmarks" / "hosts.py"), *options)
    assert job.returncode == 0, job.output
    rows = json.loads(result.read_text())["rows"]
    found = [(row["impl"], row["algorithm"], row["nodes"], row["wrong"]) for row in rows]
    assert found == [
        ("limit", "one message", 2, 0),
        ("limit", "one each way", 2, 0),
        ("ordinary", "hierarchical (chosen)", 2, 0),
        ("ordinary", "ring", 2, 0),
        ("ordinary", "hierarchical", 2, 0),
        ("mpi", "-", 2, 0),
    ]


def test_the_status_comes_back_and_no_process_outlives_the_hosts(on_hosts: OnHosts) -> None:
    """Each rank leaves a sleeper behind, in a session of its own, and fails."""
    job = on_hosts(
        1,
        "-c",
        """
import subprocess, sys
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
subprocess.Popen(sleep, start_new_session=True, **quiet)
sys.exit(3)
""",
    )
    assert job.returncode == 3, job.output
    assert job.leftovers == ()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_harness_is_ended(
    on_hosts: OnHosts, tmp_path: Path, number: signal.Signals
) -> None:
    on_hosts(1, "-c", "pass")  # skips where there can be no hosts
    mark = uuid.uuid4().hex
    ready = tmp_path / "ready"
    program = f"import pathlib, time; pathlib.Path({str(ready)!r}).touch(); time.sleep(600)"
    with subprocess.Popen(
        [*harness(1), "-c", program],
        env={**launcher_environment(), MARKER: mark},
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + 30
            while not ready.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert ready.exists()
            if number == signal.SIGKILL:
                process.kill()
            else:
                os.killpg(process.pid, number)
            process.wait(20)
            while members(mark) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert members(mark) == {}
        finally:
            end_all(mark)


def test_a_machine_without_the_tools_is_refused_with_the_reason(tmp_path: Path) -> None:
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\necho 'mpirun (Open MPI) 5.0.0'\n")
    mpirun.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "hosts"), "--", "true"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == SKIPPED
    assert "two hosts: skipped: needs ip, tc, unshare" in done.stderr


START = """
import os, signal, sys, threading, time
import numpy as np
import ringfold

comm = ringfold.Communicator(settings=ringfold.Settings(timeout={timeout}))
comm.allreduce(np.ones(3))
"""


def test_a_rank_killed_on_one_host_ends_the_other_at_once(on_hosts: OnHosts) -> None:
    script = """
if comm.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
while True:
    comm.allreduce(np.ones(3))
"""
    job = on_hosts(1, "-c", START.format(timeout=60) + script, timeout=40)
    assert not job.timed_out and job.returncode != 0 and "CommTimeout" not in job.stderr
    # Open MPI over TCP ends a process whose peer's socket closes before this library can speak.
    assert re.search(r"rank 1\b|Peer host:\s+hostb", job.stderr), job.stderr
    assert job.leftovers == ()


@pytest.mark.parametrize("ranks_per_host", [1, 2])
def test_a_mismatch_names_the_ranks_of_both_hosts(on_hosts: OnHosts, ranks_per_host: int) -> None:
    script = """
start = time.monotonic()
try:
    comm.allreduce(np.ones(5 if comm.rank < comm.size - 1 else 6))
except ringfold.MismatchError as error:
    assert time.monotonic() - start < 5
    os.write(1, f"{comm.rank}: {error}\\n".encode())
"""
    job = on_hosts(ranks_per_host, "-c", START.format(timeout=60) + script, timeout=40)
    assert not job.timed_out, job.output
    lines = [line for line in job.stdout.splitlines() if "the ranks' calls differ" in line]
    size = 2 * ranks_per_host
    assert sorted(line[0] for line in lines) == [str(rank) for rank in range(size)], job.output
    for line in lines:
        assert re.findall(r"rank (\d): allreduce", line) == [str(rank) for rank in range(size)]
        assert "6 elements" in line and "5 elements" in line and "<string>:" in line


def test_a_hang_is_reported_with_rows_of_both_hosts(on_hosts: OnHosts) -> None:
    script = """
if comm.rank == 1:
    time.sleep(20)
comm.barrier()
"""
    job = on_hosts(1, "-c", START.format(timeout=2) + script, timeout=40)
    assert not job.timed_out and job.returncode != 0
    report = job.stderr.partition("CommTimeout: rank 0 waited")[2]
    assert "for ranks [1]" in report and "rank 0: world #" in report, job.stderr
    assert "rank 1: world #" in report and "<string>:10" in report.partition("rank 1:")[2]
