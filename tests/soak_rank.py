"""One rank of a job that tests/soak.py spoils.

    python tests/soak_rank.py FOLDER FAULT PROGRAM ARGUMENTS...

It notes in FOLDER how far it has come, and does to itself what can only come from within: FAULT is
the JSON of [rank, moment, delay, kind], or null.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK = next(
    int(os.environ[name])
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
    if name in os.environ
)


class SpoiltError(Exception):
    """What a rank raises."""


def leave() -> None:
    os._exit(0)


def fail() -> None:
    raise SpoiltError(f"rank {RANK} fails on purpose")


class Notes:
    """A file of moments, one a line with its time, that tests/soak.py follows."""

    def __init__(self, folder: Path, fault: list[Any] | None) -> None:
        self._file = (folder / f"rank{RANK}").open("a", buffering=1)
        self._fault = fault
        self._seen: dict[str, int] = {}

    def note(self, moment: str) -> None:
        self._file.write(f"{moment} {time.monotonic_ns()} {os.getpid()}\n")
        if self._fault is not None and self._fault[:2] == [RANK, moment]:
            _, _, delay, kind = self._fault
            self._fault = None
            self._later(max(delay, 1e-4), {"exit": leave, "exception": fail}[kind], kind)

    def count(self, moment: str) -> None:
        """Note a moment that comes again and again, with its number."""
        self._seen[moment] = number = self._seen.get(moment, 0) + 1
        self.note(f"{moment}{number}")

    def _later(self, delay: float, do: Callable[[], None], kind: str) -> None:
        def act(*_: object) -> None:
            self._file.write(f"fault {time.monotonic_ns()} {os.getpid()}\n")
            do()

        if kind == "exception":  # in the main thread, between any two of its instructions
            signal.signal(signal.SIGALRM, act)
            signal.setitimer(signal.ITIMER_REAL, delay)
        else:
            timer = threading.Timer(delay, act)
            timer.daemon = True
            timer.start()

    def around(self, owner: type, method: str, before: Callable[[], None]) -> None:
        """Note something each time that a method is called."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def noted(*args: Any, **kwargs: Any) -> Any:
            before()
            return original(*args, **kwargs)

        setattr(owner, method, noted)


def watch(notes: Notes) -> None:
    """Note how far training has come; the program has not begun."""
    from ringfold.comm.communicator import Communicator

    opening = Communicator.__init__

    def opened(self: Communicator, *args: Any, **kwargs: Any) -> None:
        notes.note("opening")
        opening(self, *args, **kwargs)
        notes.note("opened")
        if "train.py" in sys.argv[0]:
            watch_training(notes)

    Communicator.__init__ = opened  # type: ignore[method-assign]
    notes.around(Communicator, "close", lambda: notes.count("closing"))


def watch_training(notes: Notes) -> None:
    from ringfold.parallel.checkpoint.session import Checkpoints
    from ringfold.workloads.keeper import Keeper
    from ringfold.workloads.losses import GlobalLosses

    notes.around(GlobalLosses, "add", lambda: notes.count("step"))
    notes.around(Checkpoints, "save", lambda: notes.count("checkpoint"))
    notes.around(Keeper, "finish", lambda: notes.note("end"))


def main() -> None:
    folder, fault, *sys.argv = sys.argv[1:]
    notes = Notes(Path(folder), json.loads(fault))
    notes.note("start")
    watch(notes)
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if not end.code:
            notes.note("returned")
        raise
    notes.note("returned")


if __name__ == "__main__":
    main()
