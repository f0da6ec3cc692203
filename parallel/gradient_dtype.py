"""The dtype of a parameter's gradients, which may be another than its own by `grad_dtype`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["gradient_dtype", "new_gradient", "take_gradient_dtype"]


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype that backward gives a parameter's gradient; it takes a microsecond.

    That is the parameter's own dtype if torch has no `grad_dtype`, or if that allows any dtype.
    """
    chosen: torch.dtype | None = getattr(parameter, "grad_dtype", None)
    return parameter.dtype if chosen is None else chosen


def new_gradient(parameter: Tensor) -> Tensor:
    """Return memory for a parameter's gradient, with its strides."""
    return torch.empty_like(parameter, dtype=gradient_dtype(parameter), requires_grad=False)


def take_gradient_dtype(parameter: nn.Parameter, other: nn.Parameter) -> None:
    """Let a parameter have gradients of the dtype that another one's have."""
    chosen = getattr(other, "grad_dtype", other.dtype)
    if chosen != other.dtype:  # else it goes on following its parameter's
        parameter.grad_dtype = chosen
