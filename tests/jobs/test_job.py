"""The fixture `job`, which the other tests here trust."""

import os
import time


def test_output_status_and_arguments_come_back(job):
    result = job(
        2,
        """
import sys
from mpi4py import MPI
print("rank", MPI.COMM_WORLD.rank, sys.argv[1:], flush=True)
sys.stderr.write("to stderr")
""",
        "--number",
        3,
    )
    assert result.returncode == 0, result.output
    assert sorted(result.stdout.splitlines()) == [f"rank {r} ['--number', '3']" for r in (0, 1)]
    assert "to stderr" in result.stderr
    assert not result.timed_out
    assert result.leftovers == ()


def test_no_launcher_for_zero_ranks(job):
    result = job(
        0, "import os, sys; print(os.environ['COLOUR']); sys.exit(3)", env={"COLOUR": "red"}
    )
    assert (result.returncode, result.stdout) == (3, "red\n")


def test_a_job_that_hangs_is_ended_at_its_timeout(job):
    result = job(2, "import time; from mpi4py import MPI; time.sleep(600)", timeout=4)
    assert result.timed_out
    assert result.returncode != 0
    assert result.seconds < 20
    assert result.leftovers == ()


def test_a_process_that_outlives_the_job_is_named_and_killed(job):
    # Its own session, no pipe to the job, and its parent gone: only the marker finds it.
    result = job(
        0,
        """
import subprocess, sys
sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                           start_new_session=True)
print(sleeper.pid)
""",
    )
    pid = int(result.stdout)
    assert len(result.leftovers) == 1
    assert result.leftovers[0].startswith(f"{pid}: ")
    assert "time.sleep(600)" in result.leftovers[0]
    deadline = time.monotonic() + 5
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(pid)


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
    finally:
        assert pid != os.getpid()
