"""End a process whose main thread is stuck in a call of MPI's that never returns."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ...kernels.say import say
from ..waited import Waited

__all__ = ["Patience", "ends_after"]

_LOOK = 1.0


@contextmanager
def ends_after(seconds: float, what: str) -> Iterator[None]:
    """Print `what` and end this process with status 1 if the block takes longer.

    MPI_Comm_spawn of Open MPI 5.0 waits for ever where the process that it has started dies before
    it has opened MPI, and so does what makes a communicator where a rank does not come; nothing
    else can be done with the thread that waits.

    seconds: may be infinite, and nobody looks then.
    """
    if seconds == math.inf:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        waited = Waited()
        while not done.wait(min(seconds - waited.seconds, _LOOK)):
            if waited.look() >= seconds:
                _give_up(seconds, what)

    threading.Thread(target=watch, name="ringfold-patience", daemon=True).start()
    try:
        yield
    finally:
        done.set()


class Patience:
    """The same for many short waits, one after the other: one thread looks at them now and then.

    seconds: that each may take; more is noticed a quarter of it later at most, or a second.
    what: is printed.
    """

    def __init__(self, seconds: float, what: str) -> None:
        self._seconds, self._what = seconds, what
        self._since: float | None = None
        self._watches = False

    def __enter__(self) -> None:
        if not self._watches:
            self._watches = True
            thread = threading.Thread(target=self._watch, name="ringfold-patience", daemon=True)
            thread.start()
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def _watch(self) -> None:
        seen, waited = self._since, Waited()
        while True:
            time.sleep(min(self._seconds / 4, _LOOK))
            since = self._since
            if since is None or since != seen:
                seen, waited = since, Waited()
            elif waited.look() > self._seconds:
                _give_up(self._seconds, self._what)


def _give_up(seconds: float, what: str) -> None:
    say(f"waited {seconds:g} s: {what}")
    os._exit(1)
