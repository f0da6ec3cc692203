"""Let operations of a rank take turns, in the order in which they were begun."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """An operation's place in a line; done once it is the first there."""

    peer: int
    line: deque[Turn]

    def done(self) -> bool:
        """Tell whether it is this operation's turn."""
        return self.line[0] is self


class Line:
    """The operations of one rank that have begun."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._turns: deque[Turn] = deque()

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """Stand in the line; the next one's turn comes at the end of this."""
        turn = Turn(self._rank, self._turns)
        self._turns.append(turn)
        try:
            yield turn
        finally:
            self._turns.remove(turn)
