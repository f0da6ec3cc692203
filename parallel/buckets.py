"""Group gradients into buckets, in the order in which they become ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

__all__ = ["LIMITS", "Bucket", "Member", "Pace", "choose_limit", "finish_time", "plan_buckets"]

LIMITS = tuple(1 << power for power in range(16, 28))
"""Bucket sizes to choose from, in bytes: 64 KiB to 128 MiB."""


@dataclass(frozen=True, slots=True)
class Member:
    """Describe one tensor that goes into a bucket: its elements and the name of their dtype."""

    name: str
    count: int
    dtype: str
    itemsize: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Lay several tensors of one dtype end to end.

    `indices[i]` is the key of a tensor in what was given to `plan_buckets`; its elements lie at
    `offsets[i] : offsets[i] + counts[i]` of the flat bucket of `count` elements.
    """

    indices: tuple[int, ...]
    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    count: int
    dtype: str


def plan_buckets(
    members: Mapping[int, Member], limit_bytes: int, order: Sequence[int] | None = None
) -> tuple[Bucket, ...]:
    """Fill buckets of at most limit_bytes with tensors in their order of readiness.

    `order` lists the keys of `members`, first ready first; without it from the highest to the
    lowest, since backward goes from the last layer to the first. A bucket holds one dtype; a tensor
    above the limit gets a bucket of its own. The buckets come in the order in which they are full.
    Pure: equal arguments give equal buckets on every rank.
    """
    if limit_bytes < 1:
        raise ValueError(f"expected bucket bytes >= 1, got {limit_bytes}")
    order = sorted(members, reverse=True) if order is None else order
    if sorted(order) != sorted(members):
        raise ValueError(f"expected an order of {sorted(members)}, once each, got {list(order)}")
    open_groups: dict[str, list[int]] = {}
    open_bytes: dict[str, int] = {}
    # A bucket may start once its last member is ready: that moment orders the buckets.
    full: list[tuple[int, list[int]]] = []
    position_of = {index: position for position, index in enumerate(order)}
    for index in order:
        member = members[index]
        nbytes = member.count * member.itemsize
        group = open_groups.setdefault(member.dtype, [])
        if group and open_bytes[member.dtype] + nbytes > limit_bytes:
            full.append((position_of[group[-1]], group))
            group = open_groups[member.dtype] = []
        if not group:
            open_bytes[member.dtype] = 0
        group.append(index)
        open_bytes[member.dtype] += nbytes
    full += [(position_of[group[-1]], group) for group in open_groups.values()]
    return tuple(_lay_out(members, group) for _, group in sorted(full))


@dataclass(frozen=True, slots=True)
class Pace:
    """Price a reduction: seconds it takes whatever its size, and seconds for each byte."""

    latency: float
    seconds_per_byte: float


def finish_time(
    buckets: Sequence[Bucket], members: Mapping[int, Member], ready: Mapping[int, float], pace: Pace
) -> float:
    """Return when the last bucket is reduced, in seconds.

    Buckets are reduced one after the other, each from the moment when its last member is ready or
    the bucket before is done: end = max(ready, end of the one before) + latency + bytes *
    seconds_per_byte. ready: the moment of every member.
    """
    end = 0.0
    for bucket in buckets:
        full = max((ready[index] for index in bucket.indices), default=0.0)
        nbytes = sum(members[index].count * members[index].itemsize for index in bucket.indices)
        end = max(end, full) + pace.latency + nbytes * pace.seconds_per_byte
    return end


def choose_limit(
    members: Mapping[int, Member], order: Sequence[int], ready: Mapping[int, float], pace: Pace
) -> int:
    """Return which of LIMITS lets all reductions end first; of equal ones the largest.

    Small buckets start early, large ones pay the latency less often.
    """
    ends = {
        limit: finish_time(plan_buckets(members, limit, order), members, ready, pace)
        for limit in LIMITS
    }
    return min(LIMITS, key=lambda limit: (ends[limit], -limit))


def _lay_out(members: Mapping[int, Member], indices: Sequence[int]) -> Bucket:
    counts = tuple(members[index].count for index in indices)
    *offsets, count = accumulate(counts, initial=0)
    return Bucket(tuple(indices), tuple(offsets), counts, count, members[indices[0]].dtype)
