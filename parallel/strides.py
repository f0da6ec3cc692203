"""Gradients and optimizer state with the strides of their parameters.

A parameter may lie in memory as channels_last or as a transpose. What autograd and optimizers make
for it lies as it does, and fused optimizers walk through the memory of all of them in one order.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["laid_out_like", "overlaps"]


def laid_out_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return `value` with the strides of a parameter of the same shape; device and dtype stay.

    `value` itself if it has them already, or is of another shape or layout.
    """
    if value.shape != parameter.shape or value.layout != torch.strided:
        return value
    made = torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False)
    return value if made.stride() == value.stride() else made.copy_(value)


def overlaps(tensor: Tensor) -> bool:
    """Tell whether elements share memory, as where a tensor is expanded; it cannot be written."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
