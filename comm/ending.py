"""Notice that this process is told to end, while its main thread is in native code."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Told:
    """Whether SIGTERM has come, for a thread that looks.

    Python runs a handler when its main thread is back from native code, which may be never; what
    writes the signal's number into a pipe does so at once (signal.set_wakeup_fd).
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing

    def within(self, seconds: float) -> bool:
        """Wait so long, or until `wake`; tell whether SIGTERM has come."""
        ready, _, _ = select.select([self._reading], [], [], seconds)
        return bool(ready) and signal.SIGTERM in os.read(self._reading, 64)

    def wake(self) -> None:
        """Let who waits look up."""
        os.write(self._writing, b"\0")


@contextmanager
def told_to_end() -> Iterator[Told | None]:
    """Notice SIGTERM meanwhile; None where the program has its own handler, or another thread runs.

    Once the main thread is back, a SIGTERM ends the process as it would have.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield None
        return
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    if before != -1:  # the program looks for signals itself
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)
        yield None
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield Told(reading, writing)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.close(reading)
        os.close(writing)


def _end(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
