"""Let the ranks compare what they believe before they rely on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ..comm.texts import first_text, gather_texts
from .options import UsageError

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["check_equal", "settle"]

Result = TypeVar("Result")


def settle(comm: Communicator, decide: Callable[[], Result]) -> Result:
    """Call `decide` on every rank and return its result.

    Collective.  If it raises UsageError on some ranks, all raise that of the lowest of these.
    """
    results, complaint = [], ""
    try:
        results.append(decide())
    except UsageError as error:
        complaint = str(error) or "unknown"
    if first := first_text(comm, complaint):
        raise UsageError(first)
    return results[0]


def check_equal(comm: Communicator, text: str, what: str) -> None:
    """Raise UsageError on all ranks unless all texts are equal.

    Collective.  The message names the ranks that differ from rank 0.
    """
    texts = gather_texts(comm, text)
    differing = [rank for rank, found in enumerate(texts) if found != texts[0]]
    if differing:
        raise UsageError(
            f"{what} differ between the ranks: rank 0 has {shown(texts[0])}, rank {differing[0]}"
            f" has {shown(texts[differing[0]])}; ranks that differ from rank 0: {differing}"
        )


def shown(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
