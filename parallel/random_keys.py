"""Random numbers keyed by what they are for, not by who draws them.

A mask of dropout is a pure function of (seed, layer, call, step, sample, element). Layer is the
name in the unsplit model, sample the place in the global batch: neither knows of ranks, stages or
micro-batches, so the mask of a sample is the same however the work is split, and in recomputation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from numbers import Real

import numpy as np
import torch
from torch import Tensor, nn

from ..comm.arguments import require
from ..kernels.masks import mask
from .device_transfer import launcher_of
from .draws import Draws, Samples

__all__ = [
    "Dropout",
    "Samples",
    "Shown",
    "name_layers",
    "same_masks",
    "show_again",
    "show_samples",
]


def key_of(seed: int, layer: str, call: int, step: int) -> tuple[int, int]:
    """Return what a mask is drawn by: 64 bits that are hashed of seed, layer and call; the step."""
    text = f"{seed}/{call}/{layer}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"), step


def _mask_on_host(key: tuple[int, int], samples: Samples, count: int, least: int) -> Tensor:
    """Return `count` flags for every sample, as `kernels.masks.mask` makes them."""
    kept = np.empty(samples.rows * count, dtype=np.bool_)
    mask(kept, samples.rows, samples.first, key, least)
    return torch.from_numpy(kept)


def _mask_on_device(
    device: torch.device, key: tuple[int, int], samples: Samples, count: int, least: int
) -> Tensor | None:
    """Make the same mask in a GPU's memory, on the caller's stream.

    None for a device that is no GPU, or where no kernel can be compiled and run.
    """
    launcher = launcher_of(device)
    if launcher is None:
        return None
    from ..kernels.device import masks
    from ..kernels.device.table import Span

    kept = torch.empty(samples.rows * count, dtype=torch.bool, device=device)
    flags = Span(kept.data_ptr(), kept.numel())
    masks.mask(flags, samples.rows, samples.first, key, least, launcher)
    return kept


class Dropout(nn.Module):
    """Set elements to zero with probability p and divide the others by 1 - p, in training mode.

    As nn.Dropout, but with masks keyed by (seed, layer, call, step, sample, element). The first
    dimension of the input is the samples. The engine says which ones they are; elsewhere call
    `show_samples` before a forward in training mode, else RuntimeError. Within
    torch.utils.checkpoint the repetition has the mask of the first run; RuntimeError where it was
    called several times in a forward, and the checkpoint has no `same_masks`.
    """

    def __init__(self, p: float = 0.5, *, seed: int = 0) -> None:
        super().__init__()
        require("p", p, Real)
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"expected a probability between 0 and 1, got {p}")
        self.p = p
        self.seed = seed
        self.layer = ""
        self.draws: Draws | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x with elements set to zero, in training mode; x itself otherwise, or for p = 0.

        Raises: RuntimeError where nobody has said which samples x has; ValueError where its first
        dimension is not theirs.
        """
        if not self.training or self.p == 0.0:
            return x
        draws = self.draws
        if draws is None:
            raise RuntimeError(
                f"dropout {self.layer!r} does not know its samples: train it in a ringfold.Pipeline"
                ", or call show_samples before the forward"
            )
        samples = draws.samples
        if x.dim() == 0 or x.shape[0] != samples.rows:
            raise ValueError(
                f"dropout {self.layer!r}: expected a first dimension of {samples.rows} samples, "
                f"got shape {tuple(x.shape)}"
            )
        key = key_of(self.seed, self.layer, draws.next_call(self.layer), samples.step)
        count = x[0].numel() if samples.rows else 0
        # The greatest p, 1, drops all: 2**32 is above every word.
        least = round(self.p * 2**32)
        kept = _mask_on_device(x.device, key, samples, count, least)
        if kept is None:
            kept = _mask_on_host(key, samples, count, least).to(x.device)
        scale = 1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0
        return x * (kept.view(x.shape).to(x.dtype) * scale)

    def extra_repr(self) -> str:
        """Return what print() shows of it."""
        return f"p={self.p}, seed={self.seed}"


def name_layers(model: nn.Module) -> None:
    """Tell every Dropout its name in the whole model; one that occurs twice keeps the first."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.layer = name


Shown = Sequence[tuple[Dropout, Draws]]
"""What the Dropouts of a model were shown for one forward, and have drawn in it."""


def show_samples(model: nn.Module, samples: Samples | None) -> Shown:
    """Tell every Dropout which samples come next, and count its calls from 0 again."""
    layers = [module for module in model.modules() if isinstance(module, Dropout)]
    for layer in layers:
        layer.draws = None if samples is None else Draws.begin(samples)
    return [(layer, layer.draws) for layer in layers if layer.draws is not None]


def show_again(shown: Shown) -> None:
    """Tell Dropouts that the backward of an earlier forward begins.

    A part of that forward may run again within, by torch.utils.checkpoint.
    """
    for layer, draws in shown:
        draws.since = 0
        layer.draws = draws


def same_masks(
    module: nn.Module,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Return a context_fn for torch.utils.checkpoint of what calls Dropouts within `module`.

    By it the repetition draws what the first run drew, however often each of them is called, and
    whatever is shown meanwhile:

        checkpoint(block, x, use_reentrant=False, context_fn=same_masks(block))
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _Repetition(module)

    return contexts


class _Repetition(AbstractContextManager[None]):
    """Let Dropouts draw from where they are when this is made; as often as it is entered."""

    def __init__(self, module: nn.Module) -> None:
        self._places = [
            (layer, replace(layer.draws, knows_place=True))
            for layer in module.modules()
            if isinstance(layer, Dropout) and layer.draws is not None
        ]
        self._before: list[Draws | None] = []

    def __enter__(self) -> None:
        self._before = [layer.draws for layer, _ in self._places]
        for layer, place in self._places:
            layer.draws = replace(place)

    def __exit__(self, *_: object) -> None:
        for (layer, _place), draws in zip(self._places, self._before, strict=True):
            layer.draws = draws
