"""Collectives in which ranks bring different numbers of rows: MPI's "v" variants, by the even ones.

What is to come is told first, so that every rank knows where each part of its result lies, and the
same error is raised everywhere where the ranks' rows do not fit. A few rows are told along with
that; else each part goes by itself: to all by a broadcast into its place, to one by a message.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .device import bare
from .errors import MismatchError
from .header import NBYTES, pack, unpack
from .texts import table

if TYPE_CHECKING:
    from .calls import GroupCalls


ROOM = 1536
"""Bytes of rows that are told along with how many they are."""

LETTER_BYTES = NBYTES + ROOM

Octets = npt.NDArray[np.uint8]
_NOTHING = (0, 0)


class Side(Protocol):
    """What makes arrays where the rows lie, on the host or on a GPU."""

    def kind(self, x: Any) -> tuple[str, tuple[int, ...]]:
        """Return the element type's name, and the shape."""
        ...

    def like(self, x: Any, shape: tuple[int, ...]) -> Any:
        """Return a new array of x's library and element type, where x lies."""
        ...

    def octets(self, x: Any, most: int | None = None) -> Octets | None:
        """Return the bytes of x's elements; None on a GPU, or of more than `most` bytes."""
        ...

    @property
    def where(self) -> str:
        """Return where such memory is, as an error tells it."""
        ...


@dataclass(frozen=True)
class Rows:
    """What a rank brings.

    octets: its bytes, where any of them may be told.  kind: what has to be alike on all ranks.
    """

    x: Any
    octets: Octets | None
    kind: tuple[str, tuple[int, ...], str]

    def tell(self, letter: Octets, low: int, high: int) -> bool:
        """Write to a letter how many rows come, and these if they fit; tell whether they do."""
        count, nbytes = self.x.shape[0], 0 if self.octets is None else self.octets.size
        first, last = ((at * nbytes) // max(count, 1) for at in (low, high))
        told = self.octets is not None and last - first <= ROOM
        letter[:NBYTES] = pack(high - low, told, *self.kind)
        if self.octets is not None and told:
            letter[NBYTES : NBYTES + last - first] = self.octets[first:last]
        return told


class Parts:
    """A rank's result, to be put together of parts by their ranks' order.

    left: the parts that were not told, as rank -> its place.
    """

    def __init__(self, side: Side, rows: Rows, letters: Octets, heard: Sequence[Heard]) -> None:
        places = list(pairwise(accumulate((count for count, _ in heard), initial=0)))
        total = places[-1][1]
        self.result = side.like(rows.x, (total, *rows.x.shape[1:]))
        octets = side.octets(self.result)
        self.left: dict[int, tuple[int, int]] = {}
        for rank, ((low, high), (_, told)) in enumerate(zip(places, heard, strict=True)):
            if told and octets is not None and total:
                first, last = (at * octets.size // total for at in (low, high))
                octets[first:last] = letters[rank, NBYTES : NBYTES + last - first]
            elif high > low:
                self.left[rank] = low, high


def allgatherv(comm: GroupCalls, side: Side, x: Any) -> Any:
    """Return all ranks' rows, joined; see `GroupCalls.allgatherv`."""
    rows = _rows(comm, side, x)
    letters, heard = _gathered(comm, "allgatherv", rows)
    parts = Parts(side, rows, letters, heard)
    result = parts.result
    if comm.rank in parts.left:
        low, high = parts.left[comm.rank]
        result[low:high] = bare(rows.x)
    works = [
        comm.broadcast(result[low:high], root, blocking=False)
        for root, (low, high) in parts.left.items()
    ]
    for work in works:
        work.wait()
    return result


def gatherv(comm: GroupCalls, side: Side, x: Any, root: int) -> Any:
    """Return all ranks' rows, joined, at root; see `GroupCalls.gatherv`."""
    root = comm.host_operations.root(root)
    rows = _rows(comm, side, x, f", for rank {root}")
    letters, heard = _gathered(comm, "gatherv", rows)
    if comm.rank == root:
        parts = Parts(side, rows, letters, heard)
        exchange(comm, rows.x, {root: (0, rows.x.shape[0])}, parts.result, parts.left)
        return parts.result
    if not heard[comm.rank].told:
        exchange(comm, rows.x, {root: (0, rows.x.shape[0])}, rows.x, {})
    return None


def alltoallv(comm: GroupCalls, side: Side, x: Any, counts: Iterable[int]) -> tuple[Any, list[int]]:
    """Return the rows that the ranks have for this one; see `GroupCalls.alltoallv`."""
    rows = _rows(comm, side, x)
    sent = checked_counts(counts, comm.size, rows.x.shape[0])
    places = list(pairwise(accumulate(sent, initial=0)))
    letters = comm.letters(comm.size)
    gives = {dst: place for dst, place in enumerate(places) if not rows.tell(letters[dst], *place)}
    told = comm.alltoall(letters)
    comm.give_back(letters)
    heard = _agreed("alltoallv", told)
    parts = Parts(side, rows, told, heard)
    exchange(comm, rows.x, gives, parts.result, parts.left)
    return parts.result, [count for count, _ in heard]


def _gathered(comm: GroupCalls, name: str, rows: Rows) -> tuple[Octets, list[Heard]]:
    """Tell all ranks of rows, and return what each has told: its letter, and what that says."""
    letters = comm.letters(1)
    rows.tell(letters[0], 0, rows.x.shape[0])
    told = comm.allgather(letters)[:, 0]
    comm.give_back(letters)
    return told, _agreed(name, told)


Place = tuple[int, int]
"""The first row, and the one behind the last."""


def exchange(
    comm: GroupCalls, x: Any, gives: Mapping[int, Place], result: Any, takes: Mapping[int, Place]
) -> None:
    """Send rows of x to ranks, and receive rows of the result from ranks; this one's are copied.

    gives, takes: by rank; what one rank sends another receives. Empty ones are left out.
    """
    rank, tag = comm.rank, comm.host_operations.highest_tag
    works = []
    for away in range(1, comm.size):  # so that not all begin with the same rank
        src, dst = (rank - away) % comm.size, (rank + away) % comm.size
        low, high = takes.get(src, _NOTHING)
        if high > low:
            works.append(comm.irecv(result[low:high], src, tag))
        low, high = gives.get(dst, _NOTHING)
        if high > low:
            works.append(comm.isend(x[low:high], dst, tag))
    if rank in takes:
        (low, high), own = takes[rank], slice(*gives[rank])
        result[low:high] = bare(x[own])
    for work in works:
        work.wait()


def _rows(comm: GroupCalls, side: Side, x: Any, more: str = "") -> Rows:
    """Return x as what has rows.

    more: what has to be alike as well, as an error tells it.
    """
    dtype, shape = side.kind(x)
    if not shape:
        raise ValueError("x: expected an array with a first axis, of rows, got a single element")
    octets = side.octets(x, most=ROOM * comm.size)
    x = x if hasattr(x, "shape") else np.asarray(memoryview(x))
    return Rows(x, octets, (dtype, shape[1:], side.where + more))


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


class Heard(NamedTuple):
    """What a letter says: how many rows come, and whether it has them."""

    rows: int
    told: bool


def _agreed(name: str, letters: Octets) -> list[Heard]:
    """Return what each rank has told; the same on all ranks, or the same error."""
    heard = [unpack(letter[:NBYTES]) for letter in letters]
    kinds = [(dtype, tuple(shape), where) for _, _, dtype, shape, where in heard]
    if len(set(kinds)) > 1:
        rows = {
            rank: f"{dtype} of shape ({', '.join(map(str, ('n', *shape)))}){where}"
            for rank, (dtype, shape, where) in enumerate(kinds)
        }
        raise MismatchError(table(f"{name}: the ranks' rows differ", rows))
    return [Heard(count, told) for count, told, *_ in heard]
