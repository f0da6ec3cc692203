"""Give every rank the same number of turns, though the ranks hold unequal numbers of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["AT_END", "check_at_end", "even_batches", "turns"]

Batch = TypeVar("Batch")

AT_END = ("stop", "none")


def even_batches(
    comm: Communicator, batches: Iterable[Batch], at_end: str = "stop"
) -> Iterator[Batch | None]:
    """Yield this rank's batches in turns that all ranks take together.

    at_end: "stop": all ranks stop before the first turn for which any rank has no batch; what the
        others have left is not used. "none": a rank that has run out is given None, until all
        have.

    Collective over `comm`, a small message per turn: every rank iterates to the end. ValueError for
    another at_end.
    """
    check_at_end(at_end)
    return (batch for batch, _ in turns(comm, batches, at_end))


def check_at_end(at_end: str) -> None:
    """Refuse another word than those of `even_batches`."""
    if at_end not in AT_END:
        raise ValueError(f"unknown at_end {at_end!r}, expected one of: {', '.join(AT_END)}")


def turns(
    comm: Communicator, batches: Iterable[Batch], at_end: str
) -> Iterator[tuple[Batch | None, list[int]]]:
    """Yield the batches of `even_batches`, and the ranks that have one in the turn."""
    mine, end = iter(batches), object()
    enough = comm.size if at_end == "stop" else 1
    while True:
        batch = next(mine, end)
        flags = comm.allgather(np.array([batch is not end], dtype=np.uint8))
        ranks = np.flatnonzero(flags).tolist()
        if len(ranks) < enough:
            return
        yield None if batch is end else batch, ranks  # type: ignore[misc]
