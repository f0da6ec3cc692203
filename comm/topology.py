"""What a schedule is priced against: links, nodes and network cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Link:
    """A way between two ranks: latency in seconds a message, bandwidth in bytes a second."""

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not self.latency >= 0:
            raise ValueError(f"latency must be 0 s or more, got {self.latency}")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be above 0 bytes/s, got {self.bandwidth}")

    @property
    def seconds_per_byte(self) -> float:
        """Return the inverse bandwidth."""
        return 1.0 / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """Nodes whose ranks share network cards.

    inter: the link that one network card gives, between nodes.
    intra: the link between two ranks of one node; `inter` where None.
    ranks_per_node: for any number of ranks, so many neighbours share a node.
    cards_per_node: count.
    reduce_bandwidth: bytes a second that one rank adds, infinity for free.
    nodes: which ranks share a node, instead of ranks_per_node.
    """

    inter: Link
    intra: Link | None = None
    ranks_per_node: int = 1
    cards_per_node: int = 1
    reduce_bandwidth: float = float("inf")
    nodes: Nodes | None = None

    def __post_init__(self) -> None:
        for name in ("ranks_per_node", "cards_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not self.reduce_bandwidth > 0:
            raise ValueError(f"reduce_bandwidth must be above 0, got {self.reduce_bandwidth}")
        if self.nodes is not None and self.ranks_per_node != 1:
            raise ValueError(
                f"expected nodes or ranks_per_node, got {self.nodes} and {self.ranks_per_node}"
            )

    @property
    def apart(self) -> bool:
        """Tell whether every rank has a node of its own."""
        if self.nodes is None:
            return self.ranks_per_node == 1
        return len(self.nodes.members) == self.nodes.size

    def node_of(self, ranks: Integers) -> Integers:
        """Return the number of each rank's node."""
        if self.nodes is None:
            return ranks // self.ranks_per_node
        return self.nodes.numbers[ranks]


@dataclass(frozen=True)
class Nodes:
    """Which ranks share a node: every rank of 0..size-1 in exactly one, in rising order.

    members: the ranks of each node; nodes in order of their lowest rank.
    """

    members: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        found = sorted(rank for node in self.members for rank in node)
        if found != list(range(len(found))) or not all(self.members):
            raise ValueError(
                f"expected every rank from 0 on in exactly one node, got {str(self.members)[:200]}"
            )
        ordered = tuple(sorted(tuple(sorted(node)) for node in self.members))
        object.__setattr__(self, "members", ordered)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.members)

    @cached_property
    def numbers(self) -> Integers:
        """Return the number of every rank's node, by rank."""
        found = np.empty(self.size, dtype=np.int64)
        for number, node in enumerate(self.members):
            found[list(node)] = number
        return found

    @classmethod
    def blocks(cls, size: int, ranks_per_node: int) -> Nodes:
        """Put neighbouring ranks together; the last node may hold fewer."""
        if ranks_per_node < 1:
            raise ValueError(f"ranks_per_node must be 1 or more, got {ranks_per_node}")
        starts = range(0, size, ranks_per_node)
        return cls(tuple(tuple(range(at, min(at + ranks_per_node, size))) for at in starts))

    @classmethod
    def labelled(cls, labels: Sequence[int]) -> Nodes:
        """Put ranks with the same label together: labels[rank] may be any number."""
        groups: dict[int, list[int]] = {}
        for rank, label in enumerate(labels):
            groups.setdefault(label, []).append(rank)
        return cls(tuple(map(tuple, groups.values())))

    @cached_property
    def size(self) -> int:
        """Return the number of ranks."""
        return sum(map(len, self.members))

    @property
    def width(self) -> int | None:
        """Return the ranks of each node where all nodes have as many, else None."""
        widths = {len(node) for node in self.members}
        return widths.pop() if len(widths) == 1 else None

    @property
    def nested(self) -> bool:
        """Tell whether there are several nodes, and some node holds several ranks."""
        return 1 < len(self.members) < self.size

    def __str__(self) -> str:
        if self.width is not None:
            return f"{len(self.members)} nodes of {self.width}"
        return f"{len(self.members)} nodes of " + ", ".join(str(len(n)) for n in self.members[:8])
