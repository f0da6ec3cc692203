"""Weights of a mean over ranks; each rank gives its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from ..comm.work import Work

__all__ = ["begin_weighing", "is_summed", "require_weight", "sum_of_weights"]


def begin_weighing(comm: Communicator, weight: float) -> Work:
    """Begin to tell all ranks this rank's weight, for `sum_of_weights`; collective."""
    work: Work = comm.allgather(np.array([weight], np.float64), blocking=False)
    return work


def sum_of_weights(work: Work) -> float:
    """Return the sum of all ranks' weights; ValueError on every rank where one is no weight."""
    weights = work.wait()[:, 0].tolist()
    for rank, weight in enumerate(weights):
        require_weight(weight, rank)
    return float(sum(weights))


def require_weight(weight: float, rank: int) -> None:
    """Raise ValueError for what is no weight, named as of a rank."""
    if not _is_weight(weight):
        raise ValueError(f"expected a finite weight >= 0, got {weight} on rank {rank}")


def is_summed(work: Work) -> bool:
    """Tell whether there is a sum for `sum_of_weights` to return; never waits."""
    return work.done() and all(map(_is_weight, work.wait()[:, 0].tolist()))


def _is_weight(weight: float) -> bool:
    return math.isfinite(weight) and weight >= 0
