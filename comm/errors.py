"""What can go wrong between ranks, as exceptions."""

from __future__ import annotations


class CommError(RuntimeError):
    """Raise for every failure of the world between ranks; its children say which kind."""


class MismatchError(CommError):
    """Raise when ranks disagree about the operation they take part in."""


class CommTimeout(CommError, TimeoutError):
    """Raise on a rank that waited longer than it may, naming whom it waits for."""


class PeerLost(CommError):
    """Raise when a rank that is waited for has left the job or failed."""


class OutOfMemory(CommError, MemoryError):
    """Raise where a GPU has no memory left for what ranks open."""


class NotFinite(CommError, FloatingPointError):
    """Raise on every rank where a gradient of one rank is infinite or NaN.

    rank, parameter, step, microbatch: of the first.
    """

    def __init__(
        self, message: str, *, rank: int, parameter: str, step: int, microbatch: int
    ) -> None:
        super().__init__(message)
        self.rank, self.parameter = rank, parameter
        self.step, self.microbatch = step, microbatch


class ScheduleError(CommError, ValueError):
    """Refuse a schedule, with the first place where it breaks its collective's promise.

    round, rank and chunk are indices from 0, or None where the fault has no such place.
    """

    def __init__(
        self,
        message: str,
        *,
        round: int | None = None,
        rank: int | None = None,
        chunk: int | None = None,
    ) -> None:
        place = ", ".join(
            f"{name} {value}"
            for name, value in (("round", round), ("rank", rank), ("chunk", chunk))
            if value is not None
        )
        super().__init__(f"{place}: {message}" if place else message)
        self.round, self.rank, self.chunk = round, rank, chunk
