"""Splitting a group into others: the ranks come together first, where one that hangs is seen."""

from __future__ import annotations

from collections.abc import Callable

from .arguments import whole
from .assembly import Assembly
from .errors import CommError, MismatchError
from .job import Job
from .trace import group_within
from .transport.base import Transport
from .work import Steps, Work

_KEYS = 1 << 31
"""MPI counts colors and keys in 32 bits."""


class Splitting:
    """One rank's part in splitting a group, again and again.

    coming: what waits for all ranks of the group, for the first time, the second, and so on.
    start: starts a work of such steps.
    """

    def __init__(
        self,
        job: Job,
        transport: Transport,
        name: str,
        coming: Callable[[int], Steps],
        start: Callable[[Callable[[], Steps]], Work],
    ) -> None:
        self._job, self._transport, self._name = job, transport, name
        self._start = start
        self._assembly = Assembly(coming, self._heed)
        self._count = 0

    def part(self, color: int | None, key: int) -> tuple[Transport | None, str]:
        """Return what carries the messages of the rank's part, and that part's name; collective."""
        self._assemble()
        self._job.progress.begin_anew(self._name)
        part = self._transport.split(color, key)
        self._count += 1
        return part, group_within(self._name, str(self._count))

    def _assemble(self) -> None:
        """Come together; collective. A rank that has given up goes on only when it comes again."""
        progress = self._job.progress
        try:
            self._start(self._assembly.come).wait()
        except MismatchError as error:
            progress.disagree(self._name, error)
            raise
        except BaseException as error:  # what a signal's handler raises, too
            told = f"split of {self._name} was broken off: {error!r}"
            why = error if isinstance(error, CommError) else CommError(told)
            self._job.kept += progress.give_up(self._own, lambda _: why)
            raise

    def _own(self, work: Work) -> bool:
        return work.transport is self._transport and work.receipt.operation == "split"

    def _heed(self) -> None:
        """Raise what ranks have told each other of this group, of which one has gone on."""
        inquiry = self._job.progress.inquiry
        if inquiry is not None:
            inquiry.heed(self._name, self._transport.world)


def color_of(number: int) -> int:
    """Return a color as MPI takes it; TypeError or ValueError where it takes none such."""
    return _within(number, "color", 0)


def key_of(number: int) -> int:
    """Return a key as MPI takes it; TypeError or ValueError where it takes none such."""
    return _within(number, "key", -_KEYS)


def _within(number: int, what: str, lowest: int) -> int:
    number = whole(what, number)
    if not lowest <= number < _KEYS:
        raise ValueError(f"{what} {number} is outside {lowest}..{_KEYS - 1}")
    return number
