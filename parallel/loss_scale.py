"""Scale losses so that gradients fit half precision, and skip the steps in which they do not.

Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2, with the factor chosen as
section 3.2 ends: raised while nothing overflows, lowered where something does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..comm.arguments import require, whole
from ..comm.texts import shown_ranks
from .demands import require_comm
from .finite import all_finite

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["LossScaler"]

_REFUSED = 0  # the least verdict of any rank counts; 1 is not finite, 2 is

Scaled = TypeVar("Scaled", Tensor, float)


class LossScaler:
    """Hold one factor for all ranks of a communicator, and take or skip each step on all of them.

        scaler = LossScaler(comm)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)            # only to clip in between
        scaler.step(optimizer)

    Several optimizers take a step each. All of them divide by the factor that the losses were
    multiplied by: what their steps do to it holds from the next `scale` on. Step each optimizer
    that holds gradients of scaled losses before that, or call `update` where one is given up:

        scaler.scale(loss).backward()
        scaler.step(one)
        scaler.step(other)

    A `Pipeline(loss_scaler=scaler)` scales by itself; take mesh.comm there, so that all stages and
    replicas skip together. A `DataParallel` with a wire that keeps errors, such as topk, is given
    `loss_scaler=scaler`, too: what it keeps has to follow the factor. Works with every torch
    optimizer, ShardedOptimizer too. Gradients of float16 parameters are divided in float16, where
    what the factor has lifted vanishes again: keep float32 parameters, under torch.autocast.

    factor: what the next losses are multiplied by; equal on all ranks, as all see the same
        verdicts.
    growth, interval: the factor is multiplied by growth after `interval` turns without overflow; a
        turn is what the optimizers do between two `scale`s.
    backoff: the factor is multiplied by it after a turn in which a step is skipped.
    least, most: bounds of the factor.  All five are powers of two.
    skipped: steps that were skipped so far.
    """

    def __init__(
        self,
        comm: Communicator,
        factor: float = 2.0**16,
        *,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        least: float = 2.0**-14,
        most: float = 2.0**24,
    ) -> None:
        require_comm(comm)
        factors = {"factor": factor, "growth": growth, "backoff": backoff}
        bounds = {"least": least, "most": most}
        for name, value in {**factors, **bounds}.items():
            require(name, value, Real)
        whole("interval", interval)
        if not (math.isfinite(factor) and least <= factor <= most and least > 0):
            raise ValueError(f"expected 0 < least <= factor <= most, got {least}, {factor}, {most}")
        if not (growth >= 1 and 0 < backoff < 1 and interval >= 1):
            raise ValueError(
                "expected growth >= 1, 0 < backoff < 1 and interval >= 1, got "
                f"{growth}, {backoff}, {interval}"
            )
        for name, value in {**factors, **bounds}.items():
            if math.frexp(value)[0] != 0.5:
                # Dividing by another one would round, so that skipped steps were not all it cost.
                raise ValueError(f"expected a power of two for {name}, got {value}")
        self.factor = factor
        self.skipped = 0
        self._comm = comm
        self._growth, self._backoff, self._interval = growth, backoff, interval
        self._least, self._most = least, most
        self._good = 0
        # Of the turn: the factor and the good turns at its start, and who did what in it.
        self._start: tuple[float, int] | None = None
        self._overflow = False
        self._stepped: WeakSet[Optimizer] = WeakSet()
        self._unscaled: WeakSet[Optimizer] = WeakSet()

    def require(self, comm: Communicator) -> None:
        """Raise ValueError where ranks of `comm` would go on with factors of their own."""
        if missing := sorted(set(comm.members) - set(self._comm.members)):
            raise ValueError(
                f"the LossScaler is over {self._comm.size} ranks, without {shown_ranks(missing)}, "
                "which would skip steps and change their factor apart: make it over mesh.comm"
            )

    @property
    def turn_factor(self) -> float:
        """Return what the gradients of this turn are multiplied by, and `unscale_` divides by."""
        return self.factor if self._start is None else self._start[0]

    def scale(self, loss: Scaled) -> Scaled:
        """Return the loss times the factor."""
        if self._stepped:
            self._end_turn()
        # Whose gradients are gone was unscaled for a step that was never taken.
        for optimizer in list(self._unscaled):
            if not _gradients(optimizer):
                self._unscaled.discard(optimizer)
        return loss * self.factor

    @torch.no_grad()
    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients of an optimizer's parameters by the factor of their losses.

        RuntimeError if that was done already, and the optimizer took no step since.
        """
        if optimizer in self._stepped:
            self._end_turn()
        if optimizer in self._unscaled:
            raise RuntimeError(
                f"the gradients of this {type(optimizer).__name__} are unscaled already, with no "
                "step since: unscale_ once before each step, and call update() where a step is "
                "given up"
            )
        self._unscaled.add(optimizer)
        factor, _ = self._begun()
        for gradient in _gradients(optimizer):
            gradient.mul_(1.0 / factor)

    def step(self, optimizer: Optimizer) -> bool:
        """Step the optimizer unless a gradient on any rank is infinite or NaN; tell whether.

        Collective over the communicator. The gradients are unscaled afterwards in any case; the
        factor is adjusted for the next turn. ValueError on every rank, without a step, for
        parameters whose wire keeps errors and does not know of this scaler.
        """
        if optimizer in self._stepped:
            self._end_turn()
        if optimizer not in self._unscaled:
            self.unscale_(optimizer)
        self._unscaled.discard(optimizer)
        unaware = _any_of(optimizer, self._unaware())
        verdict = _REFUSED if unaware else 1 + all_finite(_gradients(optimizer))
        agreed = int(self._comm.allreduce(np.array([verdict], np.uint8), op="min")[0])
        if agreed == _REFUSED:
            raise ValueError(
                "the wire of a DataParallel keeps what it has not sent, for parameters of this "
                f"{type(optimizer).__name__}, and does not know the factor of their losses: make "
                "it with DataParallel(..., loss_scaler=scaler)"
            )
        finite = agreed == 2
        self._stepped.add(optimizer)
        self._overflow |= not finite
        self._adjust()
        if finite:
            optimizer.step()
        else:
            self.skipped += 1
        return finite

    def _unaware(self) -> set[Tensor]:
        """Return the parameters of this rank whose wires should know this scaler, and do not."""
        users = list(self._comm.users.values())
        return {parameter for user in users for parameter in user.unaware_of(self)}

    def update(self) -> None:
        """End a turn that gives up an optimizer after `unscale_`; not needed otherwise."""
        self._end_turn()
        self._unscaled.clear()

    def _begun(self) -> tuple[float, int]:
        """Return the factor and the good turns as they were before any step of this turn."""
        if self._start is None:
            self._start = self.factor, self._good
        return self._start

    def _end_turn(self) -> None:
        self._start, self._overflow = None, False
        self._stepped.clear()

    def _adjust(self) -> None:
        """Set the next turn's factor by this turn's verdicts so far."""
        factor, good = self._begun()
        if self._overflow:
            self.factor, self._good = max(factor * self._backoff, self._least), 0
        elif good + 1 == self._interval:
            self.factor, self._good = min(factor * self._growth, self._most), 0
        else:
            self.factor, self._good = factor, good + 1

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs, plain values that are the same on every rank."""
        return {"factor": self.factor, "good": self._good, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the scaler of the state would, on every rank from the same state."""
        self.factor = float(state["factor"])
        self._good, self.skipped = int(state["good"]), int(state["skipped"])
        self.update()


def _any_of(optimizer: Optimizer, wanted: set[Tensor]) -> bool:
    groups = optimizer.param_groups if wanted else ()
    return any(parameter in wanted for group in groups for parameter in group["params"])


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
