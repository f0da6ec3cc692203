"""What one rank did and when, while somebody traces: spans of the program, and its operations."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from ..kernels.records import RING_ENTRIES
from .trace import Entry, Ring, State

COMPUTE, PACK, WAIT, STEP = "compute", "pack", "wait", "step"
"""Categories of spans. Spans of a rank nest: packing and waiting lie within what they delay."""

_COLLECT_EVERY = RING_ENTRIES // 4


@dataclass(frozen=True)
class Span:
    """Something that the program did. start, end: nanoseconds of this process's CLOCK_MONOTONIC."""

    category: str
    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Operation:
    """An operation that has ended. label: what it was for, such as the bucket."""

    entry: Entry
    label: str


@dataclass
class Timeline:
    """Record one rank. Operations come from its ring, which notes them whether traced or not.

    lost: operations that left the ring before they were collected.
    thread: whose spans these are; several ranks may be threads of one process.
    """

    ring: Ring
    spans: list[Span] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    lost: int = 0
    thread: int = field(default_factory=threading.get_ident)

    def __post_init__(self) -> None:
        self.ring.time_ends()
        self.start = time.monotonic_ns()
        self.end = 0
        self._collected = self.ring.newest
        self._running: list[int] = []
        self._labels: dict[int, str] = {}

    def add(self, category: str, name: str, start: int) -> None:
        """Add a span from `start` to now."""
        self.spans.append(Span(category, name, start, time.monotonic_ns()))
        if self.ring.newest - self._collected >= _COLLECT_EVERY:
            self.collect()

    @contextmanager
    def span(self, category: str, name: str) -> Iterator[None]:
        """Record what runs within, however it ends."""
        start = time.monotonic_ns()
        try:
            yield
        finally:
            self.add(category, name, start)

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Label the operations that are started within."""
        first = self.ring.newest + 1
        yield
        self._labels.update((number, label) for number in range(first, self.ring.newest + 1))

    def collect(self) -> None:
        """Take over the operations that have ended since."""
        newest = self.ring.newest
        numbers = [*self._running, *range(self._collected + 1, newest + 1)]
        self._collected, self._running = newest, []
        for number in numbers:
            entry = self.ring.entry(number)
            if entry is None:
                self.lost += 1
            elif entry.state is State.RUNNING:
                self._running.append(number)
            else:
                self.operations.append(Operation(entry, self._labels.pop(number, "")))

    def stop(self) -> None:
        """Note the end; operations that still run are left out."""
        self.end = time.monotonic_ns()
        self.collect()


_OFF: AbstractContextManager[None] = nullcontext()


def span(timeline: Timeline | None, category: str, name: str) -> AbstractContextManager[None]:
    """Return a context that records what runs within, or nothing without a timeline."""
    return _OFF if timeline is None else timeline.span(category, name)
