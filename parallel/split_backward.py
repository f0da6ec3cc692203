"""Split a backward in two: first the gradients of what came in, later those of the weights.

Qi et al., "Zero Bubble Pipeline Parallelism", 2023, section 3. The graph of a stage has nodes that
lead to its input, and some of those have edges to weights as well, such as the product of a linear
layer. The first half runs the nodes on the way to the input and notes the gradient that each such
*fork* gets. The second half runs the forks alone, from the gradients noted, towards their weights:
nothing is computed twice.

Where a fork's edge to the weights ends where another's does, as where two operations in one layer
share a bias, they cannot be told apart, and the second half runs the graph from its end again. A
Python `autograd.Function` computes the gradients of all its arguments in both halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = ["SplitBackward"]

Edge = tuple[Node, int]


class SplitBackward:
    """Run backward from `roots` in two halves.

    door: the node that the tensors which came in have in common.  anchor: the leaf behind it.
    """

    def __init__(
        self, roots: Sequence[Tensor], gradients: Sequence[Tensor], door: Node, anchor: Tensor
    ) -> None:
        self._roots = list(roots)
        self._gradients = list(gradients)
        self._anchor = anchor
        self._starts = [get_gradient_edge(root) for root in roots]
        graph = _Graph([start.node for start in self._starts], door)
        self._forks = graph.forks()
        self._separate = graph.are_separate(self._forks)
        self._leaves = [] if self._separate else graph.leaves()
        self._leads = [graph.leads[start.node] for start in self._starts]
        self._noted: dict[Node, tuple[Tensor | None, ...]] = {}

    @property
    def computes_again(self) -> bool:
        """Tell whether the second half repeats the first, since forks cannot be told apart."""
        return not self._separate

    def to_input(self) -> None:
        """Run the nodes on the way to the input."""
        if not any(self._leads):
            return
        forks = self._forks if self._separate else {}
        handles = [node.register_prehook(self._note(node)) for node in forks]
        try:
            torch.autograd.backward(
                self._roots, self._gradients, retain_graph=True, inputs=[self._anchor]
            )
        finally:
            for handle in handles:
                handle.remove()

    def to_weights(self) -> None:
        """Add to the gradients of the weights; afterwards the graph is used up.

        Of all leaves but the anchor, as a whole backward does: a loss may have some of its own.
        """
        if not self._separate:
            if self._leaves:
                torch.autograd.backward(self._roots, self._gradients, inputs=self._leaves)
            return
        columns = zip(self._starts, self._gradients, self._leads, strict=True)
        ends = [(start, gradient) for start, gradient, leads in columns if not leads]
        for node, edges in self._forks.items():
            noted = [(i, g) for i, g in enumerate(self._noted.pop(node, ())) if g is not None]
            if not noted:
                continue
            targets = [GradientEdge(*edge) for edge in edges]
            found = torch.autograd.grad(
                [GradientEdge(node, i) for i, _ in noted],
                targets,
                [gradient for _, gradient in noted],
                allow_unused=True,
            )
            ends += [(e, g) for e, g in zip(targets, found, strict=True) if g is not None]
        if ends:
            starts, gradients = zip(*ends, strict=True)
            torch.autograd.backward(starts, gradients)

    def _note(self, node: Node) -> Callable[[tuple[Tensor | None, ...]], None]:
        def note(gradients: tuple[Tensor | None, ...]) -> None:
            self._noted[node] = gradients

        return note


class _Graph:
    """What is reachable from some nodes, and which of it leads to the door."""

    def __init__(self, starts: Sequence[Node], door: Node) -> None:
        self.leads: dict[Node, bool] = {door: True}
        self.before: dict[Edge, set[Node]] = {}
        for start in starts:
            self._explore(start)

    def _explore(self, start: Node) -> None:
        # Not recursive: a graph is as deep as the stage has operations.
        pending: list[tuple[Node, bool]] = [(start, False)]
        while pending:
            node, ready = pending.pop()
            if ready:
                self.leads[node] = any(self.leads[after] for after, _ in _edges(node))
                continue
            if node in self.leads:
                continue
            pending.append((node, True))
            for edge in _edges(node):
                after = edge[0]
                self.before.setdefault(edge, set()).add(node)
                if after not in self.leads:
                    pending.append((after, False))

    def forks(self) -> dict[Node, list[Edge]]:
        """Return the nodes that lead to the door and elsewhere, with their edges elsewhere."""
        found: dict[Node, list[Edge]] = {}
        for node, leads in self.leads.items():
            edges = [edge for edge in _edges(node) if not self.leads.get(edge[0], True)]
            if leads and edges:
                found[node] = list(dict.fromkeys(edges))
        return found

    def leaves(self) -> list[Tensor]:
        """Return the tensors whose gradients are accumulated, without what is behind the door."""
        return [n.variable for n in self.leads if n.name().endswith("::AccumulateGrad")]  # type: ignore[attr-defined]

    def are_separate(self, forks: dict[Node, list[Edge]]) -> bool:
        """Tell whether no other node has an edge to where a fork's edges to the weights end."""
        return all(self.before[edge] == {n} for n, edges in forks.items() for edge in edges)


def _edges(node: Node) -> list[Any]:
    return [edge for edge in node.next_functions if edge[0] is not None]
