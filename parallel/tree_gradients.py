"""Sum gradients over the micro-batches of the global batch in one fixed tree.

For a fixed number of micro-batches the sum is the same to the last bit however many replicas share
them: each adds what its own micro-batches complete, and the rest of the tree is added between the
replicas, in the same brackets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .sparse import as_dense
from .tree import Tree, frontier, meets_in_pairs

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from ..comm.work import Work

__all__ = ["TreeGradients"]

# Adds in pairs of ranks at distance 1, 2, 4, ...: on a power of two, exactly the upper tree.
_IN_PAIRS = "recursive_doubling"


@dataclass(frozen=True)
class _Group:
    """The parameters of one real dtype: together they are one vector, then a flag for each."""

    dtype: torch.dtype
    indices: tuple[int, ...]


@dataclass
class _Pass:
    """The state of one step."""

    leaves: tuple[range, ...]
    trees: list[Tree[Tensor]]
    before: list[Tensor | None]
    taken: int = 0
    works: list[tuple[Work, Tensor]] | None = None

    @property
    def num_leaves(self) -> int:
        return self.leaves[-1].stop


class TreeGradients:
    """Take every micro-batch's gradients off the parameters, and bring back their sum.

    Per step: `begin`, `take` after each backward, `finish`. The reduction between replicas starts
    with the last `take`. Collective over `comm`, one rank per replica. A parameter without a
    gradient in all micro-batches of all replicas keeps what it had.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], comm: Communicator) -> None:
        self._parameters = list(parameters)
        self._comm = comm
        members: dict[torch.dtype, list[int]] = {}
        for index, parameter in enumerate(self._parameters):
            if parameter.is_floating_point() or parameter.is_complex():
                members.setdefault(parameter.dtype.to_real(), []).append(index)
        self._groups = [_Group(dtype, tuple(indices)) for dtype, indices in members.items()]
        self._pass: _Pass | None = None

    def begin(self, leaves: Sequence[range]) -> None:
        """Begin a step in which replica r has the micro-batches leaves[r] of the global batch.

        The ranges follow each other from 0. Gradients that are there are set aside; `finish` adds
        to them, as backward does.
        """
        self.abandon()
        num_leaves = leaves[-1].stop
        trees = [Tree(num_leaves, lambda a, b: a.add_(b)) for _ in self._groups]
        self._pass = _Pass(tuple(leaves), trees, [p.grad for p in self._parameters])
        self._clear()

    def take(self, microbatch: int) -> None:
        """Take the gradients of this replica's micro-batch off the parameters."""
        current = self._pass
        assert current is not None
        mine = current.leaves[self._comm.rank]
        for group, tree in zip(self._groups, current.trees, strict=True):
            tree.put((0, mine[microbatch]), self._pack(group))
        self._clear()
        current.taken += 1
        if current.taken == len(mine):
            self._start(current)

    def finish(self) -> None:
        """Wait for the sums and add them to the gradients that were there before the step."""
        current = self._pass
        assert current is not None and current.taken == len(current.leaves[self._comm.rank])
        if current.works is None:  # no rows here, but the other replicas count on this one
            self._start(current)
        assert current.works is not None
        in_pairs = meets_in_pairs(self._frontiers(current))
        for place, (work, array) in enumerate(current.works):
            result = work.wait()
            total = array if in_pairs else self._complete(current, result)
            self._unpack(self._groups[place], total, current.before)
        for parameter, gradient in zip(self._parameters, current.before, strict=True):
            parameter.grad = gradient
        self._pass = None

    def abandon(self) -> None:
        """Give the parameters back the gradients from before a step that has failed."""
        if self._pass is not None:
            for parameter, gradient in zip(self._parameters, self._pass.before, strict=True):
                parameter.grad = gradient
            self._pass = None

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _frontiers(self, current: _Pass) -> list[tuple[tuple[int, int], ...]]:
        return [frontier(current.num_leaves, own.start, own.stop) for own in current.leaves]

    def _start(self, current: _Pass) -> None:
        frontiers = self._frontiers(current)
        mine = frontiers[self._comm.rank]
        in_pairs = meets_in_pairs(frontiers)
        width = max(len(nodes) for nodes in frontiers)
        current.works = []
        for group, tree in zip(self._groups, current.trees, strict=True):
            if in_pairs:
                array = tree.nodes[mine[0]]
                work = self._comm.allreduce(array, op="sum", algorithm=_IN_PAIRS, blocking=False)
            else:
                array = torch.zeros(width, self._length(group), dtype=group.dtype)
                for row, node in enumerate(mine):
                    array[row] = tree.nodes[node]
                work = self._comm.allgather(array, blocking=False)
            current.works.append((work, array))

    def _complete(self, current: _Pass, gathered: Any) -> Tensor:
        tree: Tree[Tensor] = Tree(current.num_leaves, lambda a, b: a + b)
        for rows, nodes in zip(torch.as_tensor(gathered), self._frontiers(current), strict=True):
            for row, node in zip(rows, nodes, strict=False):
                tree.put(node, row)
        return tree.total

    def _length(self, group: _Group) -> int:
        members = (self._parameters[index] for index in group.indices)
        return len(group.indices) + sum(p.numel() * (1 + p.is_complex()) for p in members)

    def _pack(self, group: _Group) -> Tensor:
        """Return gradients, zeros for those that are missing, and flags in one vector."""
        pieces = []
        for index in group.indices:
            parameter = self._parameters[index]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            pieces.append(_real(as_dense(gradient.detach())).reshape(-1))
        flags = [float(self._parameters[index].grad is not None) for index in group.indices]
        return torch.cat([*pieces, torch.tensor(flags, dtype=group.dtype)])

    def _unpack(self, group: _Group, total: Tensor, gradients: list[Tensor | None]) -> None:
        flags = total[len(total) - len(group.indices) :]
        place = 0
        for index, flag in zip(group.indices, flags.tolist(), strict=True):
            parameter = self._parameters[index]
            gradient = torch.empty_like(parameter, requires_grad=False)
            real = _real(gradient)
            real.copy_(total[place : place + real.numel()].view(real.shape))
            place += real.numel()
            if flag:
                before = gradients[index]
                gradients[index] = gradient if before is None else before.add_(gradient)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
