"""One replica's part of a step: which rows its micro-batches have, and what they weigh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .batch import global_leaves, row_bounds
from .random_keys import Samples

__all__ = ["Share", "share_of"]


@dataclass(frozen=True)
class Share:
    """Hold the micro-batches of one replica, as rows [first, end) of its own batch.

    before: the rows of the global batch before the replica's.
    weights: what a micro-batch's loss counts in the loss of the global batch.
    counts: how many micro-batches each replica has.
    leaves: the micro-batches of the global batch that each replica has, where these are added in a
        tree; else None.
    """

    bounds: tuple[tuple[int, int], ...]
    before: int
    weights: tuple[float, ...]
    counts: tuple[int, ...]
    leaves: tuple[range, ...] | None

    def samples(self, step: int) -> list[Samples]:
        """Return the place of every micro-batch in the global batch of a step."""
        return [Samples(step, self.before + first, end - first) for first, end in self.bounds]


def share_of(
    rows: Sequence[int],
    replica: int,
    microbatches: int,
    *,
    is_mean: bool,
    in_tree: bool,
    meeting: bool,
) -> Share:
    """Cut replica `replica` of batches of these rows.

    ValueError as `global_leaves` has it, and for unequal numbers of micro-batches where layers of
    the replicas are `meeting` in each.
    """
    before, total = sum(rows[:replica]), sum(rows)
    leaves = None
    if in_tree:
        all_bounds, leaves = global_leaves(rows, microbatches)
        mine = all_bounds[leaves[replica].start : leaves[replica].stop]
        bounds = tuple((first - before, end - before) for first, end in mine)
    else:
        bounds = row_bounds(rows[replica], microbatches)
    counts = [min(n, microbatches) for n in rows] if leaves is None else list(map(len, leaves))
    if meeting and len(set(counts)) > 1:
        raise ValueError(
            f"replicas of {list(rows)} rows have {counts} micro-batches, in each of which a layer "
            "such as SyncBatchNorm meets those of the other replicas: expected equal numbers"
        )
    weights = tuple((end - first) / total if is_mean else 1.0 for first, end in bounds)
    return Share(bounds, before, weights, tuple(counts), leaves)
