"""Let all ranks fail alike, where only some have seen why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...comm.texts import gather_texts
from .errors import CheckpointError

if TYPE_CHECKING:
    from ...comm.communicator import Communicator

__all__ = ["agree"]


def agree(comm: Communicator, complaint: str, what: str, cause: Exception | None = None) -> None:
    """Raise CheckpointError on every rank if one has a complaint.  Collective.

    cause: of this rank's complaint.
    """
    found = {rank: text for rank, text in enumerate(gather_texts(comm, complaint)) if text}
    if found:
        ranks = sorted(found)
        others = f" (also on ranks {ranks[1:]})" if len(ranks) > 1 else ""
        raise CheckpointError(f"{what}: rank {ranks[0]}: {found[ranks[0]]}{others}") from cause
