"""What a schedule is priced against: links, nodes and network cards."""

from __future__ import annotations

from dataclasses import dataclass


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
    """Nodes of equal size whose ranks share network cards; neighbouring ranks share a node.

    inter: the link that one network card gives, between nodes.
    intra: the link between two ranks of one node; `inter` where None.
    ranks_per_node, cards_per_node: counts.
    reduce_bandwidth: bytes a second that one rank adds, infinity for free.
    """

    inter: Link
    intra: Link | None = None
    ranks_per_node: int = 1
    cards_per_node: int = 1
    reduce_bandwidth: float = float("inf")

    def __post_init__(self) -> None:
        for name in ("ranks_per_node", "cards_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not self.reduce_bandwidth > 0:
            raise ValueError(f"reduce_bandwidth must be above 0, got {self.reduce_bandwidth}")
