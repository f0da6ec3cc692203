"""Cut a list of layers into contiguous stages."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["balance", "cut"]


def cut(num_layers: int, num_stages: int, boundaries: Sequence[int]) -> tuple[range, ...]:
    """Return the layers of every stage, given the first layer of every stage but the first.

    `cut(5, 3, [2, 3])` gives layers 0-1, 2 and 3-4. ValueError: wrong number of boundaries, or a
    stage left without layers, which it names.
    """
    if len(boundaries) != num_stages - 1:
        raise ValueError(
            f"expected {num_stages - 1} boundaries for {num_stages} stages, got {list(boundaries)}"
        )
    edges = (0, *map(operator.index, boundaries), num_layers)
    for stage, (first, end) in enumerate(pairwise(edges)):
        if end <= first:
            raise ValueError(
                f"stage {stage} of {num_stages} is left without layers: it would begin at layer "
                f"{first} and end before layer {end} of {num_layers} "
                f"(boundaries {list(boundaries)})"
            )
    return tuple(range(first, end) for first, end in pairwise(edges))


def balance(
    costs: Sequence[float] | Sequence[Sequence[float]], num_stages: int
) -> tuple[range, ...]:
    """Cut so that the most expensive stage is as cheap as possible; no stage is empty.

    costs: of every layer; or of every layer on each stage, (num_stages, num_layers), where a layer
    costs more on one stage than on another.

    Exact. Among the cuts with the same most expensive stage, the one with the smallest sum of
    squared stage costs, and among those the one that cuts earliest. O(num_stages n^2) time.
    ValueError: negative or infinite costs, or fewer layers than stages.
    """
    if num_stages < 1:
        raise ValueError(f"expected at least 1 stage, got {num_stages}")
    values = np.asarray(costs, dtype=np.float64)
    if values.ndim < 2:
        values = np.broadcast_to(values, (num_stages, values.size))
    if len(values) != num_stages:
        raise ValueError(f"expected costs for {num_stages} stages, got {len(values)} rows")
    num_layers = values.shape[1]
    if num_layers < num_stages:
        raise ValueError(
            f"stage {num_layers} of {num_stages} is left without layers: there are only "
            f"{num_layers} layers"
        )
    if not np.all(np.isfinite(values)) or np.any(values < 0):
        raise ValueError(f"expected finite costs >= 0, got {list(costs)}")
    totals = np.concatenate((np.zeros((num_stages, 1)), np.cumsum(values, axis=1)), axis=1)
    limit = _bottleneck(totals)
    return cut(num_layers, num_stages, _even_cuts(totals, limit))


def _bottleneck(totals: NDArray[np.float64]) -> float:
    """Return the smallest possible cost of the most expensive of the stages, none empty.

    totals: per stage, of the first 0, 1, 2, ... layers.
    """
    best = totals[0].copy()
    best[0] = np.inf
    for stage, total in enumerate(totals[1:], 1):
        longer = np.full_like(best, np.inf)
        for end in range(stage + 1, len(total)):
            firsts = np.arange(stage, end)
            longer[end] = np.min(np.maximum(best[firsts], total[end] - total[firsts]))
        best = longer
    return float(best[-1])


def _even_cuts(totals: NDArray[np.float64], limit: float) -> list[int]:
    """Return the boundaries of least summed squares among those whose stages stay within limit."""
    squares = np.where(totals[0] <= limit, totals[0] ** 2, np.inf)
    squares[0] = np.inf
    choices = []
    for stage, total in enumerate(totals[1:], 1):
        longer = np.full_like(squares, np.inf)
        choice = np.zeros(len(total), dtype=np.int64)
        for end in range(stage + 1, len(total)):
            firsts = np.arange(stage, end)
            costs = total[end] - total[firsts]
            sums = np.where(costs <= limit, squares[firsts] + costs**2, np.inf)
            pick = int(np.argmin(sums))
            longer[end], choice[end] = sums[pick], firsts[pick]
        squares = longer
        choices.append(choice)
    boundaries = [totals.shape[1] - 1]
    for choice in reversed(choices):
        boundaries.append(int(choice[boundaries[-1]]))
    return boundaries[:0:-1]
