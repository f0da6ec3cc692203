"""Reduce gradients over ranks, bucket by bucket, while backward still computes the others.

One pass reduces every gradient once: `begin`, then `mark` for every gradient that is ready, `flush`
when no more will come, `finish` to wait and to bring the results back.

Ranks start the same buckets in the same order whatever the arrival of their gradients. With its
elements a bucket carries one flag per parameter, set where this rank has a gradient: a parameter
with a gradient on some ranks only is averaged with zeros for the others, and one with none stays
without. The first bucket carries one flag more, set when `requires_grad` has changed on this rank
since the ranks last agreed on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..comm.timeline import PACK
from .bucketing import Bucketing, arrived, buckets_of, lay_out, limit_for
from .buckets import Bucket, Member
from .carried import Carried, Layout, digest_of, placed, stateful
from .finite import FiniteCheck
from .flight import Flight, Load, carrier_of
from .hooks import WireHook, wire_format
from .pace import measure_pace
from .replicas import check_equal, dtype_name, member_of
from .transfer import Finite
from .weights import begin_weighing, sum_of_weights

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from ..comm.communicator import Communicator
    from ..comm.work import Receipt, Work
    from .loss_scale import LossScaler

__all__ = ["START_BYTES", "ReadyHook", "Reducer", "ReductionRecord"]

START_BYTES = 4 << 20


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
class ReadyHook:
    """What a reducer hangs on a parameter."""

    on_ready: Callable[[int], None]
    index: int

    def __call__(self, parameter: Tensor) -> None:
        self.on_ready(self.index)


def _may_be_trained(parameter: Tensor) -> bool:
    number = parameter.is_floating_point() or parameter.is_complex()
    return number and (parameter.requires_grad or not parameter.is_inference())


def _all_finite(found: Sequence[Finite]) -> bool | None:
    verdicts = [one() if callable(one) else one for one in found]
    return False if False in verdicts else None if None in verdicts else True


@dataclass
class _Pass:
    """The state of one pass."""

    waiting: list[int]
    changed: bool
    weight: float | None
    total: Work | None
    loss_scale: float
    seen: set[int] = field(default_factory=set)
    held: bool = False
    begun: float = field(default_factory=time.perf_counter)
    arrival: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)
    overlapped: int = 0
    partial: list[str] = field(default_factory=list)


class Reducer:
    """Reduce the gradients of named parameters over a communicator.

    op: "mean", or "sum" for gradients that are already scaled.
    bucket_bytes: how much is reduced at once, in bytes of the gradients themselves; None to plan
        it by when the gradients arrived in the first passes, and what reductions cost then.
    wire: how gradients travel, as `hooks.wire_format` reads it.
    sparse: parameters whose gradient is made sparse on a rank that had none; those that have had a
        sparse one are known to be.
    finite: what looks at gradients before they leave; the bad ones stay here.
    loss_scaler: what has scaled the losses, for a wire hook that keeps errors.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        comm: Communicator,
        *,
        op: str,
        bucket_bytes: int | None,
        wire: str | WireHook | None,
        sparse: Iterable[nn.Parameter] = (),
        finite: FiniteCheck | None = None,
        loss_scaler: LossScaler | None = None,
    ) -> None:
        self._finite = finite
        self._loss_scaler = loss_scaler
        self.wire = wire_format(wire)
        self._carrier = carrier_of(self.wire, comm, op)
        self._names = [name for name, _ in named]
        self._digest = digest_of(self._names)
        self._parameters = [parameter for _, parameter in named]
        self._sparse = set(sparse)
        self._dtypes = [parameter.dtype for _, parameter in named]
        self._comm = comm
        self._elsewhere: frozenset[int] = frozenset()
        self.bucket_bytes = START_BYTES if bucket_bytes is None else bucket_bytes
        self._chooses_size = bucket_bytes is None
        self._size_known = not self._chooses_size
        self._layout = self._lay_out(self._trainable(), order=None)
        self._arrival_known = False
        self._repeated = False
        self._pass: _Pass | None = None
        self._handles: list[RemovableHandle] = []
        self.last: ReductionRecord | None = None

    def attach(self, on_ready: Callable[[int], None]) -> None:
        """Call on_ready(index) whenever backward has accumulated a parameter's gradient."""
        for index, parameter in enumerate(self._parameters):
            if not _may_be_trained(parameter):
                continue
            # A frozen parameter takes no hook, but it keeps one when it is frozen and unfrozen.
            frozen = not parameter.requires_grad
            parameter.requires_grad_(True)
            hook = ReadyHook(on_ready, index)
            handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._handles.append(handle)
            if frozen:
                parameter.requires_grad_(False)

    def detach(self) -> None:
        """Take the hooks off the parameters."""
        while self._handles:
            self._handles.pop().remove()

    @property
    def single(self) -> bool:
        """Tell whether there is one rank only, whose gradients are what they are."""
        return self._comm.size == 1

    def unaware_of(self, scaler: LossScaler) -> Sequence[nn.Parameter]:
        """Return the parameters whose errors would stay in the units of a factor that changes."""
        keeps = stateful(self.wire.hook) is not None
        return self._parameters if keeps and self._loss_scaler is not scaler else ()

    @property
    def active(self) -> bool:
        """Tell whether a pass has begun and not finished."""
        return self._pass is not None

    def begin(self, weight: float | None = None, elsewhere: frozenset[int] = frozenset()) -> None:
        """Begin a pass; collective, as all of a pass is.

        weight: the result is sum(weight * gradient) / sum(weight) over the ranks instead of the op;
            a rank of weight 0 adds nothing, whatever its gradients hold.
        elsewhere: the indices of parameters that another reducer has in its pass.
        """
        assert self._pass is None
        if elsewhere - self._elsewhere:
            self._carrier.forget()  # what another reduces now may lie in this one's memory
        self._elsewhere = elsewhere
        self._pass = _Pass(
            waiting=[len(bucket.indices) for bucket in self._layout.buckets],
            changed=self._trainable() != self._layout.trainable,
            weight=weight,
            total=None if weight is None else begin_weighing(self._comm, weight),
            loss_scale=1.0 if self._loss_scaler is None else self._loss_scaler.turn_factor,
        )

    def mark(self, index: int, *, nested: bool = False) -> None:
        """Note that a gradient is ready, and start every bucket that is now full.

        nested: whether backwards within the backward may accumulate it again. All buckets wait for
            the end then, in a first pass; in later ones if one has been.

        Raises: RuntimeError where it is accumulated again although it has left.
        """
        current = self._pass
        assert current is not None
        if index in current.seen:
            self._repeat(current, index)
            return
        if self._repeated or (nested and not self._arrival_known):
            current.held = True
        current.seen.add(index)
        current.arrival.append(index)
        current.times.append(time.perf_counter() - current.begun)
        place = self._layout.bucket_of.get(index)
        if place is None:
            return
        current.waiting[place] -= 1
        started = len(current.flights)
        eager = 0 if current.held else self._layout.eager
        while started < eager and current.waiting[started] == 0:
            self._start(current, self._layout.buckets[started], last=False)
            current.overlapped += 1
            started += 1

    def _repeat(self, current: _Pass, index: int) -> None:
        """Let a gradient that has not left be accumulated again, in this pass and those to come."""
        self._repeated = current.held = True
        place = self._layout.bucket_of.get(index)
        if place is not None and place < len(current.flights):
            raise RuntimeError(
                f"gradient of {self._names[index]}: accumulated again, in a backward within the "
                "backward, after it was sent: a layer that several re-entrant checkpoints share "
                "needs checkpoint(..., use_reentrant=False)"
            )

    def flush(self) -> None:
        """Start all buckets that have not been started; no more gradients will come."""
        current = self._pass
        assert current is not None
        self._start_all(current, self._layout.buckets[len(current.flights) :])

    def finish(self) -> ReductionRecord:
        """Wait for all buckets; the results are the gradients then.

        ValueError on every rank if `requires_grad` has changed on some ranks only.
        """
        current = self._pass
        assert current is not None
        self._pass = None
        changed = self._land(current)
        if changed:
            self._agree_again(current)
        elif not self._arrival_known:
            self._follow_arrival(current)
        elif not self._size_known:
            self._follow_times(current)
        flights = current.flights
        elsewhere = {self._names[index] for index in self._elsewhere}
        self.last = ReductionRecord(
            receipts=tuple(receipt for flight in flights for receipt in flight.receipts),
            bucket_nbytes=tuple(flight.nbytes for flight in flights),
            overlapped=current.overlapped,
            unused=tuple(
                name
                for flight in flights
                for name, gradient in zip(flight.load.names, flight.load.gradients, strict=True)
                if gradient is None and name not in elsewhere
            ),
            partial=tuple(current.partial),
            finite=_all_finite([flight.finite for flight in flights]),
        )
        return self.last

    def abandon(self) -> None:
        """Give up a pass whose backward has failed; wait for what was started."""
        current, self._pass = self._pass, None
        if self._finite is not None:
            self._finite.forget()
        if current is not None:
            for flight in current.flights:
                flight.rounds.abandon()

    def carried(self, steps: int) -> Carried:
        """Return what the next pass depends on besides the gradients; not copied."""
        limit = self.bucket_bytes if self._chooses_size and self._size_known else None
        hook = stateful(self.wire.hook)
        return Carried(
            names=tuple(self._names),
            rank=self._comm.rank,
            size=self._comm.size,
            steps=steps,
            layout=Layout(
                self._digest,
                tuple(self._layout.chosen),
                self._layout.order,
                self._arrival_known,
                limit,
            ),
            wire="" if hook is None else type(hook).__name__,
            hook={} if hook is None else dict(hook.state_dict()),
            sparse=tuple(
                name
                for name, parameter in zip(self._names, self._parameters, strict=True)
                if parameter in self._sparse
            ),
        )

    def carry_on(self, carried: Carried) -> None:
        """Go on from what a reducer of the same parameters carried; alike on all ranks."""
        hook = stateful(self.wire.hook)
        if hook is not None:
            devices = {n: p.device for n, p in zip(self._names, self._parameters, strict=True)}
            hook.load_state_dict(placed(carried.hook, devices))
        sparse = set(carried.sparse)
        self._sparse |= {
            p for name, p in zip(self._names, self._parameters, strict=True) if name in sparse
        }
        layout = carried.layout
        if layout is None:
            return
        if self._chooses_size:
            self._size_known = layout.limit is not None
            self.bucket_bytes = START_BYTES if layout.limit is None else layout.limit
        chosen = set(layout.trainable)
        trainable = tuple(index in chosen for index in range(len(self._names)))
        self._layout = self._lay_out(trainable, layout.order)
        self._arrival_known = layout.arrived
        self._carrier.forget()

    def _trainable(self) -> tuple[bool, ...]:
        flags = [parameter.requires_grad for parameter in self._parameters]
        for index in self._elsewhere:
            flags[index] = False
        return tuple(flags)

    def _lay_out(self, trainable: tuple[bool, ...], order: Sequence[int] | None) -> Bucketing:
        return lay_out(self._describe, trainable, order, self.bucket_bytes)

    def _describe(self, index: int) -> Member:
        return member_of(self._names[index], self._parameters[index])

    def _start_all(self, current: _Pass, buckets: Sequence[Bucket]) -> None:
        """Start what is left of a pass."""
        for left, bucket in zip(range(len(buckets), 0, -1), buckets, strict=True):
            self._start(current, bucket, last=left == 1)

    def _start(self, current: _Pass, bucket: Bucket, *, last: bool) -> None:
        names = tuple(self._names[index] for index in bucket.indices)
        gradients = [self._gradient(index) for index in bucket.indices]
        if self._finite is not None:
            gradients = self._finite.look(names, gradients)
        load = Load(
            names=names,
            parameters=[self._parameters[index] for index in bucket.indices],
            gradients=gradients,
            share=self._share(current),
            changed=None if current.flights else current.changed,
            loss_scale=current.loss_scale,
        )
        timeline = self._comm.timeline
        if timeline is None:
            current.flights.append(self._carrier.start(bucket, load, last=last))
            return
        label = f"bucket {len(current.flights)}"
        with timeline.span(PACK, label), timeline.labelled(label):
            current.flights.append(self._carrier.start(bucket, load, last=last))

    def _share(self, current: _Pass) -> float | None:
        if current.weight is None or current.total is None:
            return None
        total = sum_of_weights(current.total)
        return current.weight / total if total else 0.0

    def _gradient(self, index: int) -> Tensor | None:
        if index in self._elsewhere:
            return None
        parameter = self._parameters[index]
        gradient = parameter.grad
        if gradient is not None and gradient.layout == torch.sparse_coo:
            self._sparse.add(parameter)
        if gradient is not None and gradient.dtype != self._dtypes[index]:
            raise TypeError(
                f"gradient of {self._names[index]}: "
                f"expected {dtype_name(self._dtypes[index])}, got "
                f"{dtype_name(gradient.dtype)}: change the dtype of a module before wrapping it"
            )
        return gradient

    def _land(self, current: _Pass) -> bool:
        """Wait for the flights and unpack them; tell whether any rank has seen a change."""
        flying = list(current.flights)
        while flying:
            flying = [flight for flight in flying if flight.rounds.advance()]
        changed = False
        for position, flight in enumerate(current.flights):
            counts = flight.counts()
            flight.land(counts)
            if self._sparse:
                self._make_sparse(flight.load)
            if position == 0:
                changed = counts[-1] > 0
            for name, count in zip(flight.load.names, counts, strict=False):
                if 0 < count < self._comm.size:
                    current.partial.append(name)
        return changed

    def _make_sparse(self, load: Load) -> None:
        """Give gradients that came from other ranks only the layout that they have there."""
        for parameter, gradient in zip(load.parameters, load.gradients, strict=True):
            if gradient is None and parameter in self._sparse and parameter.grad is not None:
                parameter.grad = parameter.grad.to_sparse(1)

    def _agree_again(self, current: _Pass) -> None:
        """Follow a change of requires_grad, and reduce what has been unfrozen in this same pass."""
        trainable = self._trainable()
        words = {i: "in another wrapper, too" for i in self._elsewhere}
        lines = [
            f"{name} {'trainable' if flag else words.get(i, 'frozen')}"
            for i, (name, flag) in enumerate(zip(self._names, trainable, strict=True))
        ]
        check_equal(self._comm, lines, "requires_grad of the parameters")
        before = self._layout.trainable
        late = [i for i, flag in enumerate(trainable) if flag and not before[i]]
        self._layout = self._lay_out(trainable, order=None)
        self._arrival_known = False
        buckets = buckets_of(self._describe, late, None, self.bucket_bytes)
        extra = _Pass([], False, current.weight, current.total, current.loss_scale)
        self._start_all(extra, buckets)
        self._land(extra)
        self._carrier.forget()
        current.flights += extra.flights
        current.partial += extra.partial

    def _follow_arrival(self, current: _Pass) -> None:
        """Lay the buckets out anew, in the order in which rank 0 saw the gradients arrive."""
        self._arrival_known = True
        if len(self._layout.buckets) < 2:
            return
        order = np.array(arrived(self._layout, current.arrival), dtype=np.int64)
        self._comm.broadcast(order, root=0)
        self._layout = self._lay_out(self._layout.trainable, order.tolist())
        self._carrier.forget()

    def _follow_times(self, current: _Pass) -> None:
        """Choose the size of the buckets by rank 0's times of a pass, the first being untypical."""
        self._size_known = True
        pace = measure_pace(self._comm)
        order = arrived(self._layout, current.arrival)
        when = dict(zip(current.arrival, current.times, strict=True))
        limit = limit_for(self._describe, order, when, pace)
        plan = np.array([limit, *order], dtype=np.int64)
        self._comm.broadcast(plan, root=0)
        self.bucket_bytes, *order = plan.tolist()
        self._layout = self._lay_out(self._layout.trainable, order)
        self._carrier.forget()
