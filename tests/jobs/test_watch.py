"""Hangs and deaths in whole jobs: who, what and where is said, and nobody waits for ever."""

from collections.abc import Callable
from typing import Any

import pytest

START = """
import ctypes, os, signal, sys, threading, time
import numpy as np
import ringfold

def stuck_in_python():
    time.sleep(20)

def stuck_in_native_code():  # keeps the interpreter lock; a signal does not wake it
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.PyDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)

comm = ringfold.Communicator(settings=ringfold.Settings(timeout={timeout}, shared={shared}))
comm.allreduce(np.ones(3))
"""


@pytest.mark.parametrize(
    "shared, stuck",
    [(True, "stuck_in_python"), (False, "stuck_in_python"), (True, "stuck_in_native_code")],
)
def test_a_deadline_names_who_did_not_come_and_where_it_is(
    job: Callable[..., Any], shared: bool, stuck: str
) -> None:
    script = START.format(timeout=1, shared=shared) + f"{stuck}() if comm.rank == 1 else None\n"
    done = job(2, script + "comm.barrier()\n", timeout=40)
    assert not done.timed_out and done.returncode != 0
    assert "CommTimeout: rank 0 waited" in done.stderr and "for ranks [1]" in done.stderr
    assert "rank 0: world #" in done.stderr and "barrier()" in done.stderr
    line = "line 1" if "native" in stuck else f"in {stuck}"
    assert line in done.stderr.partition("rank 1:")[2], done.stderr
    assert not done.leftovers


def test_a_rank_that_handles_sigusr1_by_itself_is_not_sent_it(job: Callable[..., Any]) -> None:
    """A scheduler's notice, such as for a requeue, came from a peer that only asked."""
    script = """
import ctypes, os, signal, time
import numpy as np
import ringfold

def take(*_):
    print("taken", flush=True)

if int(os.environ["OMPI_COMM_WORLD_RANK"]) == 1:
    signal.signal(signal.SIGUSR1, take)
comm = ringfold.Communicator(settings=ringfold.Settings(timeout=1))
if comm.rank == 2:
    signal.signal(signal.SIGUSR1, take)
comm.allreduce(np.ones(3))
if comm.rank:
    time.sleep(0.5)  # the watchdog tells of the handler meanwhile
    ctypes.PyDLL(None).usleep(4_000_000)  # keeps the interpreter lock
comm.barrier()
"""
    done = job(3, script, timeout=40)
    for rank in (1, 2):
        assert f"rank {rank}: does not answer, and handles SIGUSR1 by itself" in done.stderr
    assert "taken" not in done.output


def test_sigusr1_tells_where_all_ranks_are_and_the_job_goes_on(job: Callable[..., Any]) -> None:
    """From a program that took the signal later close() took it: the next one ended the rank."""
    script = (
        START.format(timeout=60, shared=True)
        + """
def ask():
    os.kill(os.getpid(), signal.SIGUSR1)

if comm.rank == 0:
    threading.Timer(0.5, ask).start()
else:
    time.sleep(4)
assert comm.allreduce(np.ones(1))[0] == comm.size
comm.close()
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
taken = []
for turn in (1, 2, 3):  # a handler that came after the communicator outlives it
    with ringfold.Communicator():
        if turn == 1:
            signal.signal(signal.SIGUSR1, lambda number, frame: taken.append(number))
    ask()
    assert len(taken) == turn
"""
    )
    done = job(3, script, timeout=60)
    assert done.returncode == 0, done.output
    report = done.stderr.partition("where the ranks are (SIGUSR1 at rank 0)")[2]
    for rank in range(3):
        assert f"rank {rank}: world #" in report, done.stderr
    assert "running" in report


def test_sigusr1_tells_where_the_ranks_of_an_elastic_job_are_also_after_deaths(
    job: Callable[..., Any],
) -> None:
    script = """
import os, signal, threading, time
import numpy as np
import ringfold

def ask():
    os.kill(os.getpid(), signal.SIGUSR1)

def ask_until(over):  # nobody dies of it while there is no communicator
    while not over.wait(0.005):
        ask()

with ringfold.Elastic() as world:
    for step in range(3):
        if world.comm.rank == 0:
            threading.Timer(0.5, ask).start()
        time.sleep(3 if world.comm.rank or world.comm.size == 1 else 0)
        assert world.comm.allreduce(np.ones(1))[0] == world.comm.size == 3 - step
        if step == 2:
            break
        if world.comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            while True:
                world.comm.allreduce(np.ones(1))
        except ringfold.PeerLost:
            recovering = threading.Thread(target=ask_until, args=[over := threading.Event()])
            recovering.start()
            world.recover(step)
            over.set()
            recovering.join()
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
"""
    done = job(3, script, timeout=60, ft=True)
    assert done.returncode == 0, done.output
    # A rank that was still asked when its recovery ended may tell before rank 0 does.
    reports = done.stderr.split("where the ranks are (SIGUSR1 at rank ")[1:]
    for size in (3, 2, 1):
        assert any(
            all(f"rank {rank}: world" in report for rank in range(size))
            and f"rank {size}:" not in report
            for report in reports
        ), done.stderr


@pytest.mark.parametrize(
    "death",
    ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)", "os.kill(os.getpid(), signal.SIGSTOP)"],
    ids=["killed", "exits", "stopped"],
)
def test_a_death_ends_the_job_and_is_named(job: Callable[..., Any], death: str) -> None:
    script = (
        START.format(timeout=60, shared=True)
        + f"""
if comm.rank == 1:
    {death}
while True:
    comm.allreduce(np.ones(3))
"""
    )
    done = job(3, script, timeout=40)
    assert not done.timed_out and done.returncode != 0
    assert "rank 1" in done.stderr, done.stderr
    assert not done.leftovers


@pytest.mark.parametrize("where", ["transport.mpi:MpiTransport", "node_memory:NodeMemory"])
def test_a_rank_that_stops_while_a_communicator_opens_is_named(
    job: Callable[..., Any], where: str
) -> None:
    module, name = where.split(":")
    script = f"""
import os, signal
import ringfold
from ringfold.comm.{module} import {name} as made

begin = made.__init__

def stop(*arguments, **options):
    if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    begin(*arguments, **options)

made.__init__ = stop
ringfold.Communicator()
"""
    done = job(3, script, timeout=40)
    assert not done.timed_out and done.returncode != 0, done.output
    assert "opens a communicator, but rank 1 (process " in done.stderr, done.output
    assert "is stopped (SIGSTOP)" in done.stderr
    assert not done.leftovers


@pytest.mark.parametrize("ft", [False, True])
def test_a_rank_that_stops_while_mpi_ends_is_named(job: Callable[..., Any], ft: bool) -> None:
    script = f"""
import os, signal, subprocess
import numpy as np
import ringfold

with ringfold.{"Elastic" if ft else "Communicator"}() as world:
    comm = {"world.comm" if ft else "world"}
    rank = comm.rank
    comm.allreduce(np.ones(3))
if rank == 1:
    subprocess.Popen(["sh", "-c", f"sleep 8; kill -CONT {{os.getpid()}}"])  # mpirun waits for it
    os.kill(os.getpid(), signal.SIGSTOP)
"""
    done = job(3, script, timeout=40, ft=ft)
    assert not done.timed_out and done.returncode != 0, done.output
    assert "waits for MPI to end, but rank 1 (process " in done.stderr, done.output
    assert "is stopped (SIGSTOP)" in done.stderr
