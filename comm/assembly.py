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
    """One rank's part in coming together, again and again; also where ranks have given up between.

    In two steps, the second of which is taken only by who has seen all take the first and still
    waits: of ranks that come late, none goes on with one that has given up. What was sent and
    received stays so: who comes again goes on from there, and meets those who have not come yet.
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
