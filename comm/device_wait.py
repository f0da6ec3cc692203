"""Wait for an event of this rank's own device, of which nobody else will tell."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from dataclasses import dataclass

from .device import Event
from .errors import CommError
from .transport.base import Request

_LOOKS, _GLANCES = 200, 12
"""How often a rank looks at an event at a time, if somebody waits for the operation and if not."""


@dataclass(frozen=True)
class Reached:
    """What an operation that waits shows: itself, and no other rank."""

    peer: int
    event: Event

    def done(self) -> bool:
        """Look whether it has ended."""
        return self.event.ended()


def reached(
    event: Event, rank: int, patient: bool | None = False
) -> Generator[list[Request], bool | None, bool | None]:
    """Wait until an event has ended; take and return whether somebody waits for the operation."""
    while True:
        for _ in range(_LOOKS if patient else _GLANCES):
            if event.ended():
                return patient
            os.sched_yield()
        patient = yield [Reached(rank, event)]


def passes(event: Event, seconds: float = 30.0) -> bool:
    """Wait for an event so long; tell whether it has ended, which it never does after an error."""
    end = time.monotonic() + seconds
    try:
        while not event.ended():
            if time.monotonic() > end:
                return False
            os.sched_yield()
    except CommError:
        return False
    return True


def wait_here(event: Event) -> None:
    """Wait for an event without letting other operations go on."""
    while not event.ended():
        os.sched_yield()
