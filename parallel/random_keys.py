"""Random numbers keyed by what they are for, not by who draws them.

A mask of dropout is a pure function of (seed, layer, call, step, sample, element). Layer is the
name in the unsplit model, sample the place in the global batch: neither knows of ranks, stages or
micro-batches, so the mask of a sample is the same however the work is split, and in recomputation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..kernels.masks import mask, random_words
from .device_masks import mask_on_device

__all__ = ["Dropout", "Samples", "name_layers", "random_bits", "show_samples"]


@dataclass(frozen=True, slots=True)
class Samples:
    """Say which samples are going through: rows [first, first + rows) of a step's global batch."""

    step: int
    first: int
    rows: int


def key_of(seed: int, layer: str, call: int, step: int) -> tuple[int, int]:
    """Return what a mask is drawn by: 64 bits that are hashed of seed, layer and call; the step."""
    text = f"{seed}/{call}/{layer}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"), step


def random_bits(
    seed: int, layer: str, call: int, step: int, samples: Iterable[int], count: int
) -> NDArray[np.uint32]:
    """Return `count` random 32-bit words for every sample, shape (samples, count).

    See `kernels.masks.random_words`; the key is that of `key_of`.
    """
    key = key_of(seed, layer, call, step)
    rows = [random_words(key, sample, count) for sample in samples]
    return np.array(rows, dtype=np.uint32).reshape(len(rows), count)


def _mask_on_host(key: tuple[int, int], samples: Samples, count: int, least: int) -> Tensor:
    kept = np.empty(samples.rows * count, dtype=np.bool_)
    mask(kept, samples.rows, samples.first, key, least)
    return torch.from_numpy(kept)


class Dropout(nn.Module):
    """Set elements to zero with probability p and divide the others by 1 - p, in training mode.

    As nn.Dropout, but with masks keyed by (seed, layer, call, step, sample, element). The first
    dimension of the input is the samples. The engine says which ones they are; elsewhere call
    `show_samples` before a forward in training mode, else RuntimeError.
    """

    def __init__(self, p: float = 0.5, *, seed: int = 0) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"expected a probability between 0 and 1, got {p}")
        self.p = p
        self.seed = seed
        self.layer = ""
        self.samples: Samples | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        samples = self.samples
        if samples is None:
            raise RuntimeError(
                f"dropout {self.layer!r} does not know its samples: train it in a ringfold.Pipeline"
                ", or call show_samples before the forward"
            )
        if x.dim() == 0 or x.shape[0] != samples.rows:
            raise ValueError(
                f"dropout {self.layer!r}: expected a first dimension of {samples.rows} samples, "
                f"got shape {tuple(x.shape)}"
            )
        call, self.calls = self.calls, self.calls + 1
        key = key_of(self.seed, self.layer, call, samples.step)
        count = x[0].numel() if samples.rows else 0
        # The greatest p, 1, drops all: 2**32 is above every word.
        least = round(self.p * 2**32)
        kept = mask_on_device(x.device, key, samples.first, samples.rows, count, least)
        if kept is None:
            kept = _mask_on_host(key, samples, count, least).to(x.device)
        scale = 1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0
        return x * (kept.view(x.shape).to(x.dtype) * scale)

    def extra_repr(self) -> str:
        return f"p={self.p}, seed={self.seed}"


def name_layers(model: nn.Module) -> None:
    """Tell every Dropout its name in the whole model; one that occurs twice keeps the first."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.layer = name


def show_samples(model: nn.Module, samples: Samples | None) -> None:
    """Tell every Dropout which samples come next, and count its calls from 0 again."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.samples = samples
            module.calls = 0
