"""Let all ranks fail alike, where only some have seen why."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ...comm.texts import gather_texts, shown_ranks
from .errors import CheckpointError, text_of

if TYPE_CHECKING:
    from ...comm.communicator import Communicator

__all__ = ["agree", "together"]

Result = TypeVar("Result")


def agree(comm: Communicator, complaint: str, what: str, cause: Exception | None = None) -> None:
    """Raise CheckpointError on every rank if one has a complaint.  Collective.

    cause: of this rank's complaint.
    """
    found = {rank: text for rank, text in enumerate(gather_texts(comm, complaint)) if text}
    if found:
        ranks = sorted(found)
        others = f" (also on {shown_ranks(ranks[1:])})" if len(ranks) > 1 else ""
        raise CheckpointError(f"{what}: rank {ranks[0]}: {found[ranks[0]]}{others}") from cause


def together(comm: Communicator, what: str, decide: Callable[[], Result]) -> Result:
    """Return what `decide` gives here; CheckpointError on every rank if it raises on one.

    Collective, which `decide` is not: it may call code of the user's.
    """
    results: list[Result] = []
    complaint, cause = "", None
    try:
        results.append(decide())
    except Exception as error:
        complaint, cause = text_of(error), error
    agree(comm, complaint, what, cause)
    return results[0]
