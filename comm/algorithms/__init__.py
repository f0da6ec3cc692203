"""The table of built-in algorithms."""

from __future__ import annotations

from collections.abc import Callable

from ..collective import COLLECTIVES
from ..schedule import Schedule
from ..topology import Nodes
from .butterfly import (
    dissemination_barrier,
    doubling_allgather,
    doubling_allreduce,
    halving_doubling_allreduce,
    halving_reduce_scatter,
)
from .hierarchical import (
    hierarchical_allreduce,
    hierarchical_broadcast,
    hierarchical_reduce,
)
from .pairwise import (
    pairwise_allgather,
    pairwise_allreduce,
    pairwise_alltoall,
    pairwise_broadcast,
    pairwise_gather,
    pairwise_reduce,
    pairwise_reduce_scatter,
    pairwise_scatter,
)
from .ring import (
    ring_allgather,
    ring_allreduce,
    ring_broadcast,
    ring_reduce,
    ring_reduce_scatter,
)
from .tree import tree_allreduce, tree_broadcast, tree_gather, tree_reduce, tree_scatter

BUILDERS: dict[tuple[str, str], Callable[..., Schedule]] = {
    ("allreduce", "ring"): ring_allreduce,
    ("allreduce", "recursive_doubling"): doubling_allreduce,
    ("allreduce", "halving_doubling"): halving_doubling_allreduce,
    ("allreduce", "tree"): tree_allreduce,
    ("allreduce", "pairwise"): pairwise_allreduce,
    ("allreduce", "hierarchical"): hierarchical_allreduce,
    ("reduce_scatter", "ring"): ring_reduce_scatter,
    ("reduce_scatter", "recursive_halving"): halving_reduce_scatter,
    ("reduce_scatter", "pairwise"): pairwise_reduce_scatter,
    ("allgather", "ring"): ring_allgather,
    ("allgather", "recursive_doubling"): doubling_allgather,
    ("allgather", "pairwise"): pairwise_allgather,
    ("broadcast", "ring"): ring_broadcast,
    ("broadcast", "tree"): tree_broadcast,
    ("broadcast", "pairwise"): pairwise_broadcast,
    ("broadcast", "hierarchical"): hierarchical_broadcast,
    ("reduce", "ring"): ring_reduce,
    ("reduce", "tree"): tree_reduce,
    ("reduce", "pairwise"): pairwise_reduce,
    ("reduce", "hierarchical"): hierarchical_reduce,
    ("gather", "tree"): tree_gather,
    ("gather", "pairwise"): pairwise_gather,
    ("scatter", "tree"): tree_scatter,
    ("scatter", "pairwise"): pairwise_scatter,
    ("alltoall", "pairwise"): pairwise_alltoall,
    ("barrier", "dissemination"): dissemination_barrier,
}
"""(collective, algorithm) -> builder(size), or builder(size, root) where the collective has one.

Those named in BY_NODE take the Nodes last.
"""

BY_NODE = frozenset({"hierarchical"})
"""Algorithms that depend on which ranks share a node."""


def names(collective: str) -> tuple[str, ...]:
    """Return the names of the algorithms that serve a collective."""
    return tuple(name for served, name in BUILDERS if served == collective)


def build(
    collective: str, algorithm: str, size: int, root: int = 0, nodes: Nodes | None = None
) -> Schedule:
    """Build a schedule by name.

    nodes: for the algorithms in BY_NODE; neighbours in pairs where None.
    Raises: ValueError that lists the names there are.
    """
    builder = BUILDERS.get((collective, algorithm))
    if builder is None:
        known = ", ".join(names(collective)) if collective in COLLECTIVES else ""
        raise ValueError(
            f"no algorithm {algorithm!r} for {collective}; there is: {known}"
            if known
            else f"no collective {collective!r}; there is: {', '.join(COLLECTIVES)}"
        )
    rooted = (root,) if COLLECTIVES[collective].rooted else ()
    grouped = (nodes or Nodes.blocks(size, 2),) if algorithm in BY_NODE else ()
    return builder(size, *rooted, *grouped)
