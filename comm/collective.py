"""What each collective promises: which rank holds which chunks before it, and after it.

A chunk's value is the combination of some ranks' contributions. Before the call a rank holds its
own contribution to the chunks that `before` names; after it, the chunks that `after` names must
hold the contributions of all ranks that had one. That single rule serves reductions (everybody
had one) and moves (exactly one rank had).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Holds = Callable[[int, int, int, int, int], bool]
"""(rank, chunk, size, num_chunks, root) -> does the rank hold the chunk?"""


def everywhere(rank: int, chunk: int, size: int, num_chunks: int, root: int) -> bool:
    """Hold every chunk."""
    return True


def at_root(rank: int, chunk: int, size: int, num_chunks: int, root: int) -> bool:
    """Hold every chunk at the root, none elsewhere."""
    return rank == root


def at_owner(rank: int, chunk: int, size: int, num_chunks: int, root: int) -> bool:
    """Hold the rank's own run of num_chunks / size chunks."""
    return chunk * size // num_chunks == rank


def in_row(rank: int, chunk: int, size: int, num_chunks: int, root: int) -> bool:
    """Hold row `rank` of the size x size chunks of an alltoall: what this rank gives away."""
    return chunk // size == rank


def in_column(rank: int, chunk: int, size: int, num_chunks: int, root: int) -> bool:
    """Hold column `rank` of the size x size chunks of an alltoall: what this rank is given."""
    return chunk % size == rank


@dataclass(frozen=True)
class Collective:
    """The promise of one collective operation.

    idempotent: a contribution may arrive twice without harm (a barrier's "I was here").
    """

    name: str
    before: Holds
    after: Holds
    reduces: bool = False
    rooted: bool = False
    idempotent: bool = False

    @property
    def owned(self) -> bool:
        """Tell whether chunks belong to ranks, so that num_chunks is a multiple of size."""
        return at_owner in (self.before, self.after)

    def misfit(self, size: int, num_chunks: int, root: int) -> str | None:
        """Say what is wrong with these numbers for this collective, or None."""
        if size < 1 or num_chunks < 1:
            return f"expected size >= 1 and num_chunks >= 1, got {size} and {num_chunks}"
        if not 0 <= root < size:
            return f"root {root} is outside 0..{size - 1}"
        if self.owned and num_chunks % size:
            return f"{self.name} needs num_chunks to be a multiple of size {size}, got {num_chunks}"
        if self.before is in_row and num_chunks != size * size:
            return f"{self.name} needs num_chunks = size * size = {size * size}, got {num_chunks}"
        return None

    def __repr__(self) -> str:
        return self.name.upper()


ALLREDUCE = Collective("allreduce", everywhere, everywhere, reduces=True)
REDUCE = Collective("reduce", everywhere, at_root, reduces=True, rooted=True)
REDUCE_SCATTER = Collective("reduce_scatter", everywhere, at_owner, reduces=True)
BROADCAST = Collective("broadcast", at_root, everywhere, rooted=True)
ALLGATHER = Collective("allgather", at_owner, everywhere)
GATHER = Collective("gather", at_owner, at_root, rooted=True)
SCATTER = Collective("scatter", at_root, at_owner, rooted=True)
ALLTOALL = Collective("alltoall", in_row, in_column)
BARRIER = Collective("barrier", everywhere, everywhere, reduces=True, idempotent=True)

COLLECTIVES = {
    collective.name: collective
    for collective in (
        ALLREDUCE,
        REDUCE,
        REDUCE_SCATTER,
        BROADCAST,
        ALLGATHER,
        GATHER,
        SCATTER,
        ALLTOALL,
        BARRIER,
    )
}
