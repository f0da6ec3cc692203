"""Cut a batch into micro-batches along the first dimension, and join results again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..comm import chunks
from .structure import put_together, take_apart
from .tensors import overlaps

__all__ = [
    "clone_tensors",
    "count_rows",
    "global_leaves",
    "join_rows",
    "row_bounds",
    "split_batch",
    "split_rows",
]


def row_bounds(rows: int, num_microbatches: int) -> tuple[tuple[int, int], ...]:
    """Return [first, end) of every micro-batch: at most num_microbatches, none empty.

    As equal as possible, the longer ones in front: 8 rows in 3 are 3, 3 and 2; 2 rows in 3 are 1
    and 1.
    """
    count = min(rows, num_microbatches)
    return tuple(chunks.bounds(rows, count, part) for part in range(count))


def global_leaves(
    rows: Sequence[int], num_microbatches: int
) -> tuple[tuple[tuple[int, int], ...], tuple[range, ...]]:
    """Cut the global batch into micro-batches, and deal them to the replicas.

    rows: of every replica; their batches, end to end, are the global batch. Returns [first, end) of
    every micro-batch of the global batch, as `row_bounds` has it, and the range of them that each
    replica holds. ValueError where a micro-batch would lie on two replicas.
    """
    bounds = row_bounds(sum(rows), num_microbatches)
    firsts = {first: place for place, (first, _) in enumerate(bounds)}
    firsts[sum(rows)] = len(bounds)
    edges = [sum(rows[:replica]) for replica in range(len(rows) + 1)]
    for replica, edge in enumerate(edges):
        if edge not in firsts:
            raise ValueError(
                f"the {len(bounds)} micro-batches of a global batch of {sum(rows)} rows cannot be "
                f"dealt to replicas of {list(rows)} rows: replica {replica} begins at row {edge}, "
                "within a micro-batch"
            )
    places = [firsts[edge] for edge in edges]
    return bounds, tuple(range(a, b) for a, b in pairwise(places))


def count_rows(value: Any, where: str) -> int:
    """Return the length of the first dimension that all tensors of a nested batch share.

    Tensors of no dimension, None and plain values belong to every row. ValueError if the tensors
    differ, or if there is none; `where` names the batch in the error.
    """
    _, tensors = take_apart(value, where)
    lengths = [tensor.shape[0] for tensor in tensors if tensor.dim() > 0]
    if not lengths:
        raise ValueError(f"{where}: expected a tensor with rows, got none")
    if len(set(lengths)) > 1:
        raise ValueError(f"{where}: expected tensors with equal numbers of rows, got {lengths}")
    return lengths[0]


def split_rows(value: Any, bounds: Sequence[tuple[int, int]]) -> list[Any]:
    """Return the micro-batches, as views; what has no rows goes into every one.

    Layers and losses may change one in place, as they may the whole: others that wait for their
    backward do not count as changed. But for tensors that have memory in common.
    """
    description, tensors = take_apart(value, "batch")
    uses = Counter(map(_storage, tensors))
    cuts = [
        _cut_apart if uses[_storage(t)] == 1 and not (t.requires_grad or overlaps(t)) else _cut
        for t in tensors
    ]
    return [
        put_together(
            description.skeleton, [cut(t, *part) for cut, t in zip(cuts, tensors, strict=True)]
        )
        for part in bounds
    ]


def split_batch(x: Any, y: Any, bounds: Sequence[tuple[int, int]]) -> tuple[list[Any], list[Any]]:
    """Return the micro-batches of inputs and of targets, which may have memory in common."""
    parts = split_rows((x, y), bounds)
    return [part for part, _ in parts], [part for _, part in parts]


def clone_tensors(value: Any, where: str = "batch") -> Any:
    """Return the nested value with tensors in memory of their own."""
    description, tensors = take_apart(value, where)
    return put_together(description.skeleton, [tensor.clone() for tensor in tensors])


def join_rows(values: Sequence[Any], where: str) -> Any:
    """Return one nested value whose tensors are those of the parts, end to end.

    ValueError if the parts differ in structure, or hold a tensor without rows.
    """
    apart = [take_apart(value, where) for value in values]
    skeletons = {description.skeleton for description, _ in apart}
    if len(skeletons) != 1:
        raise ValueError(f"{where}: the structure differs between micro-batches")
    columns = zip(*(tensors for _, tensors in apart), strict=True)
    return put_together(skeletons.pop(), [_join(column, where) for column in columns])


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _cut(tensor: Tensor, first: int, end: int) -> Tensor:
    return tensor[first:end] if tensor.dim() > 0 else tensor


def _cut_apart(tensor: Tensor, first: int, end: int) -> Tensor:
    """Return a part with a count of its own of what is changed in place; see `split_rows`."""
    return tensor[first:end].data if tensor.dim() > 0 else tensor


def _join(column: Sequence[Tensor], where: str) -> Tensor:
    if len(column) == 1:
        return column[0]
    if any(tensor.dim() == 0 for tensor in column):
        raise ValueError(f"{where}: a tensor of no dimension cannot be joined over micro-batches")
    return torch.cat(list(column))
