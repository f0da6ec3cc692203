"""How a step of a pipeline adds gradients and losses, over micro-batches and over replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .batch import clone_tensors
from .reduction import ReductionRecord
from .tree import sum_in_tree

if TYPE_CHECKING:
    from .mesh import Mesh
    from .reducer import Reducer
    from .share import Share
    from .stage_worker import Batch
    from .tree_gradients import TreeGradients

__all__ = ["Added", "InBuckets", "InTree"]


@dataclass(frozen=True)
class Added:
    """What all ranks know after a step.

    loss: of the global batch.
    failed: number of ranks where a stage failed.
    changed: number of ranks whose buffers changed shape.
    reduction: of the gradients over replicas in buckets; None in a tree, and with one replica.
    """

    loss: float
    failed: float
    changed: float
    reduction: ReductionRecord | None


class InBuckets:
    """Gradients as they come, in buckets over the replicas while backward goes on."""

    in_tree = False

    def __init__(self, mesh: Mesh, reducer: Reducer) -> None:
        self._mesh, self._reducer = mesh, reducer
        # The mean over replicas of gradients that are each multiplied by their number is the
        # sum, and it leaves equal gradients of earlier steps as they are.
        self.factor = float(mesh.data.size)

    def begin(self, share: Share, batch: Batch) -> None:
        """Begin a step."""
        if self._reducer.active:
            self._reducer.abandon()
        self._reducer.follow_swaps()

    def finish(self, losses: Mapping[int, float], failed: bool, changed: bool) -> Added:
        """End it, with this rank's weighed losses by micro-batch; collective."""
        total = np.array([sum(losses.values()), failed, changed], np.float64)
        work = self._mesh.comm.allreduce(total, op="sum", blocking=False)
        reduction = self._reduce() if self._mesh.data.size > 1 else None
        loss, num_failed, num_changed = map(float, work.wait())
        return Added(loss, num_failed, num_changed, reduction)

    def _reduce(self) -> ReductionRecord:
        if not self._reducer.active:  # no rows here, but the other replicas count on this one
            self._reducer.begin()
            self._reducer.flush()
        return self._reducer.finish()


class InTree:
    """The micro-batches of all replicas in one fixed binary tree."""

    in_tree = True
    factor = 1.0

    def __init__(self, mesh: Mesh, gradients: TreeGradients) -> None:
        self._mesh, self._gradients = mesh, gradients
        self._leaves: Sequence[range] = ()

    def begin(self, share: Share, batch: Batch) -> None:
        """Begin a step."""
        assert share.leaves is not None
        self._leaves = share.leaves
        # Elsewhere a slice begins at another alignment, which matrix products may depend on.
        batch.inputs = [clone_tensors(value) for value in batch.inputs]
        batch.targets = [clone_tensors(value) for value in batch.targets]
        self._gradients.begin(share.leaves)

    def finish(self, losses: Mapping[int, float], failed: bool, changed: bool) -> Added:
        """End it, with this rank's weighed losses by micro-batch; collective."""
        values = np.zeros(self._leaves[-1].stop + 2, np.float64)
        values[-2:] = failed, changed
        for microbatch, value in losses.items():
            values[self._leaves[self._mesh.data.rank][microbatch]] = value
        # One rank has each of them, and the others a zero: every order of adding is the same.
        self._mesh.comm.allreduce(values, op="sum")
        *summed, num_failed, num_changed = values.tolist()
        self._gradients.finish()
        return Added(sum_in_tree(summed), num_failed, num_changed, None)
