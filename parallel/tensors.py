"""What this package often asks of tensors, and torch has no call for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from .buckets import Member

__all__ = [
    "device_of",
    "dtype_name",
    "flat_bytes",
    "laid_out_like",
    "member_of",
    "numbers_of",
    "overlaps",
    "real_view",
]


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def member_of(name: str, tensor: Tensor) -> Member:
    """Describe a tensor for `plan_buckets`; a complex element counts as two real ones."""
    tensor = real_view(tensor)
    return Member(name, tensor.numel(), dtype_name(tensor.dtype), tensor.element_size())


def real_view(tensor: Tensor) -> Tensor:
    """Return a complex tensor as real pairs, any other tensor as it is.

    In the same memory, unless the tensor is a conjugate view: then in a copy.
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's first parameter or buffer lies; the host where it has none."""
    first = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def numbers_of(tensors: Sequence[Tensor]) -> list[float]:
    """Return tensors of one element as numbers; the host waits for a GPU once for all of them."""
    if not tensors:
        return []
    there = tensors[0].device
    found: list[float] = torch.stack([t.detach().reshape(()).to(there) for t in tensors]).tolist()
    return found


def flat_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's elements, in their logical order, as flat bytes; copied only if need be."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # One element counts as contiguous whatever its strides, and then has no view as bytes.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def laid_out_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient, or an optimizer's state, with the strides of its parameter.

    A parameter may lie in memory as channels_last or as a transpose. What autograd and optimizers
    make for it lies as it does, and fused optimizers walk through the memory of all of them in one
    order. Device and dtype stay those of `value`; one of another shape, or that has the strides
    already, is returned as it is.
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
