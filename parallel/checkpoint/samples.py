"""Notice tensors that are one by name, but not in fact, by a few of their elements.

Layers that are split over ranks by themselves, as tensor-parallel ones, have a part under the same
name on each, and models that ranks train apart have other values. One of them would be written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["are_apart", "sample_of"]

_COUNT = 8
# More than replicas of other processors may differ, which round otherwise: half-width ones, too.
_APART = 1 / 16


def sample_of(tensor: Tensor) -> list[float]:
    """Return some elements, evenly spaced; none of what is no dense tensor of floats."""
    if tensor.layout != torch.strided or not tensor.is_floating_point() or not tensor.numel():
        return []
    step = max(1, tensor.numel() // _COUNT)
    own = tensor.detach()
    if own.is_contiguous():
        few = own.view(-1)[::step][:_COUNT]
    else:
        places = torch.arange(0, tensor.numel(), step, device=own.device)[:_COUNT]
        few = own[torch.unravel_index(places, own.shape)]
    found: list[float] = few.double().tolist()
    return found


def are_apart(left: Sequence[float], right: Sequence[float]) -> bool:
    """Tell whether samples are of different tensors: at least half of the elements are far off."""
    pairs = list(zip(left, right, strict=True))
    far = sum(abs(a - b) > _APART * max(abs(a), abs(b)) for a, b in pairs)
    return 0 < len(pairs) <= 2 * far
