"""Texts that ranks tell each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .communicator import Communicator

_SHOWN = 8


def few(parts: Sequence[str], between: str = ", ") -> str:
    """Return parts joined, of very many the first; a thousand ranks' make no line to be read."""
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return between.join(parts[:_SHOWN]) + more


def shown_ranks(ranks: Sequence[int]) -> str:
    """Return "rank 2" or "ranks 0, 3", of very many the first."""
    return f"rank{'s' if len(ranks) > 1 else ''} {few([*map(str, ranks)])}"


def listed(ranks: Sequence[int]) -> str:
    """Return "[0, 3]", of very many the first."""
    return f"[{few([*map(str, ranks)])}]"


def table(title: str, rows: Mapping[int, str]) -> str:
    """Return one text with a row per rank; of very many ranks, one for all with the same row.

    Of very many different rows it shows the most common and the rarest, as that of a rank astray.
    """
    if len(rows) <= _SHOWN:
        return f"{title}: " + "; ".join(f"rank {rank}: {rows[rank]}" for rank in sorted(rows))
    alike: dict[str, list[int]] = {}
    for rank in sorted(rows):
        alike.setdefault(rows[rank], []).append(rank)
    groups = sorted(alike.values(), key=len)
    groups[_SHOWN - 1 : -1] = []
    left = len(rows) - sum(map(len, groups))
    shown = [f"{shown_ranks(ranks)}: {rows[ranks[0]]}" for ranks in sorted(groups)]
    return f"{title}: {'; '.join(shown)}" + (f"; and {left} ranks more" if left else "")


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


def first_text(comm: Communicator, text: str) -> str:
    """Return the text of the lowest rank that has one, "" where none has; collective."""
    return next(filter(None, gather_texts(comm, text)), "")
