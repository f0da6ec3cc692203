"""Ten million rows of ten numbers, and one linear layer; a rank holds its share of the rows only.

A number is a pure function of (seed, row, column), so each rank computes its own rows, and the rows
of a global batch are the same however many ranks share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..comm.chunks import bounds
from ..parallel.sampler import epoch_order
from .workload import Predict, Share, Sums, Workload, constant

__all__ = ["NUM_ROWS", "WORKLOAD", "Linear", "rows", "uniform"]

NUM_ROWS = 10_000_000
NUM_COLUMNS = 10
NUM_TEST = 10_000  # rows behind the last one, never trained on
NOISE = 0.1
BLOCK = 65_536  # rows computed at once, so that the temporary arrays stay in cache
TRUTH = np.linspace(-1, 1, NUM_COLUMNS, dtype=np.float32)
BIAS = np.float32(0.5)


def uniform(seed: int, index: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Return one number in [-1, 1) for every index, a pure function of (seed, index).

    The index is the counter of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
    generators, OOPSLA 2014); the top 24 bits of its output become the number.
    """
    mixed = index + np.uint64((seed + 1) * 0xD1342543DE82EF95 % 2**64)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    top = (mixed >> np.uint64(40)).astype(np.float32)
    return top * np.float32(2.0**-23) - np.float32(1)


def rows(seed: int, numbers: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return x (n, 10) and y (n, 1) of the rows with these numbers."""
    columns = NUM_COLUMNS + 1  # the last one is the noise of y
    counter = numbers.astype(np.uint64)[:, None] * np.uint64(columns)
    drawn = uniform(seed, np.add(counter, np.arange(columns), dtype=np.uint64, casting="unsafe"))
    x = np.ascontiguousarray(drawn[:, :NUM_COLUMNS])
    # A sum column by column: the order, and so y to the last bit, does not depend on the block.
    y = BIAS + np.float32(NOISE) * drawn[:, NUM_COLUMNS]
    for column, weight in enumerate(TRUTH):
        y += weight * x[:, column]
    return x, y[:, None]


class Linear:
    """This rank's rows: part `share.rank` of each run of batch_size rows."""

    def __init__(self, share: Share, num_rows: int = NUM_ROWS) -> None:
        self.share = share
        self.steps_per_epoch = num_rows // share.batch_size
        first, end = bounds(share.batch_size, share.size, share.rank)
        self.local = end - first
        count = self.steps_per_epoch * self.local
        x = np.empty((count, NUM_COLUMNS), np.float32)
        y = np.empty((count, 1), np.float32)
        for start in range(0, count, BLOCK):
            held = np.arange(start, min(start + BLOCK, count))
            batch, place = np.divmod(held, max(self.local, 1))
            numbers = batch * share.batch_size + first + place
            x[held[0] : held[-1] + 1], y[held[0] : held[-1] + 1] = rows(share.seed, numbers)
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)
        self.first_test_row = num_rows

    @property
    def fingerprint(self) -> str:
        return f"linear, seed {self.share.seed}, {self.steps_per_epoch} batches"

    @property
    def facts(self) -> Sequence[str]:
        held = self.x.nbytes + self.y.nbytes
        return [
            f"linear: {self.steps_per_epoch * self.share.batch_size:,} rows of {NUM_COLUMNS}, "
            f"{len(self.x):,} of them on each data rank ({held / 2**20:.0f} MiB)",
            f"linear: the noise alone is a mean squared error of {NOISE**2 / 3:.5f}",
        ]

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches in an order drawn anew each epoch; their rows stay together."""
        for batch in epoch_order(self.steps_per_epoch, epoch, self.share.seed, True):
            start = int(batch) * self.local
            yield self.x[start : start + self.local], self.y[start : start + self.local]

    def evaluate(self, predict: Predict) -> Sums:
        first, end = bounds(NUM_TEST, self.share.size, self.share.rank)
        numbers = self.first_test_row + np.arange(first, end)
        x, y = map(torch.from_numpy, rows(self.share.seed, numbers))
        result = predict(x)
        if result is None:
            return np.zeros(2)
        return np.array([float(((result - y).double() ** 2).sum()), float(len(y))])

    def metric(self, sums: Sums) -> dict[str, float]:
        return {"test_mean_squared_error": float(sums[0] / sums[1])}


def layers() -> list[nn.Module]:
    return [nn.Linear(NUM_COLUMNS, 1)]


def optimizer(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr)


WORKLOAD = Workload(layers, nn.functional.mse_loss, optimizer, constant, Linear)
