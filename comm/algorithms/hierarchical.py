"""Two levels: within the nodes, then between them, so that network cards carry the least.

Nodes of equally many ranks use all their ranks between nodes, each for its own part of the buffer:
a lane per place. Nodes of unequal size send one leader each.

Source: Traeff and Hunold, "Decomposing MPI collectives for exploiting multi-lane communication"
(2020), the full-lane decomposition.
"""

from __future__ import annotations

from math import lcm

from ..collective import ALLREDUCE, BROADCAST
from ..listed import side_by_side
from ..nesting import nest, nest_broadcast
from ..places import among, renumber
from ..schedule import Schedule
from ..topology import Nodes
from ..transform import reverse
from .ring import ring_allgather, ring_allreduce, ring_broadcast, ring_reduce_scatter
from .tree import tree_broadcast, tree_reduce


def hierarchical_allreduce(size: int, nodes: Nodes) -> Schedule:
    """Reduce-scatter within nodes, allreduce between them in every lane, allgather within.

    L ranks on each of N nodes, n bytes:
    Rounds: 2 (L - 1) within, 2 (N - 1) between.  Bytes sent per rank: 2 n (p - 1) / p.
    Bytes sent per node: 2 n (N - 1) / N, whatever L is.

    Nodes of unequal size: reduce to a leader by tree, ring of leaders, broadcast by tree.
    Bytes sent by a leader: 2 n (N - 1) / N between, n ceil(log2(L)) within.

    Two nodes of two ranks, one column per round:

        0: 0>1:2..3+ 1>0:0..1+ 2>3:2..3+ 3>2:0..1+
        1: 0>2:0+ 1>3:2+ 2>0:1+ 3>1:3+
        2: 0>2:1 1>3:3 2>0:0 3>1:2
        3: 0>1:0..1 1>0:2..3 2>3:0..1 3>2:2..3
    """
    _require(size, nodes)
    width = nodes.width
    if width is None:
        return _led_allreduce(size, nodes)
    schedule = nest(
        ring_reduce_scatter(width), ring_allreduce(size // width), ring_allgather(width)
    )
    return renumber(schedule, _order(nodes))


def hierarchical_broadcast(size: int, root: int, nodes: Nodes) -> Schedule:
    """Broadcast between the nodes, along a chain of one rank each, then by tree within them.

    Rounds: 2 (N - 1) between, ceil(log2(L)) within.
    Bytes sent by the busiest rank: n between, if there are others, and n ceil(log2(L)) within.
    """
    _require(size, nodes)
    width = nodes.width
    if width is None:
        return _led_broadcast(size, root, nodes)
    order = _order(nodes)
    node, place = divmod(order.index(root), width)
    schedule = nest_broadcast(ring_broadcast(size // width, node), tree_broadcast(width, place))
    return renumber(schedule, order)


def hierarchical_reduce(size: int, root: int, nodes: Nodes) -> Schedule:
    """Reduce within the nodes by tree, then between them along a chain: broadcast run backwards.

    Rounds: ceil(log2(L)) within, 2 (N - 1) between.  Bytes sent per rank: n (the root: none).
    """
    return reverse(hierarchical_broadcast(size, root, nodes))


def _require(size: int, nodes: Nodes) -> None:
    if nodes.size != size:
        raise ValueError(f"the nodes hold {nodes.size} ranks, expected {size}")


def _order(nodes: Nodes) -> tuple[int, ...]:
    return tuple(rank for node in nodes.members for rank in node)


def _led_allreduce(size: int, nodes: Nodes) -> Schedule:
    leaders = [node[0] for node in nodes.members]
    ring = ring_allreduce(len(leaders))
    chunks = ring.num_chunks
    up = [(node, tree_reduce(len(node))) for node in nodes.members]
    down = [(node, tree_broadcast(len(node))) for node in nodes.members]
    rounds = (
        *side_by_side(ALLREDUCE, size, up, chunks),
        *among(leaders, ring, chunks),
        *side_by_side(ALLREDUCE, size, down, chunks),
    )
    return Schedule(ALLREDUCE, size, chunks, rounds)


def _led_broadcast(size: int, root: int, nodes: Nodes) -> Schedule:
    places = [node.index(root) if root in node else 0 for node in nodes.members]
    leaders = [node[place] for node, place in zip(nodes.members, places, strict=True)]
    chain = ring_broadcast(len(leaders), leaders.index(root))
    trees = [tree_broadcast(len(node), at) for node, at in zip(nodes.members, places, strict=True)]
    chunks = lcm(chain.num_chunks, *(tree.num_chunks for tree in trees))
    rounds = (
        *among(leaders, chain, chunks),
        *side_by_side(BROADCAST, size, list(zip(nodes.members, trees, strict=True)), chunks),
    )
    return Schedule(BROADCAST, size, chunks, rounds, root=root)
