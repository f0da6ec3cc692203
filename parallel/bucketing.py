"""Which parameters are reduced, and in which buckets: what the ranks agree on from pass to pass.

Pure: equal arguments give equal answers on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .buckets import Bucket, Member, Pace, choose_limit, plan_buckets

__all__ = ["Bucketing", "Describe", "arrived", "lay_out", "limit_for"]

SMALL = 1024
"""Up to so many elements the last bucket waits for the end of backward."""

Describe = Callable[[int], Member]
"""Return what a bucket needs to know of the parameter at an index."""


@dataclass(frozen=True)
class Bucketing:
    """What a pass follows; parameters are known by their indices.

    trainable: of every parameter, whether it is reduced.
    buckets: in the order in which they are started.
    bucket_of: the position of each reduced parameter's bucket.
    order: in which the gradients arrive, None before that is known.
    """

    trainable: tuple[bool, ...]
    buckets: tuple[Bucket, ...]
    bucket_of: Mapping[int, int]
    order: tuple[int, ...] | None

    @cached_property
    def eager(self) -> int:
        """Return how many buckets are started as soon as they are full.

        A small last one is not: backward has little left to do, and to wait for a work costs more
        than to reduce so few elements at once.
        """
        return len(self.buckets) - (self.buckets[-1].count <= SMALL)

    @property
    def chosen(self) -> list[int]:
        """Return the parameters that are reduced."""
        return _chosen(self.trainable)


def lay_out(
    describe: Describe, trainable: tuple[bool, ...], order: Sequence[int] | None, limit: int
) -> Bucketing:
    """Lay the trainable parameters out in buckets of at most `limit` bytes."""
    members = {index: describe(index) for index in _chosen(trainable)}
    # Without a parameter there is still a bucket, to carry the flag of a change.
    buckets = plan_buckets(members, limit, order) or (Bucket((), (), (), 0, "float32"),)
    bucket_of = {i: place for place, bucket in enumerate(buckets) for i in bucket.indices}
    return Bucketing(trainable, buckets, bucket_of, None if order is None else tuple(order))


def arrived(bucketing: Bucketing, arrival: Sequence[int]) -> list[int]:
    """Return the order of all reduced parameters: as they arrived, then those that did not."""
    seen = set(arrival)
    first = [index for index in arrival if index in bucketing.bucket_of]
    return first + [index for index in reversed(bucketing.chosen) if index not in seen]


def limit_for(
    describe: Describe, order: Sequence[int], when: Mapping[int, float], pace: Pace
) -> int:
    """Return the size of buckets with which all reductions end first.

    order: all reduced parameters.  when: seconds at which gradients arrived; the others come last.
    """
    last = max(when.values(), default=0.0)
    members = {index: describe(index) for index in order}
    return choose_limit(members, order, {index: when.get(index, last) for index in order}, pace)


def _chosen(trainable: Sequence[bool]) -> list[int]:
    return [index for index, flag in enumerate(trainable) if flag]
