"""Works that wait in shared memory, and compiled code that goes on with them in the background."""

from __future__ import annotations

from typing import Protocol

import numpy as np

_SLEEPS = 50
"""Of the background thread, before it lets Python see to what else there is."""


class Served(Protocol):
    """A work that compiled code goes on with: the address of its record, and of the C function.

    bell: address of the rank's BellWord record.
    running: whether there is something left for it to go on with.
    """

    address: int
    bell: int

    @property
    def running(self) -> bool: ...

    @property
    def function(self) -> int: ...


class Waiting:
    """What a work in shared memory shows of itself: the rank that it waits for."""

    def __init__(self, peer: int, work: Served) -> None:
        self.peer = peer
        self.work = work

    def done(self) -> bool:
        """Tell nothing: only the work itself can look."""
        return False


class Server:
    """Goes on with works in compiled code, on a thread that holds no interpreter lock."""

    def __init__(self) -> None:
        self._turn = np.zeros(1, np.int64)

    @property
    def turn(self) -> int:
        """Return what `serve` wants to know of when the works to serve were listed."""
        return int(self._turn[0])

    def interrupt(self) -> None:
        """Let what `serve` was told be out of date: it returns when it next looks."""
        self._turn[0] += 1

    def serve(self, waiting: list[Waiting], turn: int) -> None:
        """Go on with what waits until one work can be finished, a moment at most."""
        from ..kernels.meeting import serve_kernel

        works = [one.work for one in waiting]
        functions = np.array([work.function for work in works], np.int64)
        records = np.array([work.address for work in works], np.int64)
        serve_kernel()(functions, records, self._turn.ctypes.data, turn, works[0].bell, _SLEEPS)
