"""Sum gradients over the micro-batches of the global batch in one fixed tree.

For a fixed number of micro-batches the sum is the same to the last bit however many replicas share
them: each adds what its own micro-batches complete, and the rest of the tree is added between the
replicas, in the same brackets. Halves are added in float32, and rounded once, behind the last
addition: were they rounded at every node, that would be where the reduction between replicas, which
rounds once, does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .gradient_dtype import gradient_dtype, new_gradient
from .sparse import as_dense
from .tensors import real_view
from .tree import Tree, frontier, meets_in_pairs

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from ..comm.work import Work

__all__ = ["TreeGradients"]

# Adds in pairs of ranks at distance 1, 2, 4, ...: on a power of two, exactly the upper tree.
_IN_PAIRS = "recursive_doubling"


@dataclass(frozen=True)
class _Group:
    """The parameters of one part that are added in one dtype: one vector, then a flag for each."""

    part: int
    dtype: torch.dtype
    indices: tuple[int, ...]


@dataclass
class _Pass:
    """The state of one step."""

    leaves: tuple[range, ...]
    trees: list[Tree[Tensor]]
    before: list[Tensor | None]
    taken: dict[int, int]
    works: list[tuple[Work, Tensor]] = field(default_factory=list)

    @property
    def num_leaves(self) -> int:
        return self.leaves[-1].stop


class TreeGradients:
    """Take every micro-batch's gradients off the parameters, and bring back their sum.

    parts: of the parameters, such as the stages of this rank, each of which has backwards of its
        own; the same numbers on every rank of `comm`.

    Per step: `begin`, `take` after each backward, `finish`. The reduction of a part between
    replicas starts with its last `take`, and after that of the parts of higher numbers: in one
    order on every replica. Collective over `comm`, one rank per replica. A parameter without a
    gradient in all micro-batches of all replicas keeps what it had.
    """

    def __init__(self, parts: Mapping[int, Sequence[nn.Parameter]], comm: Communicator) -> None:
        self._comm = comm
        self._parts = sorted(parts, reverse=True)
        self._parameters: list[nn.Parameter] = []
        members: dict[tuple[int, torch.dtype], list[int]] = {}
        for part in self._parts:
            for parameter in parts[part]:
                if parameter.is_floating_point() or parameter.is_complex():
                    key = part, _added_in(gradient_dtype(parameter).to_real())
                    members.setdefault(key, []).append(len(self._parameters))
                self._parameters.append(parameter)
        self._groups = [_Group(*key, tuple(indices)) for key, indices in members.items()]
        self._pass: _Pass | None = None

    def begin(self, leaves: Sequence[range]) -> None:
        """Begin a step in which replica r has the micro-batches leaves[r] of the global batch.

        The ranges follow each other from 0. Gradients that are there are set aside; `finish` adds
        to them, as backward does.
        """
        self.abandon()
        num_leaves = leaves[-1].stop
        trees = [Tree(num_leaves, lambda a, b: a.add_(b)) for _ in self._groups]
        taken = dict.fromkeys(self._parts, 0)
        self._pass = _Pass(tuple(leaves), trees, [p.grad for p in self._parameters], taken)
        self._clear(range(len(self._parameters)))

    def take(self, microbatch: int, part: int) -> None:
        """Take the gradients of this replica's micro-batch off the parameters of one part."""
        current = self._pass
        assert current is not None
        mine = current.leaves[self._comm.rank]
        for group, tree in zip(self._groups, current.trees, strict=True):
            if group.part == part:
                tree.put((0, mine[microbatch]), self._pack(group))
                self._clear(group.indices)
        current.taken[part] += 1
        self._start_complete(current)

    def finish(self) -> None:
        """Wait for the sums and add them to the gradients that were there before the step."""
        current = self._pass
        assert current is not None
        self._start_complete(current)  # no rows here, but the other replicas count on this one
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

    def _clear(self, indices: Iterable[int]) -> None:
        for index in indices:
            self._parameters[index].grad = None

    def _frontiers(self, current: _Pass) -> list[tuple[tuple[int, int], ...]]:
        return [frontier(current.num_leaves, own.start, own.stop) for own in current.leaves]

    def _start_complete(self, current: _Pass) -> None:
        """Start the reductions of all complete groups whose turn has come."""
        wanted = len(current.leaves[self._comm.rank])
        while len(current.works) < len(self._groups):
            place = len(current.works)
            if current.taken[self._groups[place].part] < wanted:
                return
            current.works.append(self._start(current, place))

    def _start(self, current: _Pass, place: int) -> tuple[Work, Tensor]:
        group, tree = self._groups[place], current.trees[place]
        frontiers = self._frontiers(current)
        mine = frontiers[self._comm.rank]
        if meets_in_pairs(frontiers):
            array = tree.nodes[mine[0]]
            work = self._comm.allreduce(array, op="sum", algorithm=_IN_PAIRS, blocking=False)
        else:
            width = max(len(nodes) for nodes in frontiers)
            array = torch.zeros(
                width, self._length(group), dtype=group.dtype, device=self._device(group)
            )
            for row, node in enumerate(mine):
                array[row] = tree.nodes[node]
            work = self._comm.allgather(array, blocking=False)
        return work, array

    def _complete(self, current: _Pass, gathered: Any) -> Tensor:
        tree: Tree[Tensor] = Tree(current.num_leaves, lambda a, b: a + b)
        for rows, nodes in zip(gathered, self._frontiers(current), strict=True):
            for row, node in zip(rows, nodes, strict=False):
                tree.put(node, row)
        return tree.total

    def _length(self, group: _Group) -> int:
        members = (self._parameters[index] for index in group.indices)
        return len(group.indices) + sum(p.numel() * (1 + p.is_complex()) for p in members)

    def _device(self, group: _Group) -> torch.device:
        return self._parameters[group.indices[0]].device

    def _pack(self, group: _Group) -> Tensor:
        """Return gradients, zeros for those that are missing, and flags in one vector."""
        pieces = []
        for index in group.indices:
            parameter = self._parameters[index]
            gradient = parameter.grad
            if gradient is None:
                gradient = new_gradient(parameter).zero_()
            pieces.append(real_view(as_dense(gradient.detach())).reshape(-1))
        flags = [float(self._parameters[index].grad is not None) for index in group.indices]
        # Halves widen on their way into the vector, to the dtype of the flags.
        return torch.cat(
            [*pieces, torch.tensor(flags, dtype=group.dtype, device=self._device(group))]
        )

    def _unpack(self, group: _Group, total: Tensor, gradients: list[Tensor | None]) -> None:
        flags = total[len(total) - len(group.indices) :]
        place = 0
        for index, flag in zip(group.indices, flags.tolist(), strict=True):
            parameter = self._parameters[index]
            gradient = new_gradient(parameter)
            real = real_view(gradient)
            real.copy_(total[place : place + real.numel()].view(real.shape))
            place += real.numel()
            if flag:
                before = gradients[index]
                gradients[index] = gradient if before is None else before.add_(gradient)


def _added_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype
