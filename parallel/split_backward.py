"""Split a backward in two: first the gradients of what came in, later those of the weights.

Qi et al., "Zero Bubble Pipeline Parallelism", 2023, section 2. The graph of a stage has nodes that
lead to its input, and some of those have edges to weights as well, such as the product of a linear
layer. The first half runs the nodes on the way to the input and notes the gradient that each such
*fork* gets. The second half runs the forks alone, from the gradients noted, towards their weights:
nothing is computed twice. A Python `autograd.Function` computes the gradients of all its arguments
at once, so those of its weights are noted in the first half.

In the second half forks are called, not run by autograd, which would call the hooks on their
outputs a second time; and what they return goes on as the start of a backward of its own, so that
the hooks on weights are called when all that is added up to a weight's gradient is there.

Where autograd would add gradients in another order for this, the second half runs the graph from
its end again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = ["SplitBackward"]

Edge = tuple[Node, int]
Gradients = tuple[Tensor | None, ...]


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
        graph = _Graph(self._starts, door)
        self._separate = graph.adds_in_order()
        self._forks = graph.forks if self._separate else {}
        self._leaves = [] if self._separate else graph.leaves()
        self._leads = [graph.leads[start.node] for start in self._starts]
        self._noted: dict[Node, Gradients] = {}

    @property
    def computes_again(self) -> bool:
        """Tell whether the second half repeats the first, for the order of a sum."""
        return not self._separate

    def to_input(self) -> None:
        """Run the nodes on the way to the input."""
        if not any(self._leads):
            return
        handles = [self._watch(node, edges) for node, edges in self._forks.items()]
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
        ends += self._run_forks()
        if ends:
            starts, gradients = zip(*ends, strict=True)
            torch.autograd.backward(starts, gradients)

    def _watch(self, node: Node, edges: Mapping[int, Edge]) -> Any:
        def note(gradients: Gradients) -> None:
            self._noted[node] = gradients

        def note_found(found: Gradients, _: Gradients) -> None:
            self._noted[node] = tuple(g if i in edges else None for i, g in enumerate(found))

        if _computes_all(node):
            return node.register_hook(note_found)
        return node.register_prehook(note)

    def _run_forks(self) -> list[tuple[GradientEdge, Tensor]]:
        """Return what the forks add to where their edges to weights end, in autograd's order."""
        ends: list[tuple[GradientEdge, Tensor]] = []

        def run() -> None:
            for node in list(self._noted):
                found = self._noted.pop(node)
                if not _computes_all(node):
                    found = _call(node, found)
                for place, edge in self._forks[node].items():
                    if (gradient := found[place]) is not None:
                        ends.append((GradientEdge(*edge), gradient))

        edges = (edge for node in self._noted for edge in self._forks[node].values())
        _run_as_one_task(run, dict.fromkeys(edges))
        return ends


class _Graph:
    """The nodes that are reachable from some edges, and which of them lead to the door.

    forks: nodes that lead to the door and elsewhere; of each, its edges elsewhere by position.
    uses: for each edge, the nodes that it leaves; one that has it twice is there twice.
    """

    def __init__(self, starts: Sequence[GradientEdge], door: Node) -> None:
        self._starts: list[Edge] = [(start.node, start.output_nr) for start in starts]
        self.leads: dict[Node, bool] = {door: True}
        self.uses: dict[Edge, list[Node]] = {}
        for start, _ in self._starts:
            self._explore(start)
        nodes = (node for node in self.leads if node is not door)
        self.forks = {n: edges for n in nodes if (edges := self._edges_elsewhere(n))}

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
                self.uses.setdefault(edge, []).append(node)
                if after not in self.leads:
                    pending.append((after, False))

    def _edges_elsewhere(self, node: Any) -> dict[int, Edge]:
        if not self.leads[node]:
            return {}
        edges = enumerate(node.next_functions)
        return {i: e for i, e in edges if e[0] is not None and not self.leads.get(e[0], True)}

    def leaves(self) -> list[Tensor]:
        """Return the tensors whose gradients are accumulated, without what is behind the door."""
        return [n.variable for n in self.leads if n.name().endswith("::AccumulateGrad")]  # type: ignore[attr-defined]

    def adds_in_order(self) -> bool:
        """Tell whether the two halves add up gradients as a whole backward does.

        Where a fork's edge ends, the halves add the gradients of starts, then those of forks, then
        those of other nodes, as these run. A whole backward runs nodes from the last made to the
        first, forks or not. Which of the first two summands comes first makes no difference.
        """
        for edge in {edge for edges in self.forks.values() for edge in edges.values()}:
            whole = sorted(self.uses[edge], key=_time, reverse=True)
            halves = sorted(whole, key=lambda node: node not in self.forks)
            first = max(2 - self._starts.count(edge), 0)
            if whole[first:] != halves[first:]:
                return False
        return True


def _edges(node: Node) -> list[Any]:
    return [edge for edge in node.next_functions if edge[0] is not None]


def _time(node: Any) -> int:
    number: int = node._sequence_nr()
    return number


def _computes_all(node: Node) -> bool:
    """Tell whether a node is a Python `autograd.Function`, which computes what nobody asks for."""
    return isinstance(node, BackwardCFunction)


def _run_as_one_task(run: Callable[[], None], edges: Iterable[Edge]) -> None:
    """Call `run` within a task of autograd in which nodes compute gradients for `edges` alone.

    One task for all nodes: in each, `torch.utils.checkpoint` recomputes what it has not kept.
    """
    # On the CPU whatever the default, so that `run` is called in this thread, on its streams.
    leaf: Any = torch.empty(0, device="cpu", requires_grad=True)
    leaf.register_hook(lambda _: run())
    wanted: list[Any] = [leaf, *(GradientEdge(*edge) for edge in edges)]
    torch.autograd.grad(leaf, wanted, leaf.detach(), allow_unused=True)


def _call(node: Any, gradients: Gradients) -> Gradients:
    """Call a node on the gradients given to it; return what its own hooks make of the result."""
    found: Gradients = node(*gradients)
    edges = zip(found, node.next_functions, strict=True)
    found = tuple(None if g is None or e[0] is None else _fitted(g, *e) for g, e in edges)
    for hook in _hooks_of(node):
        changed = hook(found, gradients)
        found = found if changed is None else tuple(changed)
    return found


def _fitted(gradient: Tensor, node: Any, output: int) -> Tensor:
    """Sum a gradient over broadcast dimensions, as autograd does between two nodes."""
    shape = torch.Size(node._input_metadata[output].shape)
    return gradient if gradient.shape == shape else gradient.sum_to_size(shape)


def _hooks_of(node: Node) -> list[Callable[[Gradients, Gradients], Gradients | None]]:
    handle: Any = node.register_hook(lambda *_: None)
    hooks = list(handle.hooks_dict_ref().values())
    handle.remove()
    return hooks[:-1]
