"""Notice tensors that are one by name, but not in fact, by a few of their elements or by digests.

Layers that are split over ranks by themselves, as tensor-parallel ones, have a part under the same
name on each, and models that ranks train apart have other values. One of them would be written.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from ..tensors import flat_bytes
from .files import raw_bytes

__all__ = ["are_apart", "digest_of", "samples_of"]

_COUNT = 8
_WIDTH = 4096
# More than replicas of other processors may differ, which round otherwise: half-width ones, too.
_APART = 1 / 16


def samples_of(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Return some elements of each tensor, evenly spaced; none unless it is dense and of floats.

    The host waits for a GPU once for all of them.
    """
    few = {name: _few(tensor) for name, tensor in tensors.items()}
    if not few:
        return {}
    there = next(iter(few.values())).device
    values = iter(torch.cat([part.to(there, torch.float64) for part in few.values()]).tolist())
    return {name: list(islice(values, part.numel())) for name, part in few.items()}


def _few(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or not tensor.is_floating_point() or not tensor.numel():
        return torch.empty(0, device=tensor.device)
    step = max(1, tensor.numel() // _COUNT)
    own = tensor.detach()
    if own.is_contiguous():
        return own.view(-1)[::step][:_COUNT]
    places = torch.arange(0, tensor.numel(), step, device=own.device)[:_COUNT]
    return own[torch.unravel_index(places, own.shape)]


def are_apart(left: Sequence[float], right: Sequence[float]) -> bool:
    """Tell whether samples are of different tensors: at least half of the elements are far off."""
    pairs = list(zip(left, right, strict=True))
    far = sum(abs(a - b) > _APART * max(abs(a), abs(b)) for a, b in pairs)
    return 0 < len(pairs) <= 2 * far


def digest_of(tensor: Tensor) -> str:
    """Return a digest of all bits, wherever the tensor lies, for little more than reading it.

    Of the sums along both sides of a rectangle, which tell how elements are placed as well; of the
    elements themselves, where they are few.
    """
    flat = flat_bytes(tensor)
    flat = flat.clone() if flat.storage_offset() % 8 or flat.data_ptr() % 8 else flat
    whole = flat.numel() // 8 * 8
    words, rest = flat[:whole].view(torch.int64), flat[whole:]
    width = max(_WIDTH, math.isqrt(words.numel()))
    rows = words.numel() // width
    square = words[: rows * width].view(rows, width)
    sums = torch.cat([square.sum(0), square.sum(1), words[rows * width :], rest.long()])
    return hashlib.sha256(raw_bytes(sums.cpu())).hexdigest()
