"""The source files of Python's own library, byte by byte, and a small causal transformer.

The files are those of the running interpreter, so nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from math import log
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..parallel.random_keys import Dropout
from ..parallel.sampler import GlobalBatchSampler, ShardSampler
from .options import UsageError
from .workload import Predict, Share, Sums, Workload, cosine

__all__ = ["WORKLOAD", "Text", "layers", "read_library", "unigram_entropy"]

NUM_BYTES = 1_200_000
CONTEXT = 128
WIDTH = 128
HEADS = 4
BLOCKS = 4
VOCABULARY = 256
VALIDATION_PART = 10  # the last tenth of the bytes
FILE_ORDER_SEED = 256
EVALUATION_BATCH = 16


def read_library(num_bytes: int = NUM_BYTES) -> NDArray[np.uint8]:
    """Join modules of the standard library, in a fixed mixed order, up to num_bytes.

    UsageError if this interpreter has come without its sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    found = bytearray()
    for index in np.random.default_rng(FILE_ORDER_SEED).permutation(len(files)):
        if len(found) >= num_bytes:
            break
        found += files[index].read_bytes()
    if len(found) < num_bytes:
        raise UsageError(
            f"the workload text needs {num_bytes:,} bytes of Python sources, but the modules in"
            f" {folder} have {len(found):,}"
        )
    return np.frombuffer(bytes(found[:num_bytes]), np.uint8)


def unigram_entropy(data: NDArray[np.uint8]) -> float:
    """Return the entropy of single bytes, in bits: what a model without context can reach."""
    share = np.bincount(data, minlength=VOCABULARY) / len(data)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


class Embedding(nn.Module):
    """Map bytes (n, t) to the sum of byte and position vectors (n, t, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.byte = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        nn.init.normal_(self.byte.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.byte(x) + self.position[: x.shape[1]]
        return embedded


class Block(nn.Module):
    """Attend to earlier bytes, then transform each place; normalised before either."""

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.join = nn.Linear(WIDTH, WIDTH)
        self.before_transform = nn.LayerNorm(WIDTH)
        self.transform = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.drop_attended = Dropout(dropout, seed=seed)
        self.drop_transformed = Dropout(dropout, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.join(self.attend(self.project(self.before_attention(x))))
        x = x + self.drop_attended(attended)
        result: Tensor = x + self.drop_transformed(self.transform(self.before_transform(x)))
        return result

    def attend(self, projected: Tensor) -> Tensor:
        n, t, _ = projected.shape
        query, key, value = (
            part.view(n, t, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in projected.chunk(3, dim=2)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).reshape(n, t, WIDTH)


class Head(nn.Module):
    """Map (n, t, WIDTH) to logits of the next byte (n, t, VOCABULARY)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.logits = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.norm(x))
        return logits


def layers(dropout: float = 0.0, seed: int = 0) -> list[nn.Module]:
    return [Embedding(), *(Block(dropout, seed) for _ in range(BLOCKS)), Head()]


def loss(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def optimizer(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)


class Text:
    """Windows of CONTEXT bytes, each with the bytes that follow as its target."""

    def __init__(self, share: Share, data: NDArray[np.uint8] | None = None) -> None:
        data = read_library() if data is None else data
        self.share = share
        self.data = data
        cut = len(data) - len(data) // VALIDATION_PART
        self.train = torch.from_numpy(data[:cut].astype(np.int64))
        self.validation = torch.from_numpy(data[cut:].astype(np.int64))
        self.sampler = GlobalBatchSampler(
            num_windows(self.train),
            share.batch_size,
            share.rank,
            share.size,
            seed=share.seed,
            uneven=True,
        )
        self.fingerprint = hashlib.sha256(data.tobytes()).hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        return len(self.sampler)

    @property
    def facts(self) -> Sequence[str]:
        return [
            f"text: {len(self.train):,} bytes to train on, {len(self.validation):,} to validate",
            f"text: unigram entropy {unigram_entropy(self.data):.3f} bits per byte",
        ]

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.set_epoch(epoch)
        for indices in self.sampler:
            yield windows(self.train, indices)

    def evaluate(self, predict: Predict) -> Sums:
        share = self.share
        count = num_windows(self.validation)
        mine = list(ShardSampler.evaluation(count, share.rank, share.size))
        sums = np.zeros(2)
        for start in range(0, len(mine), EVALUATION_BATCH):
            x, y = windows(self.validation, mine[start : start + EVALUATION_BATCH])
            logits = predict(x)
            if logits is not None:
                sums += [float(loss(logits, y)) * y.numel(), y.numel()]
        return sums

    def metric(self, sums: Sums) -> dict[str, float]:
        return {
            "validation_bits_per_byte": float(sums[0] / sums[1] / log(2)),
            "unigram_entropy": unigram_entropy(self.data),
        }


def num_windows(data: Tensor) -> int:
    """Count the whole windows; each needs one byte more than it is long."""
    return max(len(data) - 1, 0) // CONTEXT


def windows(data: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return windows (n, CONTEXT) and, one byte on, their targets of the same shape."""
    places = torch.tensor(indices)[:, None] * CONTEXT + torch.arange(CONTEXT)
    return data[places], data[places + 1]


WORKLOAD = Workload(layers, loss, optimizer, cosine, Text, layers)
