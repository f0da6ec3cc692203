"""One verdict for all ranks: under mpirun every test here is collective.

Each rank runs pytest on the same tests.  After each phase of a test (setup, call, teardown) the
ranks exchange what they saw, so a failure on one rank fails the test on all, before any rank enters
the next phase and waits there for one that will never come.  Rank 0 alone writes the report; it
holds every rank's traceback.

What cannot be exchanged ends the job: a rank that failed while another stays in the test past
GRACE_SECONDS, and a test that passes its limit (60 s, or `@pytest.mark.limit(seconds)`), in which
case every rank first writes the stacks of all its threads.  The exchange uses mpi4py alone, so it
holds when ringfold is what is broken.
"""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

LIMIT_SECONDS = 60.0
GRACE_SECONDS = 8.0
COLLECTION_SECONDS = 120.0
# Written by every rank these would overwrite each other's files or mix into one terminal.
RANK_0_ONLY = ("TerminalReporter", "LogXML", "LFPlugin", "NFPlugin", "StepwisePlugin")


@pytest.hookimpl(trylast=True)  # the plugins that write are registered by then
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "limit(seconds): time limit of a test on all ranks")
    config.pluginmanager.register(SharedVerdict(config), "ringfold-shared-verdict")


@pytest.fixture(scope="session")
def comm() -> Iterator[Any]:
    """The communicator of all ranks, opened once for all tests."""
    import ringfold

    communicator = ringfold.Communicator()
    yield communicator
    communicator.close()


class Limit:
    """A time limit of one phase; past it, all stacks are written and the process ends.

    A Python thread writes them with this rank's number before each line.  Where that thread cannot
    run, since compiled code keeps the interpreter lock, faulthandler does it a little later.
    """

    def __init__(self, rank: int, stderr: int) -> None:
        self.rank = rank
        self.stderr = stderr
        self.timer: threading.Timer | None = None

    def start(self, what: str, seconds: float) -> None:
        self.stop()
        self.timer = threading.Timer(seconds, self.expire, (what, seconds))
        self.timer.daemon = True
        self.timer.start()
        faulthandler.dump_traceback_later(seconds + 5, exit=True, file=self.stderr)

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        faulthandler.cancel_dump_traceback_later()

    def expire(self, what: str, seconds: float) -> None:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        self.write(f"{what} passed its limit of {seconds:g} s; all stacks:\n{stacks}")
        time.sleep(2)  # the first exit makes the launcher end the others: let them write as well
        os._exit(70)

    def write(self, text: str) -> None:
        lines = [f"[rank {self.rank}] {line}\n" for line in text.splitlines()]
        os.write(self.stderr, "".join(lines).encode())


class SharedVerdict:
    def __init__(self, config: pytest.Config) -> None:
        from mpi4py import MPI

        self.comm = MPI.COMM_WORLD.Dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        # Between phases fd 2 is pytest's capture; this one stays the terminal.
        self.limit = Limit(self.rank, os.dup(sys.__stderr__.fileno()))
        self.collection_errors: list[str] = []
        if self.rank:
            for plugin in list(config.pluginmanager.get_plugins()):
                if type(plugin).__name__ in RANK_0_ONLY:
                    config.pluginmanager.unregister(plugin)

    def meet(self, failed: str | None) -> None:
        """Wait until all ranks are here; a rank that failed waits GRACE_SECONDS, then ends all."""
        request = self.comm.Ibarrier()
        start, pause = time.monotonic(), 0.0
        while not request.Test():
            if failed is not None and time.monotonic() - start > GRACE_SECONDS:
                self.limit.write(f"{failed}\nthe other ranks are still busy: ending the job")
                time.sleep(0.5)
                self.comm.Abort(1)
            time.sleep(pause)
            pause = min(pause + 0.0002, 0.01)

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self, session: pytest.Session) -> Iterator[None]:
        self.limit.start("collection", COLLECTION_SECONDS)
        result = yield
        mine = "\n".join(self.collection_errors) or None
        self.meet(mine)
        errors = self.comm.allgather(mine)
        tests = self.comm.allgather([item.nodeid for item in session.items])
        self.limit.stop()
        lines = [f"rank {r} of {self.size}: {e}" for r, e in enumerate(errors) if e]
        lines += [
            f"rank {r} collected other tests than rank 0: {sorted(set(tests[0]) ^ set(found))}"
            if set(found) != set(tests[0])
            else f"rank {r} collected the tests of rank 0 in another order"
            for r, found in enumerate(tests)
            if found != tests[0]
        ]
        if lines:
            pytest.exit("collection failed\n" + "\n".join(lines), returncode=2)
        return result

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.collection_errors.append(f"{report.nodeid}\n{report.longreprtext}")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        try:
            return (yield)
        finally:
            self.limit.stop()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.limit.start(f"{item.nodeid} (setup)", limit_of(item))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        self.limit.start(f"{item.nodeid} (call)", limit_of(item))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        self.limit.start(f"{item.nodeid} (teardown)", limit_of(item))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report: pytest.TestReport = yield
        self.meet(f"{item.nodeid}\n{report.longreprtext}" if report.failed else None)
        seen = self.comm.allgather((report.outcome, report.longreprtext))
        outcomes = [outcome for outcome, _ in seen]
        if "failed" in outcomes:
            texts = [
                f"---- rank {r} of {self.size}, {report.when} ----\n{text}"
                for r, (outcome, text) in enumerate(seen)
                if outcome == "failed"
            ]
            report.outcome = "failed"
            report.longrepr = "\n".join(texts) if self.size > 1 else report.longrepr
        elif len(set(outcomes)) > 1:
            report.outcome = "failed"
            report.longrepr = f"the ranks do not agree whether to skip: {outcomes}"
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Leave together: the first rank that exits with a failure makes the launcher end all."""
        sys.stdout.flush()
        self.limit.start("the end of the session", GRACE_SECONDS)
        self.meet(None)
        self.limit.stop()


def limit_of(item: pytest.Item) -> float:
    marker = item.get_closest_marker("limit")
    return float(marker.args[0]) if marker else LIMIT_SECONDS
