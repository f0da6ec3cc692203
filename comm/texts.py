"""Texts that ranks tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .communicator import Communicator

_SHOWN = 8


def shown_ranks(ranks: Sequence[int]) -> str:
    """Return "rank 2" or "ranks 0, 3", of very many the first."""
    shown = ", ".join(map(str, ranks[:_SHOWN]))
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def gather_texts(comm: Communicator, text: str) -> list[str]:
    """Return every rank's text, by rank; collective."""
    # Of a path that is no UTF-8 Python keeps what cannot be encoded.
    mine = np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)
    lengths = comm.allgather(np.array([len(mine)], np.int64))[:, 0]
    if not lengths.any():
        return [""] * comm.size
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(mine)] = mine
    rows = comm.allgather(padded)
    return [bytes(row[:n]).decode() for row, n in zip(rows, lengths.tolist(), strict=True)]
