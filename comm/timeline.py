"""What one rank did and when, while somebody traces: spans of the program, and its operations."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..kernels.records import RING_ENTRIES
from .trace import Entry, Ring, State

if TYPE_CHECKING:
    from .work import Work

COMPUTE, PACK, WAIT, STEP = "compute", "pack", "wait", "step"
"""Categories of spans. Spans of a rank nest: packing and waiting lie within what they delay."""

_LEFT = RING_ENTRIES // 2
"""Of the newest operations, how many are left in the ring for now: most have ended when taken."""

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
        self._running: dict[tuple[str, int, str], Operation] = {}
        self._labels: dict[int, str] = {}
        self._lock = threading.RLock()  # works end in the background, too

    def add(self, category: str, name: str, start: int) -> None:
        """Add a span from `start` to now."""
        self.spans.append(Span(category, name, start, time.monotonic_ns()))

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

    def keep_up(self) -> None:
        """Collect what the ring will not keep for long; before an operation is started."""
        newest = self.ring.newest
        if newest - self._collected >= _LEFT + _COLLECT_EVERY:
            self._collect(newest - _LEFT)

    def _collect(self, last: int) -> None:
        """Take over the operations up to a number, each once; see `ended` of those that run."""
        with self._lock:
            first, self._collected = self._collected + 1, last
            for number in range(first, last + 1):
                entry = self.ring.entry(number)
                if entry is None:
                    self.lost += 1
                    continue
                operation = Operation(entry, self._labels.pop(number, ""))
                if entry.state is State.RUNNING:
                    self._running[_key(entry)] = operation
                else:
                    self.operations.append(operation)

    def ended(self, work: Work) -> None:
        """Take over the operation of a work that ends, if it was collected before that."""
        with self._lock:
            found = self._running.pop((work.home, work.sequence, work.receipt.operation), None)
            if found is not None:
                state = State.DONE if work.exception() is None else State.FAILED
                entry = replace(found.entry, end=time.monotonic_ns(), state=state)
                self.operations.append(replace(found, entry=entry))

    def stop(self) -> None:
        """Note the end; operations that still run are left out."""
        self.end = time.monotonic_ns()
        self._collect(self.ring.newest)


def _key(entry: Entry) -> tuple[str, int, str]:
    return entry.group, entry.sequence, entry.signature.operation


_OFF: AbstractContextManager[None] = nullcontext()


def span(timeline: Timeline | None, category: str, name: str) -> AbstractContextManager[None]:
    """Return a context that records what runs within, or nothing without a timeline."""
    return _OFF if timeline is None else timeline.span(category, name)
