"""What the steps of a smaller group wait for, as the group that they are part of sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .serving import Waiting
from .transport.base import Request
from .work import Steps


@dataclass(frozen=True)
class _Seen:
    """A request under another number of its rank."""

    peer: int
    request: Request

    def done(self) -> bool:
        return self.request.done()


def _seen(rank: int, request: Request) -> Request:
    if isinstance(request, Waiting):  # compiled code knows these, and goes on with them
        return Waiting(rank, request.work)
    return _Seen(rank, request)


def seen_from(ranks: Sequence[int], steps: Steps) -> Steps:
    """Run the steps of a smaller group, whose rank r is ranks[r] in the group that waits."""
    patient: bool | None = None
    try:
        while True:
            try:
                pending = steps.send(patient)
            except StopIteration as stop:
                return stop.value
            patient = yield [_seen(ranks[request.peer], request) for request in pending]
    finally:
        steps.close()
