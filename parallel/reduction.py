"""One pass of a reducer: buckets leave as their gradients come, and are brought back at its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..comm.timeline import PACK
from .flight import Carrier, Flight, Load
from .weights import is_summed, sum_of_weights

if TYPE_CHECKING:
    from torch import Tensor

    from ..comm.communicator import Communicator
    from ..comm.work import Receipt, Work
    from .bucketing import Bucketing
    from .buckets import Bucket
    from .finite import FiniteCheck
    from .gradients import Gradients
    from .transfer import Finite

__all__ = ["Reduction", "ReductionRecord", "Terms"]


@dataclass(frozen=True)
class ReductionRecord:
    """Tell what one pass did on this rank.

    receipts: of the collectives, bucket by bucket in the order in which they were started.
    bucket_nbytes: bytes that this rank put into the collectives of each bucket, flags included.
    overlapped: how many buckets were started before backward had ended; a small last one never is.
    unused: names of the parameters that had no gradient on this rank.
    partial: names of the parameters that had a gradient on some ranks only; equal on all ranks.
    finite: whether every gradient packed on this rank was finite in the dtype of the wire; None
        where all that were looked at were, but some were reduced where they lay.
    """

    receipts: tuple[Receipt, ...]
    bucket_nbytes: tuple[int, ...]
    overlapped: int
    unused: tuple[str, ...]
    partial: tuple[str, ...]
    finite: bool | None

    @property
    def nbytes(self) -> int:
        """Return the bytes of all buckets."""
        return sum(self.bucket_nbytes)

    @property
    def reductions(self) -> int:
        """Return the number of reductions, one per bucket."""
        return len(self.bucket_nbytes)


@dataclass(frozen=True)
class Terms:
    """What all gradients of a pass are scaled by.

    weight: of this rank in a weighted mean; None for the carrier's own op.
    total: the sum of the ranks' weights, under way.
    loss_scale: what the losses were multiplied by.
    """

    weight: float | None
    total: Work | None
    loss_scale: float

    def settled(self) -> bool:
        """Tell whether `share` would neither wait nor raise."""
        return self.total is None or is_summed(self.total)

    def share(self) -> float | None:
        """Return this rank's part of a weighted mean, when all ranks have told their weights."""
        if self.weight is None or self.total is None:
            return None
        total = sum_of_weights(self.total)
        return self.weight / total if total else 0.0


class Reduction:
    """The state of one pass over the buckets.

    changed: whether this rank has a change to tell; the first bucket carries it.
    held: whether all buckets wait for the end.
    repeated: whether a gradient was accumulated again after it had been ready.
    arrival, times: the gradients that have come, and the seconds from the beginning.
    overlapped: how many buckets were started before the end.
    partial: names of parameters that had a gradient on some ranks only, once they have landed.
    """

    def __init__(
        self,
        comm: Communicator,
        carrier: Carrier,
        gradients: Gradients,
        bucketing: Bucketing,
        terms: Terms,
        *,
        changed: bool,
        held: bool,
        finite: FiniteCheck | None,
    ) -> None:
        self._comm, self._carrier, self._gradients = comm, carrier, gradients
        self._bucketing, self._changed, self._finite = bucketing, changed, finite
        self.terms = terms
        self.held, self.repeated = held, False
        self.arrival: list[int] = []
        self.times: list[float] = []
        self.overlapped = 0
        self.partial: list[str] = []
        self._seen: dict[int, int] = {}
        self._left: list[tuple[int, Tensor, int]] = []
        self._waiting = [len(bucket.indices) for bucket in bucketing.buckets]
        self._begun = time.perf_counter()
        self._flights: list[Flight] = []

    def mark(self, index: int) -> None:
        """Note that a gradient is ready, and start every bucket that is now full.

        Raises: RuntimeError where it is accumulated again although it has left.
        """
        place = self._bucketing.bucket_of.get(index)
        if index in self._seen:
            self.repeated = self.held = True
            if place is not None and place < len(self._flights):
                raise RuntimeError(
                    f"gradient of {self._gradients.names[index]}: accumulated again, in a backward "
                    "within the backward, after it was sent: a layer that several re-entrant "
                    "checkpoints share needs checkpoint(..., use_reentrant=False)"
                )
            return
        self._seen[index] = self._gradients.parameters[index]._version
        self.arrival.append(index)
        self.times.append(time.perf_counter() - self._begun)
        if place is None:
            return
        self._waiting[place] -= 1
        started = len(self._flights)
        eager = 0 if self.held else self._bucketing.eager
        # To wait for weights is for the end: a rank that is in another wrapper's part of the same
        # backward, or in its `reduce_gradients`, tells those of this one only after that.
        while started < eager and self._waiting[started] == 0 and self.terms.settled():
            bucket = self._bucketing.buckets[started]
            self._start(bucket, last=False)
            self._note_left(bucket)
            self.overlapped += 1
            started += 1

    def flush(self) -> None:
        """Start all buckets that have not been started; no more gradients will come.

        Raises: RuntimeError where a parameter was written to after its gradient was ready, or
            where a gradient is gone before it has left, or was changed after.
        """
        self._refuse_written()
        self._start_all(self._bucketing.buckets[len(self._flights) :])

    def land(self) -> bool:
        """Wait for the buckets and bring them back; tell whether any rank has seen a change."""
        counts = self._land(self._flights)
        return counts[0][-1] > 0

    def add(self, buckets: Sequence[Bucket]) -> None:
        """Reduce more buckets in the same pass, after the others have landed."""
        landed = len(self._flights)
        self._start_all(buckets)
        self._land(self._flights[landed:])

    def abandon(self) -> None:
        """Wait for what was started, and leave it."""
        for flight in self._flights:
            flight.rounds.abandon()

    def record(self) -> ReductionRecord:
        """Tell what was done."""
        flights = self._flights
        elsewhere = {self._gradients.names[index] for index in self._gradients.elsewhere}
        return ReductionRecord(
            receipts=tuple(receipt for flight in flights for receipt in flight.receipts),
            bucket_nbytes=tuple(flight.nbytes for flight in flights),
            overlapped=self.overlapped,
            unused=tuple(
                name
                for flight in flights
                for name, gradient in zip(flight.load.names, flight.load.gradients, strict=True)
                if gradient is None and name not in elsewhere
            ),
            partial=tuple(self.partial),
            finite=_all_finite([flight.finite for flight in flights]),
        )

    def _refuse_written(self) -> None:
        known = self._gradients
        for index, version in self._seen.items():
            if known.parameters[index]._version != version:
                raise RuntimeError(
                    f"{known.names[index]} was written to while backward ran, as by a hook that "
                    "steps an optimizer: its gradient was this rank's own. Step when the outermost "
                    "backward has returned, or within no_sync()"
                )
            if known.parameters[index].grad is None:  # what is written by .data has no version
                raise RuntimeError(
                    f"the gradient of {known.names[index]} was there, and is gone before it was "
                    "reduced: a hook has taken it, as one that steps an optimizer, and so this "
                    "rank's own. Take it when the outermost backward has returned, or within "
                    "no_sync()"
                )

        for index, gradient, version in self._left:
            now = known.parameters[index].grad
            if now is not gradient or now._version != version:
                raise RuntimeError(
                    f"the gradient of {known.names[index]} was written to or replaced after it had "
                    "left for the other ranks, as by a hook of a layer. Change it in a hook of the "
                    "parameter (register_post_accumulate_grad_hook), or when the outermost "
                    "backward has returned"
                )

    def _note_left(self, bucket: Bucket) -> None:
        """Note the gradients of a bucket as they are when it has left, while backward goes on."""
        known = self._gradients
        for index in bucket.indices:
            gradient = known.parameters[index].grad
            if gradient is not None and index not in known.elsewhere:
                self._left.append((index, gradient, gradient._version))

    def _start_all(self, buckets: Sequence[Bucket]) -> None:
        for left, bucket in zip(range(len(buckets), 0, -1), buckets, strict=True):
            self._start(bucket, last=left == 1)

    def _start(self, bucket: Bucket, *, last: bool) -> None:
        known = self._gradients
        names = tuple(known.names[index] for index in bucket.indices)
        gradients = [known.of(index) for index in bucket.indices]
        if self._finite is not None:
            gradients = self._finite.look(names, gradients)
        load = Load(
            names=names,
            parameters=[known.parameters[index] for index in bucket.indices],
            gradients=gradients,
            share=self.terms.share(),
            changed=None if self._flights else self._changed,
            loss_scale=self.terms.loss_scale,
        )
        timeline = self._comm.timeline
        if timeline is None:
            self._flights.append(self._carrier.start(bucket, load, last=last))
            return
        label = f"bucket {len(self._flights)}"
        with timeline.span(PACK, label), timeline.labelled(label):
            self._flights.append(self._carrier.start(bucket, load, last=last))

    def _land(self, flights: Sequence[Flight]) -> list[list[float]]:
        """Return on how many ranks the flags of each bucket were set."""
        flying = list(flights)
        while flying:
            flying = [flight for flight in flying if flight.rounds.advance()]
        counts = [flight.counts() for flight in flights]
        for flight, present in zip(flights, counts, strict=True):
            flight.land(present)
            self._gradients.make_sparse(flight.load)
            for name, count in zip(flight.load.names, present, strict=False):
                if 0 < count < self._comm.size:
                    self.partial.append(name)
        return counts


def _all_finite(found: Sequence[Finite]) -> bool | None:
    verdicts = [one() if callable(one) else one for one in found]
    return False if False in verdicts else None if None in verdicts else True
