"""A thread that looks after the works of a rank while its program does other things."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from .serving import Server, Waiting

_LOOK, _LONGEST_LOOK = 100e-6, 1e-3
"""Seconds between two looks where nobody rings the thread, at first and in the end: on a virtual
machine each one costs about 20 us of the core, which a computation may need."""


class Looked(Protocol):
    """What is looked after.

    idle: nothing is in flight that is to advance, or somebody waits for it.
    """

    @property
    def idle(self) -> bool: ...

    def look(self) -> list[Waiting]:
        """Advance all works once; return them where compiled code can go on with all of them."""


class Background:
    """Looks after works now and then, in Python or in compiled code."""

    def __init__(self) -> None:
        self._wake = threading.Condition(threading.Lock())
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._server = Server()
        self._nap = _LOOK

    @property
    def runs(self) -> bool:
        """Tell whether the thread has been started, and not been stopped."""
        return self._thread is not None

    def wake(self, works: Looked) -> None:
        """See that the thread looks after works, from now on."""
        if self._stopped:
            return
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, args=(works,), name="ringfold-progress", daemon=True
            )
            self._thread.start()
        with self._wake:
            self._wake.notify_all()

    def interrupt(self) -> None:
        """Let compiled code return to Python when it next looks."""
        self._server.interrupt()

    def hurry(self) -> None:
        """Look soon: there is something new."""
        self._server.interrupt()
        self._nap = _LOOK

    def stop(self) -> None:
        """End the thread, for good."""
        self._stopped = True
        self._server.interrupt()
        thread = self._thread
        if thread is not None:
            with self._wake:
                self._wake.notify_all()
            thread.join()
            self._thread = None

    def _run(self, works: Looked) -> None:
        while not self._stopped:
            turn = self._server.turn
            if works.idle:
                with self._wake:
                    if not self._stopped and works.idle:
                        self._wake.wait(0.5)
                continue
            waiting = works.look()
            if waiting:
                self._server.serve(waiting, turn)
                del waiting  # the works may have ended, and their groups be closed
            else:
                time.sleep(self._nap)
                self._nap = min(2 * self._nap, _LONGEST_LOOK)
