"""Where the ranks of a group sit: on which node, and in which lane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Seats:
    """The ranks of a group whose nodes hold equally many, seen from one node.

    node_of: for every rank, a number that only its node has.  lanes: for each place on a node, the
    ranks that have it, one of every node, ascending.  place: this rank's.
    """

    node_of: Sequence[int]
    lanes: Sequence[Sequence[int]]
    place: int

    @property
    def width(self) -> int:
        """Return the number of ranks of a node."""
        return len(self.lanes)

    @property
    def lane(self) -> Sequence[int]:
        """Return the ranks of this rank's lane."""
        return self.lanes[self.place]

    def place_of(self, rank: int) -> int:
        """Return a rank's place on its node."""
        return next(place for place, lane in enumerate(self.lanes) if rank in lane)

    def in_lane(self, root: int, place: int) -> int:
        """Return the number, in a place's lane, of the rank that is on the node of `root`."""
        node = self.node_of[root]
        return next(i for i, rank in enumerate(self.lanes[place]) if self.node_of[rank] == node)

    def by_lane(self) -> list[int]:
        """Return all ranks, node by node in the order of this lane, in each in order of places."""
        return [
            self.lanes[place][self.in_lane(member, place)]
            for member in self.lane
            for place in range(self.width)
        ]
