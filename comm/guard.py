"""End the whole job when one rank fails, and tell the others when one leaves."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from traceback import print_exception
from types import TracebackType
from typing import Any, Protocol, TextIO

from ..kernels.say import flush, say
from .draining import drain
from .errors import CommError
from .progress import Progress
from .transport.base import Request, Transport

_DRAIN = 60.0
"""Seconds that a leaving rank gives the messages it still has in flight."""

_FAILED = 1


class Job(Protocol):
    """What can be ended as a whole."""

    rank: int
    size: int

    def abort(self, status: int) -> Any:
        """End every process of the job."""
        ...


def _reaches_a_file(stream: TextIO) -> bool:
    """Tell whether what is written is seen outside.

    A later hook may call this one with a buffer in place of stderr, and mean to print that
    afterwards, when the job has been ended: torch.distributed's does.
    """
    try:
        return stream.fileno() >= 0
    except (AttributeError, OSError, ValueError):
        return False


class Guard:
    """Watch over one rank's process while a communicator over several processes is open.

    An uncaught exception is reported by the hook that was there before, then the job is aborted
    on all ranks. An ordinary end sends what is in flight and leaves a notice, so that a rank that
    still waits for this one learns it.
    """

    def __init__(self, job: Job) -> None:
        """Report and abort from now on.  job: before a transport is open, what is known of it."""
        self._job = job
        self._transport: Transport | None = None
        self._kept: list[Request] = []
        self._process = os.getpid()
        self._before = sys.excepthook
        self._hook = self._report_and_abort
        sys.excepthook = self._hook

    def watch(self, transport: Transport, progress: Progress) -> None:
        """Leave in good order from now on."""
        self._job = self._transport = transport
        self._progress = progress
        atexit.register(self._leave)

    def _report_and_abort(
        self,
        kind: type[BaseException],
        error: BaseException,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._before(kind, error, traceback)
        finally:
            if os.getpid() == self._process and self._job.size > 1:
                told = (
                    f"rank {self._job.rank} of {self._job.size} failed with {kind.__name__}; "
                    "ending the job on every rank"
                )
                say(told)
                if sys.__stderr__ is not None and not _reaches_a_file(sys.stderr):
                    with suppress(OSError, ValueError):
                        print_exception(kind, error, traceback, file=sys.__stderr__)
                    say(told, sys.__stderr__)
                flush()
                self._job.abort(_FAILED)

    def _leave(self) -> None:
        if os.getpid() != self._process or self._transport is None:
            return
        # What this rank would receive now, nobody looks at any more.
        drain(self._progress, _DRAIN, lambda work: not work.receives, "ends")
        self._kept = self._progress.abandon(CommError("the program has ended"))
        self._transport.leave()

    def release(self) -> None:
        """Stop watching, and put the earlier hook back unless another took its place."""
        atexit.unregister(self._leave)
        if sys.excepthook == self._hook:
            sys.excepthook = self._before
