"""What a workload is: a model as a list of layers, and data dealt to the data ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Data", "Predict", "Share", "Workload", "constant", "cosine"]

Predict = Callable[[Tensor], Tensor | None]
Sums = NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """Say which part of every global batch is wanted: that of data rank `rank` out of `size`.

    All ranks of one data index, whatever their pipeline stage, hold the same share.
    """

    batch_size: int
    rank: int
    size: int
    seed: int


class Data(Protocol):
    """One share of a data set.

    The global batch of step s of an epoch holds the same samples whatever `Share.size` is.
    """

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole global batches in an epoch."""

    @property
    def fingerprint(self) -> str:
        """Text that is equal on all ranks if they hold shares of the same data."""

    @property
    def facts(self) -> Sequence[str]:
        """Lines worth printing before training."""

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this share of every global batch of the epoch, in order."""

    def evaluate(self, predict: Predict) -> Sums:
        """Return sums over this rank's part of the evaluation samples, each dealt once.

        `predict` may return None, on a rank that does not hold the model's last layer; the sums
        are zeros then.
        """

    def metric(self, sums: Sums) -> dict[str, float]:
        """Turn sums over all ranks into the final metric."""


@dataclass(frozen=True)
class Workload:
    """Bundle what train.py needs.

    `layers()` draws from torch's generator, which the caller seeds.  `loss` is a mean over samples.
    `layers_with_dropout(p, seed)` are these with keyed dropout; None where there is none.
    `decay` maps the trained fraction, in [0, 1), to the factor of the learning rate.
    """

    layers: Callable[[], list[nn.Module]]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter], float], Optimizer]
    decay: Callable[[float], float]
    data: Callable[[Share], Data]
    layers_with_dropout: Callable[[float, int], list[nn.Module]] | None = None


def constant(fraction: float) -> float:
    return 1.0


def cosine(fraction: float) -> float:
    """Fall from 1 to 0 along half a cosine (Loshchilov and Hutter, SGDR, eq. 5)."""
    return 0.5 + 0.5 * cos(pi * fraction)
