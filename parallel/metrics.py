"""Add up what only some ranks see, such as right answers on the last stage, for all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .demands import require_comm
from .objects import allgather_objects

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["Metrics"]


class Metrics:
    """Sum named numbers over micro-batches, stages and replicas.

        metrics = Metrics(mesh.comm)

        def loss_fn(output, target):
            metrics.add(right=(output.argmax(1) == target).sum(), rows=len(target))
            return cross_entropy(output, target)

        engine.step(x, y)
        found = metrics.total()             # on every rank
        accuracy = found["right"] / found["rows"]

    Sums and counts, never means: so unequal micro-batches and replicas count by what they hold.
    """

    def __init__(self, comm: Communicator) -> None:
        require_comm(comm)
        self._comm = comm
        self._sums: dict[str, float] = {}

    def add(self, **values: float | Tensor) -> None:
        """Add to this rank's sums; no communication. ValueError for several elements."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ValueError(
                        f"metric {name}: expected one element, got shape {tuple(value.shape)}"
                    )
                value = value.item()
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def total(self) -> dict[str, float]:
        """Return the sums over all ranks since the last call, sorted by name; collective.

        A name that only some ranks have added to counts as 0 on the others. Added in rank order in
        float64: equal to the last bit on all ranks.
        """
        mine, self._sums = self._sums, {}
        total: dict[str, float] = {}
        for sums in allgather_objects(mine, self._comm):
            for name, value in sums.items():
                total[name] = total.get(name, 0.0) + value
        return dict(sorted(total.items()))
