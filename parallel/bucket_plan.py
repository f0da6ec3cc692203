"""The buckets that the ranks reduce, as passes teach when gradients arrive and what reducing costs.

Every change is the same on all ranks: where rank 0 has measured something, its choice is sent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .bucketing import Bucketing, Describe, arrived, lay_out, limit_for
from .buckets import Bucket, Pace, plan_buckets
from .carried import Layout

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["START_BYTES", "BucketPlan"]

START_BYTES = 4 << 20

# Bytes of the allreduces that are timed, and how often each is.
_SMALL, _LARGE = 8, 1 << 20
_TRIES = 4


class BucketPlan:
    """Lay parameters out in buckets, anew when something has been learnt.

    bucket_bytes: how much is reduced at once, in bytes of the gradients themselves; None to choose
        it by when the gradients arrived in the first passes, and what reductions cost then.
    bucketing: what a pass follows.
    arrival_known: whether a pass has told the order of arrival.
    """

    def __init__(
        self,
        comm: Communicator,
        describe: Describe,
        trainable: tuple[bool, ...],
        bucket_bytes: int | None,
    ) -> None:
        self._comm, self._describe = comm, describe
        self._chooses_size = bucket_bytes is None
        self._size_known = not self._chooses_size
        self.bucket_bytes = START_BYTES if bucket_bytes is None else bucket_bytes
        self.arrival_known = False
        self.bucketing: Bucketing = self._lay_out(trainable, None)

    def learn(self, arrival: Sequence[int], times: Sequence[float]) -> bool:
        """Follow what a pass has shown; tell whether the buckets are others now.

        arrival: parameters, in the order of their gradients.  times: seconds at which they came.
        """
        if not self.arrival_known:
            self.arrival_known = True
            return self._follow_arrival(arrival)
        if not self._size_known:
            self._size_known = True
            self._follow_times(arrival, times)
            return True
        return False

    def change(self, trainable: tuple[bool, ...]) -> tuple[Bucket, ...]:
        """Reduce these parameters from now on; return buckets of those that were not before."""
        before = self.bucketing.trainable
        late = {
            index: self._describe(index)
            for index, flag in enumerate(trainable)
            if flag and not before[index]
        }
        self.bucketing = self._lay_out(trainable, None)
        self.arrival_known = False
        return plan_buckets(late, self.bucket_bytes)

    def layout(self, names: str) -> Layout:
        """Return what the next pass follows, as data; names: digest of the parameters' names."""
        return Layout(
            names,
            tuple(self.bucketing.chosen),
            self.bucketing.order,
            self.arrival_known,
            self.bucket_bytes if self._chooses_size and self._size_known else None,
        )

    def follow(self, layout: Layout) -> None:
        """Go on from a layout of the same parameters; alike on all ranks."""
        if self._chooses_size:
            self._size_known = layout.limit is not None
            self.bucket_bytes = START_BYTES if layout.limit is None else layout.limit
        chosen = set(layout.trainable)
        trainable = tuple(index in chosen for index in range(len(self.bucketing.trainable)))
        self.bucketing = self._lay_out(trainable, layout.order)
        self.arrival_known = layout.arrived

    def _lay_out(self, trainable: tuple[bool, ...], order: Sequence[int] | None) -> Bucketing:
        return lay_out(self._describe, trainable, order, self.bucket_bytes)

    def _follow_arrival(self, arrival: Sequence[int]) -> bool:
        """Lay the buckets out anew, in the order in which rank 0 saw the gradients arrive."""
        if len(self.bucketing.buckets) < 2:
            return False
        order = np.array(arrived(self.bucketing, arrival), dtype=np.int64)
        self._comm.broadcast(order, root=0)
        self.bucketing = self._lay_out(self.bucketing.trainable, order.tolist())
        return True

    def _follow_times(self, arrival: Sequence[int], times: Sequence[float]) -> None:
        """Choose the size of the buckets by rank 0's times of a pass, the first being untypical."""
        pace = _measure_pace(self._comm)
        order = arrived(self.bucketing, arrival)
        when = dict(zip(arrival, times, strict=True))
        plan = np.array([limit_for(self._describe, order, when, pace), *order], dtype=np.int64)
        self._comm.broadcast(plan, root=0)
        self.bucket_bytes, *order = plan.tolist()
        self.bucketing = self._lay_out(self.bucketing.trainable, order)


def _measure_pace(comm: Communicator) -> Pace:
    """Time a small and a large allreduce, the best of a few; collective, some milliseconds."""
    seconds = {}
    for nbytes in (_SMALL, _LARGE):
        x = np.zeros(nbytes // 4, dtype=np.float32)
        tries = []
        for _ in range(_TRIES):
            comm.barrier()
            start = time.perf_counter()
            comm.allreduce(x)
            tries.append(time.perf_counter() - start)
        seconds[nbytes] = min(tries)
    slope = (seconds[_LARGE] - seconds[_SMALL]) / (_LARGE - _SMALL)
    return Pace(seconds[_SMALL], max(slope, 0.0))
