"""Collectives of rows of which each rank has another number: MPI's "v" variants, by the even ones.

What is to come is told first, so that every rank knows where each part of its result lies, and the
same error is raised everywhere where the ranks' rows do not fit. Then each part goes by itself: to
all by a broadcast into its place, to one by a message.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from .device import bare
from .errors import MismatchError
from .header import pack, unpack
from .texts import table

if TYPE_CHECKING:
    from .calls import GroupCalls


class Side(Protocol):
    """What makes arrays where the rows lie, on the host or on a GPU."""

    def kind(self, x: Any) -> tuple[str, tuple[int, ...]]:
        """Return the element type's name, and the shape."""
        ...

    def like(self, x: Any, shape: tuple[int, ...]) -> Any:
        """Return a new array of x's library and element type, where x lies."""
        ...


def allgatherv(comm: GroupCalls, side: Side, x: Any) -> Any:
    """Return all ranks' rows, joined; see `GroupCalls.allgatherv`."""
    x, kind = _rows(side, x)
    told = comm.allgather(pack(x.shape[0], *kind))
    parts = _places(_agreed("allgatherv", told))
    result = side.like(x, (parts[-1][1], *x.shape[1:]))
    low, high = parts[comm.rank]
    result[low:high] = bare(x)
    works = [
        comm.broadcast(result[low:high], root, blocking=False)
        for root, (low, high) in enumerate(parts)
        if high > low
    ]
    for work in works:
        work.wait()
    return result


def gatherv(comm: GroupCalls, side: Side, x: Any, root: int) -> Any:
    """Return all ranks' rows, joined, at root; see `GroupCalls.gatherv`."""
    x, kind = _rows(side, x)
    root = comm.host_operations.root(root)
    counts = _agreed("gatherv", comm.allgather(pack(x.shape[0], *kind)))
    nothing = [0] * comm.size
    own = [x.shape[0] if rank == root else 0 for rank in range(comm.size)]
    result = exchange(comm, side, x, own, counts if comm.rank == root else nothing)
    return result if comm.rank == root else None


def alltoallv(comm: GroupCalls, side: Side, x: Any, counts: Iterable[int]) -> tuple[Any, list[int]]:
    """Return the rows that the ranks have for this one; see `GroupCalls.alltoallv`."""
    x, kind = _rows(side, x)
    sent = checked_counts(counts, comm.size, x.shape[0])
    told = comm.alltoall(np.stack([pack(count, *kind) for count in sent]))
    received = _agreed("alltoallv", told)
    return exchange(comm, side, x, sent, received), received


def exchange(
    comm: GroupCalls, side: Side, x: Any, sent: Sequence[int], received: Sequence[int]
) -> Any:
    """Send rows of x to each rank, and return those received, all by the ranks' order.

    sent, received: how many, by rank; what one rank sends another receives.
    """
    result = side.like(x, (sum(received), *x.shape[1:]))
    takes, gives, rank = _places(received), _places(sent), comm.rank
    tag = comm.host_operations.highest_tag
    works = []
    for away in range(1, comm.size):  # so that not all begin with the same rank
        src, dst = (rank - away) % comm.size, (rank + away) % comm.size
        low, high = takes[src]
        if high > low:
            works.append(comm.irecv(result[low:high], src, tag))
        low, high = gives[dst]
        if high > low:
            works.append(comm.isend(x[low:high], dst, tag))
    (low, high), own = takes[rank], slice(*gives[rank])
    result[low:high] = bare(x[own])
    for work in works:
        work.wait()
    return result


def _rows(side: Side, x: Any) -> tuple[Any, tuple[str, tuple[int, ...]]]:
    """Return x as what has rows, and what has to be alike on all ranks: dtype and a row's shape."""
    dtype, shape = side.kind(x)
    if not shape:
        raise ValueError("x: expected an array with a first axis, of rows, got a single element")
    return (x if hasattr(x, "shape") else np.asarray(memoryview(x))), (dtype, shape[1:])


def checked_counts(counts: Iterable[int], size: int, rows: int) -> list[int]:
    """Return numbers of rows, one for each rank; raise TypeError or ValueError for others."""
    try:
        found = [operator.index(count) for count in counts]
    except TypeError:
        raise TypeError(f"counts: expected whole numbers, got {counts!r:.80}") from None
    if len(found) != size or min(found) < 0 or sum(found) != rows:
        raise ValueError(
            f"counts: expected {size} numbers of rows, a rank each, that add up to the {rows} rows "
            f"of x, got {found}"
        )
    return found


def _agreed(name: str, told: npt.NDArray[np.uint8]) -> list[int]:
    """Return how many rows each rank has told of; the same on all ranks, or the same error."""
    heard = [unpack(words) for words in told]
    kinds = [(dtype, tuple(shape)) for _, dtype, shape in heard]
    if len(set(kinds)) > 1:
        rows = {
            rank: f"{dtype} of shape ({', '.join(map(str, ('n', *shape)))})"
            for rank, (dtype, shape) in enumerate(kinds)
        }
        raise MismatchError(table(f"{name}: the ranks' rows differ", rows))
    return [count for count, _, _ in heard]


def _places(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return where each rank's rows lie among all."""
    return list(pairwise(accumulate(counts, initial=0)))
