"""The loss of every step's global batch, from each data rank's loss of its share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["GlobalLosses", "check_metric"]


def check_metric(metric: Mapping[str, float]) -> None:
    """Raise FloatingPointError where a number of the final metric is NaN or infinite."""
    for name, value in metric.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"the final metric {name} is {value}; a smaller --lr may help")


class GlobalLosses:
    """Average losses over the data ranks, `every` steps at a time.

    One message for many steps: alone, a loss of four bytes costs as much as a small model's
    gradients.  The mean over data ranks is that over samples, as `Engine.step` has it.
    """

    def __init__(self, comm: Communicator, every: int = 16) -> None:
        self.comm = comm
        self.every = every
        self.known: list[float] = []
        self.pending: list[float] = []

    def add(self, loss: float) -> None:
        """Take the next step's loss on this rank; collective at every `every`-th step."""
        self.pending.append(loss)
        if len(self.pending) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Average what is pending.  Collective.

        FloatingPointError, on all ranks, if a loss is NaN or infinite.
        """
        values = self.comm.allreduce(np.array(self.pending, np.float64), op="mean")
        for value in values.tolist():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss of step {len(self.known)} is {value}; a smaller --lr may help"
                )
            self.known.append(value)
        self.pending.clear()
