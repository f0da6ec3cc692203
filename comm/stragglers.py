"""Who comes last to a group's collectives, how often, and by how much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..kernels.records import RING_ENTRIES
from .clock import measure_offset
from .notices import MESSAGES
from .trace import Entry

if TYPE_CHECKING:
    from .communicator import Communicator

Table = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Straggler:
    """One rank of a group. Times are seconds.

    last: how many collectives it came to last.  behind: how long after the rank before it, on the
    mean over those.  most: at the worst.
    """

    rank: int
    last: int
    behind: float
    most: float


@dataclass(frozen=True)
class Stragglers:
    """The ranks of a group, over `calls` collectives that are still known of all of them.

    error: seconds by which a clock of another node may be off; 0 on one node.
    """

    calls: int
    error: float
    ranks: tuple[Straggler, ...]

    def __str__(self) -> str:
        lines = [f"{self.calls} collectives; clocks within {self.error * 1e6:.0f} us"]
        lines += ["rank  last  by ms (mean)  by ms (most)"]
        lines += [
            f"{row.rank:4}  {row.last:4}  {row.behind * 1e3:12.3f}  {row.most * 1e3:12.3f}"
            for row in self.ranks
        ]
        return "\n".join(lines)


def stragglers(comm: Communicator) -> Stragglers:
    """Return who came last to the last collectives of this group; collective.

    Of each rank's last 256 operations, over all groups, those count that all ranks still know.
    """
    mine = arrivals(comm.recent(RING_ENTRIES), comm.name)
    offset = measure_offset(comm)
    mine[:, 1] -= round(offset.ahead)
    errors = comm.allgather(np.array([offset.error]))
    return judged(comm.allgather(mine), float(errors.max()) * 1e-9)


def arrivals(entries: Iterable[Entry], group: str) -> Table:
    """Return rows of (sequence, nanoseconds) of a group's collectives, filled up with zeros."""
    rows = np.zeros((RING_ENTRIES, 2), np.int64)
    for row, entry in zip(rows, entries, strict=False):
        if entry.group == group and entry.signature.operation not in MESSAGES:
            row[:] = entry.sequence, entry.start
    return rows


def judged(tables: Table, error: float = 0.0) -> Stragglers:
    """Return who came last. tables: of every rank, as `arrivals` has them, on one clock."""
    came = [dict(rows[rows[:, 0] > 0].tolist()) for rows in tables]
    shared = sorted(set.intersection(*map(set, came)))
    behind: list[list[float]] = [[] for _ in came]
    for sequence in shared if len(came) > 1 else ():
        order = sorted(range(len(came)), key=lambda rank: came[rank][sequence])
        before, last = (came[rank][sequence] for rank in order[-2:])
        behind[order[-1]].append((last - before) * 1e-9)
    rows = (
        Straggler(rank, len(late), float(np.mean(late)) if late else 0.0, max(late, default=0.0))
        for rank, late in enumerate(behind)
    )
    return Stragglers(len(shared), error, tuple(rows))
