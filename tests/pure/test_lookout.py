"""What a rank says that waits for MPI to start, without an MPI."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ringfold.comm.company import sees_launcher
from ringfold.comm.ending import told_to_end
from ringfold.comm.lookout import Lookout
from ringfold.comm.settings import Seat
from ringfold.comm.transport import mpi_start

SCRIPT = """
import ctypes, os, signal, threading
from ringfold.comm.lookout import Lookout
from ringfold.comm.settings import Seat

with Lookout(Seat("a job of nobody", 0, 2, 2), 60.0).starting():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    library = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)  # for ever, as MPI_Init may
"""


def test_a_rank_that_the_launcher_ends_says_whom_it_waited_for() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.decode().strip() == (
        "ringfold: rank 0 of 2 is told to end (SIGTERM) while it waits for MPI to start: "
        "rank 1 ended before it did"
    )


def test_a_sigterm_ends_the_process_once_it_is_back_in_python() -> None:
    script = (
        "import os, signal\nfrom ringfold.comm.ending import told_to_end\n"
        "with told_to_end():\n    os.kill(os.getpid(), signal.SIGTERM)\n    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGTERM and not done.stdout


def test_what_was_set_before_comes_back() -> None:
    with told_to_end() as told:
        assert told is not None
        assert not told.within(0.0)
        told.wake()
        assert not told.within(60.0)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1


def test_a_program_that_looks_for_signals_itself_goes_on_doing_so() -> None:
    def mine(number: int, frame: object) -> None: ...

    signal.signal(signal.SIGTERM, mine)
    try:
        with told_to_end() as told:
            assert told is None and signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    seen: list[object] = []

    def elsewhere() -> None:
        with told_to_end() as told:
            seen.append(told)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [None]


def test_mpi_ends_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12.0 to 3.12.2 starts none once the interpreter is ending."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    ended: list[Lookout | None] = []
    library = SimpleNamespace(MPI_Finalize=lambda: ended.append(lookout) or 0)
    monkeypatch.setattr(mpi_start, "_library", lambda mpi: library)
    lookout = Lookout(Seat("a job of nobody", 0, 2, 2))
    mpi_start.end_mpi(None, lookout)
    assert ended == [lookout]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ranks_that_were_stopped_with_this_one_are_given_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A job suspended while MPI started was ended by the rank that went on first."""
    gone, now = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + gone[0])
    lookout = Lookout(Seat("a job of nobody", 0, 2, 2), 60.0)
    seen: list[tuple[float, int]] = []
    looked = threading.Event()

    def why(waited: float) -> str:
        seen.append((waited, len(lookout._since)))
        looked.set()
        return ""

    with lookout._looking(why, None):
        for away in (0.0, 1000.0):
            looked.clear()
            lookout._since[1, 3.0] = now()
            gone[0] = away
            assert looked.wait(20)
    assert [since for _, since in seen][:2] == [1, 0] and seen[-1][0] < 10


@pytest.mark.parametrize(
    "above, seen",
    [
        ([], False),  # in a container of its own
        (["a job"], False),  # what wraps the rank there
        ([None], True),
        (["a job", None], True),
        (["another job"], True),  # whose rank has called mpirun
    ],
)
def test_whom_a_rank_does_not_see_has_not_ended(
    tmp_path: Path, above: list[str | None], seen: bool
) -> None:
    """With a container for each rank, those that took 1.5 s longer to start were given up."""
    pids = [os.getpid(), *range(10, 10 + len(above))]
    for pid, parent, job in zip(pids, [*pids[1:], 0], ["a job", *above], strict=True):
        entry = tmp_path / str(pid)
        entry.mkdir()
        (entry / "stat").write_text(f"{pid} (a (b) c) S {parent} 1 1 0")
        seat = [f"OMPI_COMM_WORLD_{name}=1" for name in ("RANK", "SIZE", "LOCAL_SIZE")]
        told = [*seat, f"PMIX_NAMESPACE={job}"] if job else ["A=B"]
        (entry / "environ").write_text("\0".join(told))
    assert sees_launcher(Seat("a job", 0, 2, 2), tmp_path) == seen
