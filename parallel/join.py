"""Give every rank the same number of turns, though the ranks hold unequal numbers of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["AT_END", "even_batches"]

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
    if at_end not in AT_END:
        raise ValueError(f"unknown at_end {at_end!r}, expected one of: {', '.join(AT_END)}")
    return _turns(comm, iter(batches), enough=comm.size if at_end == "stop" else 1)


def _turns(comm: Communicator, batches: Iterator[Batch], enough: int) -> Iterator[Batch | None]:
    end = object()
    while True:
        batch = next(batches, end)
        here = comm.allreduce(np.array([batch is not end], dtype=np.int64), op="sum")
        if here[0] < enough:
            return
        yield None if batch is end else batch  # type: ignore[misc]
