"""Sets of moments, as sorted intervals (start, end) that do not touch."""

from __future__ import annotations

from collections.abc import Iterable

Intervals = list[tuple[float, float]]


def union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """Return the moments of all intervals."""
    merged: Intervals = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif end > start:
            merged.append((start, end))
    return merged


def length(intervals: Intervals) -> float:
    """Return how long they last together."""
    return sum(end - start for start, end in intervals)


def common(first: Intervals, second: Intervals) -> Intervals:
    """Return the moments that both have."""
    found: Intervals = []
    i = j = 0
    while i < len(first) and j < len(second):
        start = max(first[i][0], second[j][0])
        end = min(first[i][1], second[j][1])
        if start < end:
            found.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(first: Intervals, second: Intervals) -> Intervals:
    """Return the moments of the first that the second lacks."""
    left: Intervals = []
    for start, end in first:
        for low, high in second:
            if low < end and high > start:
                if low > start:
                    left.append((start, low))
                start = max(start, high)
        if start < end:
            left.append((start, end))
    return left
