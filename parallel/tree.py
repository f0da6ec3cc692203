"""Add numbered leaves in one fixed binary tree, whoever holds them and whenever they come.

Floating-point addition is not associative: a sum depends on its brackets. Here they depend on the
number of leaves alone. Node (level, index) covers leaves [index * 2**level, (index + 1) * 2**level)
as far as there are any; neighbours are added in pairs, and a last node without a neighbour goes up
as it is. Drawn for 5 leaves:

    level 0 |    0   1   2   3   4
    level 1 |     0+1     2+3    4
    level 2 |       0+1+2+3      4
    level 3 |         0+1+2+3+4
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

__all__ = ["Node", "Tree", "frontier", "meets_in_pairs", "sum_in_tree"]

Node = tuple[int, int]
T = TypeVar("T")


class Tree(Generic[T]):
    """Hold the sums of the nodes that are complete and wait for their neighbour.

    add(left, right) may reuse the memory of either.
    """

    def __init__(self, num_leaves: int, add: Callable[[T, T], T]) -> None:
        self._num_leaves = num_leaves
        self._add = add
        self.nodes: dict[Node, T] = {}

    def put(self, node: Node, value: T) -> None:
        """Add a node's sum, and all above it that are complete with it."""
        level, index = node
        if not 0 <= index << level < max(self._num_leaves, 1):
            raise ValueError(f"node {node} is outside of a tree of {self._num_leaves} leaves")
        while 1 << level < self._num_leaves:
            neighbour = index ^ 1
            if neighbour << level < self._num_leaves:
                if (level, neighbour) not in self.nodes:
                    break
                other = self.nodes.pop((level, neighbour))
                value = self._add(other, value) if index & 1 else self._add(value, other)
            level, index = level + 1, index >> 1
        if (level, index) in self.nodes:
            raise ValueError(f"node {(level, index)} has been put twice")
        self.nodes[level, index] = value

    @property
    def total(self) -> T:
        """Return the sum of all leaves; ValueError if some are missing."""
        if len(self.nodes) != 1 or 1 << next(iter(self.nodes))[0] < self._num_leaves:
            raise ValueError(
                f"the tree of {self._num_leaves} leaves is incomplete: it has {sorted(self.nodes)}"
            )
        return next(iter(self.nodes.values()))


def sum_in_tree(values: Sequence[float]) -> float:
    """Return the sum of at least one value, in the brackets of the tree."""
    tree: Tree[float] = Tree(len(values), float.__add__)
    for leaf, value in enumerate(values):
        tree.put((0, leaf), value)
    return tree.total


def frontier(num_leaves: int, first: int, end: int) -> tuple[Node, ...]:
    """Return the greatest nodes that leaves [first, end) complete by themselves, in leaf order."""
    tree: Tree[None] = Tree(num_leaves, lambda left, right: None)
    for leaf in range(first, end):
        tree.put((0, leaf), None)
    return tuple(sorted(tree.nodes, key=lambda node: node[1] << node[0]))


def meets_in_pairs(frontiers: Sequence[Sequence[Node]]) -> bool:
    """Tell whether adding in pairs of ranks, at distance 1, 2, 4, ... is the rest of the tree.

    It is if every rank has come to one node, all of one level and in the order of the ranks, and
    the ranks are a power of two.
    """
    size = len(frontiers)
    if size & (size - 1) or any(len(nodes) != 1 for nodes in frontiers):
        return False
    level = frontiers[0][0][0]
    return [nodes[0] for nodes in frontiers] == [(level, index) for index in range(size)]
