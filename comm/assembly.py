"""The ranks of a group come together before a call of MPI's that waits for them unwatched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .work import Steps


class Lasting:
    """Steps that one work begins and another goes on with, where the first was broken off."""

    def __init__(self, make: Callable[[], Steps]) -> None:
        self._make = make
        self._going: Steps | None = None

    def run(self) -> Steps:
        """Take the steps, or what is left of them; to be broken off, and called anew, any time."""
        going = self._going = self._going or self._make()
        patient: bool | None = None
        while True:
            try:
                pending = going.send(patient)
            except StopIteration:
                return
            except BaseException:
                self._going = None
                raise
            # Broken off here, what goes on is kept.
            patient = yield pending


class Assembly:
    """One rank's part in coming together, time after time, even if ranks give up in between.

    It takes two steps. A rank takes the second only if it still waits when it has seen all ranks
    take the first, so a late rank never goes on with one that has given up. What was sent and
    received is not undone: a rank that comes again goes on where it left off.
    """

    def __init__(self, step: Callable[[int], Steps], check: Callable[[], None]) -> None:
        """Begin.

        step: given a number, exchanges tokens with that number, once with all ranks.
        check: raises what keeps this rank from the second step.
        """
        self._step, self._check = step, check
        self._taken = 0
        self._going: Lasting | None = None

    def come(self) -> Steps:
        """Take both steps, or what is left of them; to be broken off, and called anew, any time."""
        while True:
            yield from self._take()
            if self._taken % 2 == 0:
                return
            self._check()

    def _take(self) -> Steps:
        going = self._going = self._going or Lasting(partial(self._step, self._taken))
        yield from going.run()
        self._taken, self._going = self._taken + 1, None
