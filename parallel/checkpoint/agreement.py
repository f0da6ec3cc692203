"""Let all ranks fail alike, where only some have seen why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import CheckpointError

if TYPE_CHECKING:
    from ...comm.communicator import Communicator

__all__ = ["agree", "gather_texts"]


def gather_texts(comm: Communicator, text: str) -> list[str]:
    """Return every rank's text, by rank.  Collective."""
    mine = np.frombuffer(text.encode(), np.uint8)
    lengths = comm.allgather(np.array([len(mine)], np.int64))[:, 0]
    if not lengths.any():
        return [""] * comm.size
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(mine)] = mine
    rows = comm.allgather(padded)
    return [bytes(row[: int(n)]).decode() for row, n in zip(rows, lengths, strict=True)]


def agree(comm: Communicator, complaint: str, what: str) -> None:
    """Raise CheckpointError on every rank if one has a complaint.  Collective."""
    found = {rank: text for rank, text in enumerate(gather_texts(comm, complaint)) if text}
    if found:
        ranks = sorted(found)
        others = f" (also on ranks {ranks[1:]})" if len(ranks) > 1 else ""
        raise CheckpointError(f"{what}: rank {ranks[0]}: {found[ranks[0]]}{others}")
