"""Handwritten digits that scikit-learn brings along, and a small convolutional network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..parallel.sampler import GlobalBatchSampler, ShardSampler
from .workload import Predict, Share, Sums, Workload, cosine

__all__ = ["WORKLOAD", "Digits", "layers"]

NUM_TEST = 360
SPLIT_SEED = 1797  # the split does not follow --seed, so accuracies can be compared
EVALUATION_BATCH = 128


def layers() -> list[nn.Module]:
    """Return a network from (n, 1, 8, 8) to ten logits; no layer depends on the batch's other rows.

    Batch normalisation would: its result depends on how the batch is split over ranks.
    """
    return [
        nn.Conv2d(1, 32, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 64),
        nn.GELU(),
        nn.Linear(64, 10),
    ]


def optimizer(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)


def images() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return all digits: pixels (n, 1, 8, 8) in float32 from 0 to 1, and labels (n,) in int64.

    What sklearn.datasets.load_digits gives, read from the same file: that takes 0.01 s, importing
    scikit-learn, and SciPy with it, 0.8 s of every rank's start.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ImportError("the workload digits needs scikit-learn's data: pip install scikit-learn")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    pixels = table[:, :-1].reshape(-1, 1, 8, 8).astype(np.float32) / np.float32(16)
    return pixels, table[:, -1]


class Digits:
    """1797 images of 8 x 8 pixels: 1437 to train on, 360 to test."""

    def __init__(self, share: Share) -> None:
        pixels, labels = images()
        order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
        test, train = order[:NUM_TEST], order[NUM_TEST:]
        self.train = torch.from_numpy(pixels[train]), torch.from_numpy(labels[train])
        self.test = torch.from_numpy(pixels[test]), torch.from_numpy(labels[test])
        self.share = share
        self.sampler = GlobalBatchSampler(
            len(train), share.batch_size, share.rank, share.size, seed=share.seed, uneven=True
        )
        self.fingerprint = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        return len(self.sampler)

    @property
    def facts(self) -> Sequence[str]:
        return [f"digits: {len(self.train[1])} to train on, {len(self.test[1])} to test"]

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.train
        self.sampler.set_epoch(epoch)
        for indices in self.sampler:
            yield x[indices], y[indices]

    def evaluate(self, predict: Predict) -> Sums:
        x, y = self.test
        mine = list(ShardSampler.evaluation(len(y), self.share.rank, self.share.size))
        sums = np.zeros(2)
        for start in range(0, len(mine), EVALUATION_BATCH):
            indices = mine[start : start + EVALUATION_BATCH]
            logits = predict(x[indices])
            if logits is not None:
                sums += [int((logits.argmax(1) == y[indices]).sum()), len(indices)]
        return sums

    def metric(self, sums: Sums) -> dict[str, float]:
        right, total = sums
        return {"test_accuracy": float(right / total)}


WORKLOAD = Workload(layers, nn.functional.cross_entropy, optimizer, cosine, Digits)
