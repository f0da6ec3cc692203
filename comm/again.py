"""Calls that were prepared once and are run again and again, without what was prepared from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .work import Receipt, Steps

if TYPE_CHECKING:
    from .express import Express
    from .meeting import Meeting
    from .trace import Held, Signature


@dataclass(slots=True)
class Repeated:
    """A collective that is nothing but a meeting.

    make: makes the result, where that is another array than x, for the next run to write to.
    take: gives the result, where the meeting has made it.
    """

    meeting: Meeting
    receipt: Receipt
    make: Callable[[], Any] | None
    take: Callable[[], Any] | None


@dataclass(slots=True)
class Errand:
    """A message from, or to, the same memory each time.

    message: what is asked for.
    carry: given the array and a tag, does it; keeps the array alive until then.
    background: somebody else may wait for it.
    call, held: its line in the table of calls, see `Ring.hold`.
    equip: makes what does a small one at once, which is worth it from the second time on.
    express: does so.
    """

    message: Signature
    receipt: Receipt
    carry: Callable[[Any, int], Steps]
    background: bool
    call: int
    held: Held
    equip: Callable[[], Express | None] | None
    express: Express | None = None
