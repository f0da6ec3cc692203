"""How long somebody has waited, but for the time in which this process was stopped itself."""

from __future__ import annotations

import time

_LONGEST = 2.0
"""Seconds between two looks that count; who waits looks much more often."""


class Waited:
    """The seconds since it was made, as far as the process ran.

    A job that is suspended (Ctrl-Z, `scontrol suspend`) longer than its ranks wait for each other
    goes on afterwards as if nothing had been.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._looked = time.monotonic()

    def stopped(self) -> bool:
        """Tell whether the process has been stopped since the last look."""
        return time.monotonic() - self._looked > _LONGEST

    def look(self) -> float:
        """Return the seconds until now."""
        now = time.monotonic()
        self.seconds += min(now - self._looked, _LONGEST)
        self._looked = now
        return self.seconds
