"""Make a mask of dropout in the memory of the GPU that uses it."""

from __future__ import annotations

import torch
from torch import Tensor

from .device_transfer import launcher_of

__all__ = ["mask_on_device"]


def mask_on_device(
    device: torch.device, key: tuple[int, int], sample: int, rows: int, count: int, least: int
) -> Tensor | None:
    """Return rows x count flags on a GPU, as `kernels.masks.mask` makes them, on its stream.

    None for a device that is no GPU, or where no kernel can be compiled and run.
    """
    launcher = launcher_of(device)
    if launcher is None:
        return None
    from ..kernels.device.masks import mask
    from ..kernels.device.table import Span

    kept = torch.empty(rows * count, dtype=torch.bool, device=device)
    mask(Span(kept.data_ptr(), kept.numel()), rows, sample, key, least, launcher)
    return kept
