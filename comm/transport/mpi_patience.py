"""End a process whose main thread is stuck in a call of MPI's that never returns."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["patience"]


@contextmanager
def patience(seconds: float, what: str) -> Iterator[None]:
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
        if not done.wait(seconds):
            print(f"ringfold: waited {seconds:g} s: {what}", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, name="ringfold-patience", daemon=True).start()
    try:
        yield
    finally:
        done.set()
