"""What a fork of a rank's process is told: it is no rank of its own."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

from .errors import CommError


def in_fork(rank: int) -> CommError:
    """Return what a call is refused with in a fork of a rank's process."""
    return CommError(
        f"this process is a fork of rank {rank}, no rank of its own; call collectives, wait for "
        "works and ask for them in the process that opened the communicator"
    )


def when_forked(call: Callable[[], None]) -> None:
    """Have a method called in forks of this process, as long as its object lives.

    Asking for the process in each operation would be a fifth of a small one.
    """
    found = weakref.WeakMethod(call)  # what is registered stays so

    def forked() -> None:
        method = found()
        if method is not None:
            method()

    os.register_at_fork(after_in_child=forked)
