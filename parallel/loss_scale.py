"""Scale losses so that gradients fit half precision, and skip the steps in which they do not.

Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2, with the factor chosen as
section 3.2 ends: raised while nothing overflows, lowered where something does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from .finite import all_finite

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["LossScaler"]


class LossScaler:
    """Hold one factor for all ranks of a communicator, and take or skip each step on all of them.

        scaler = LossScaler(comm)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)            # only to clip in between
        scaler.step(optimizer)

    A `Pipeline(loss_scaler=scaler)` scales by itself; take mesh.comm there, so that all stages and
    replicas skip together. Works with every torch optimizer, ShardedOptimizer too.

    factor: what losses are multiplied by; equal on all ranks, as all see the same verdicts.
    growth, interval: the factor is multiplied by growth after `interval` steps without overflow.
    backoff: the factor is multiplied by it where a step is skipped.
    least, most: bounds of the factor.
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
        if not (math.isfinite(factor) and least <= factor <= most and least > 0):
            raise ValueError(f"expected 0 < least <= factor <= most, got {least}, {factor}, {most}")
        if not (growth >= 1 and 0 < backoff < 1 and interval >= 1):
            raise ValueError(
                "expected growth >= 1, 0 < backoff < 1 and interval >= 1, got "
                f"{growth}, {backoff}, {interval}"
            )
        self.factor = factor
        self.skipped = 0
        self._comm = comm
        self._growth, self._backoff, self._interval = growth, backoff, interval
        self._least, self._most = least, most
        self._good = 0
        self._unscaled: set[int] = set()

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the factor."""
        return loss * self.factor

    @torch.no_grad()
    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients of an optimizer's parameters by the factor, once per step."""
        if id(optimizer) in self._unscaled:
            return
        self._unscaled.add(id(optimizer))
        for gradient in _gradients(optimizer):
            gradient.mul_(1.0 / self.factor)

    def step(self, optimizer: Optimizer) -> bool:
        """Step the optimizer unless a gradient on any rank is infinite or NaN; tell whether.

        Collective over the communicator. The gradients are unscaled afterwards in any case; the
        factor is adjusted for the next step.
        """
        self.unscale_(optimizer)
        self._unscaled.clear()
        told = np.array([all_finite(_gradients(optimizer))], np.uint8)
        finite = bool(self._comm.allreduce(told, op="min")[0])
        if finite:
            optimizer.step()
            self._good += 1
            if self._good == self._interval:
                self.factor = min(self.factor * self._growth, self._most)
                self._good = 0
        else:
            self.skipped += 1
            self._good = 0
            self.factor = max(self.factor * self._backoff, self._least)
        return finite

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs, plain values that are the same on every rank."""
        return {"factor": self.factor, "good": self._good, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the scaler of the state would, on every rank from the same state."""
        self.factor = float(state["factor"])
        self._good, self.skipped = int(state["good"]), int(state["skipped"])


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
