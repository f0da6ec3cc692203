"""Reduce gradients over ranks, bucket by bucket, while backward still computes the others.

One pass reduces every gradient once: `begin`, then `mark` for every gradient that is ready, `flush`
when no more will come, `finish` to wait and to bring the results back.

Ranks start the same buckets in the same order whatever the arrival of their gradients. With its
elements a bucket carries one flag per parameter, set where this rank has a gradient: a parameter
with a gradient on some ranks only is averaged with zeros for the others, and one with none stays
without. The first bucket carries one flag more, set when `requires_grad`, or what else the ranks
are to look at, has changed on this rank since they last agreed on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .bucket_plan import BucketPlan
from .carried import Carried, digest_of, placed, stateful
from .carriers import carrier_of
from .finite import FiniteCheck
from .gradients import Gradients
from .hooks import WireFormat, WireHook, wire_format
from .ready_hook import comes_last, hang, hang_again
from .reduction import Reduction, ReductionRecord, Terms
from .replicas import check_equal
from .swaps import Swaps
from .weights import begin_weighing

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from ..comm.communicator import Communicator
    from .loss_scale import LossScaler

__all__ = ["Reducer"]


def _may_be_trained(parameter: Tensor) -> bool:
    number = parameter.is_floating_point() or parameter.is_complex()
    return number and (parameter.requires_grad or not parameter.is_inference())


class Reducer:
    """Reduce the gradients of named parameters over a communicator.

    bucket_bytes: how much is reduced at once, in bytes of the gradients themselves; None to plan
        it by when the gradients arrived in the first passes, and what reductions cost then.
    wire: how gradients travel, as `hooks.wire_format` reads it.
    sparse: parameters whose gradient becomes a sparse one where only other ranks had any; those
        that have had a sparse one on this rank are added.
    finite: what looks at gradients before they leave; the bad ones stay here.
    loss_scaler: what has scaled the losses, for a wire hook that keeps errors.

    Attributes:
        told: whether a rank has told in the last pass that something has changed there.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        comm: Communicator,
        *,
        bucket_bytes: int | None,
        wire: WireFormat | WireHook | None,
        sparse: Iterable[nn.Parameter],
        finite: FiniteCheck | None,
        loss_scaler: LossScaler | None,
    ) -> None:
        self._comm = comm
        self._finite = finite
        self._loss_scaler = loss_scaler
        self.wire = wire_format(wire)
        self._carrier = carrier_of(self.wire, comm)
        self._gradients = known = Gradients(named, sparse)
        self._digest = digest_of(known.names)
        self.plan = BucketPlan(comm, known.describe, known.trainable(), bucket_bytes)
        self._repeated = False
        self.told = False
        self._pass: Reduction | None = None
        self._handles: dict[int, RemovableHandle] = {}
        self._swaps = Swaps(())
        self.last: ReductionRecord | None = None

    def attach(self, on_ready: Callable[[int], None]) -> None:
        """Call on_ready(index) whenever backward has accumulated a parameter's gradient."""
        if self._handles:
            return
        # Where backward is called in a compiled function, what it calls would be compiled as well.
        on_ready = torch.compiler.disable(on_ready)  # type: ignore[no-untyped-call]
        for index, parameter in enumerate(self._gradients.parameters):
            if not _may_be_trained(parameter):
                continue
            # A frozen parameter takes no hook, but it keeps one when it is frozen and unfrozen.
            frozen = not parameter.requires_grad
            parameter.requires_grad_(True)
            self._handles[index] = hang(parameter, on_ready, index)
            if frozen:
                parameter.requires_grad_(False)
        self._swaps = Swaps(self._gradients.parameters)

    def detach(self) -> None:
        """Take the hooks off the parameters."""
        self._swaps = Swaps(())
        while self._handles:
            self._handles.popitem()[1].remove()

    def follow_swaps(self) -> None:
        """Hang the hooks again where a parameter has another tensor; to be called before a step."""
        for index in self._swaps.found():
            if index in self._handles:
                hang_again(self._gradients.parameters[index])

    @property
    def single(self) -> bool:
        """Tell whether there is one rank only, whose gradients are what they are."""
        return self._comm.size == 1

    def clear(self, elsewhere: frozenset[int]) -> None:
        """Leave zeros for gradients, as ranks do that all weigh 0; not collective."""
        self._gradients.clear(elsewhere)

    def unaware_of(self, scaler: LossScaler) -> Sequence[nn.Parameter]:
        """Return the parameters whose errors would stay in the units of a factor that changes."""
        keeps = stateful(self.wire.hook) is not None
        return self._gradients.parameters if keeps and self._loss_scaler is not scaler else ()

    @property
    def active(self) -> bool:
        """Tell whether a pass has begun and not finished."""
        return self._pass is not None

    def begin(
        self,
        weight: float | None = None,
        elsewhere: frozenset[int] = frozenset(),
        *,
        changed: bool = False,
    ) -> None:
        """Begin a pass; collective, as all of a pass is.

        weight: the result is sum(weight * gradient) / sum(weight) over the ranks, not the mean; a
            rank of weight 0 adds nothing, whatever its gradients hold.
        elsewhere: the indices of parameters that another reducer has in its pass.
        changed: whether something else has changed here, for `told`.
        """
        assert self._pass is None
        known = self._gradients
        if elsewhere - known.elsewhere:
            self._carrier.forget()  # what another reduces now may lie in this one's memory
        known.elsewhere = elsewhere
        bucketing = self.plan.bucketing
        total = None if weight is None else begin_weighing(self._comm, weight)
        factor = 1.0 if self._loss_scaler is None else self._loss_scaler.turn_factor
        self._pass = Reduction(
            self._comm,
            self._carrier,
            known,
            bucketing,
            Terms(weight, total, factor),
            changed=changed or known.trainable() != bucketing.trainable,
            held=self._repeated,
            finite=self._finite,
        )

    def mark(self, index: int, *, nested: bool = False) -> None:
        """Note, within the hook, that a gradient is ready; start every bucket that is now full.

        All buckets wait for the end where hooks of others are still to run on it.

        nested: whether backwards within the backward may accumulate it again. Then all buckets of
            the first pass wait for its end, and those of later ones if it has happened.

        Raises: RuntimeError where it is accumulated again although it has left.
        """
        current = self._pass
        assert current is not None
        last = comes_last(self._gradients.parameters[index], self._handles[index])
        if not last or (nested and not self.plan.arrival_known):
            current.held = True
        current.mark(index)

    def flush(self) -> None:
        """Start all buckets that have not been started; no more gradients will come."""
        assert self._pass is not None
        self._pass.flush()

    def finish(self) -> ReductionRecord:
        """Wait for all buckets; the results are the gradients then.

        ValueError on every rank if `requires_grad` has changed on some ranks only.
        """
        current = self._end()
        assert current is not None
        self.told = current.land()
        again = self.told and self._agree_again(current)
        if again or self.plan.learn(current.arrival, current.times):
            self._carrier.forget()
        self.last = current.record()
        return self.last

    def abandon(self) -> None:
        """Give up a pass whose backward has failed; wait for what was started."""
        current = self._end()
        if self._finite is not None:
            self._finite.forget()
        if current is not None:
            current.abandon()

    def _end(self) -> Reduction | None:
        current, self._pass = self._pass, None
        if current is not None:
            self._repeated |= current.repeated
        return current

    def _agree_again(self, current: Reduction) -> bool:
        """Follow a change of requires_grad, and reduce what has been unfrozen in this same pass.

        Returns whether it was that which has changed.
        """
        known = self._gradients
        check_equal(self._comm, known.conditions(), "requires_grad of the parameters")
        if known.trainable() == self.plan.bucketing.trainable:
            return False
        current.add(self.plan.change(known.trainable()))
        return True

    def carried(self, steps: int) -> Carried:
        """Return what the next pass depends on besides the gradients; not copied."""
        hook = stateful(self.wire.hook)
        return Carried(
            names=self._gradients.names,
            rank=self._comm.rank,
            size=self._comm.size,
            steps=steps,
            layout=self.plan.layout(self._digest),
            wire="" if hook is None else type(hook).__name__,
            hook={} if hook is None else dict(hook.state_dict()),
            sparse=self._gradients.sparse,
        )

    def carry_on(self, carried: Carried) -> None:
        """Go on from what a reducer of the same parameters carried; alike on all ranks."""
        known = self._gradients
        hook = stateful(self.wire.hook)
        if hook is not None:
            pairs = zip(known.names, known.parameters, strict=True)
            hook.load_state_dict(placed(carried.hook, {name: p.device for name, p in pairs}))
        known.expect_sparse(carried.sparse)
        if carried.layout is not None:
            self.plan.follow(carried.layout)
            self._carrier.forget()
