"""Copy tensors into a bucket and back, by whatever fits the memory that the bucket lies in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .device_transfer import Members, pack_on_device, unpack_on_device
from .tensors import dtype_name

if TYPE_CHECKING:
    from ..kernels.table import PointerTable

__all__ = [
    "Finite",
    "Pack",
    "Unpack",
    "are_few",
    "host_array",
    "pack_few",
    "transfer_of",
]

# Up to so many tensors, and elements of them all, torch's operations are done before a kernel is
# called; on one core of an AMD EPYC, 2 tensors of 512 elements take 4 and 21 us.
_FEW, _SMALL = 16, 1 << 17

# Dtypes of buckets in which torch multiplies and rounds as the kernels do.
_PLAIN = (torch.float32, torch.float64)

Finite = bool | Callable[[], bool] | None
"""Whether all is finite, if known; or what tells once the bucket has been reduced."""

Pack = Callable[[Members, Tensor, float], Finite]
"""(members, bucket, scale) -> whether all is finite."""

Unpack = Callable[[Members, Tensor], None]


def host_array(flat: Tensor) -> NDArray[Any]:
    """View a flat CPU tensor as NumPy; bfloat16 as its uint16 bits."""
    bits = flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat
    return bits.numpy()


def are_few(members: Members, flat: Tensor) -> bool:
    """Tell whether `pack_few` may and should pack tensors of one dtype into a bucket."""
    return (
        len(members) <= _FEW
        and flat.dtype in _PLAIN
        and members[0][0].dtype == flat.dtype
        and flat.device.type == "cpu"
        and sum(tensor.numel() for tensor, _ in members) <= _SMALL
    )


def pack_few(members: Members, places: list[Tensor], around: Tensor, scale: float) -> bool:
    """Do as the kernel does, without the cost of pointing it to every tensor.

    places: a flat view of the bucket for each member.  around: a part of it that holds them all.
    """
    torch._foreach_copy_(places, [tensor.view(-1) for tensor, _ in members])
    if scale != 1.0:
        torch._foreach_mul_(places, scale)
    # A sum is finite only where all it adds up is; where it is not, something else may be why.
    return isfinite(around.sum().item()) or all(bool(place.isfinite().all()) for place in places)


def _pack_by_kernel(members: Members, flat: Tensor, scale: float) -> bool:
    from ..kernels.pack import pack

    table, dtype = _point(members)
    return bool(pack(table, dtype, host_array(flat), dtype_name(flat.dtype), scale).finite)


def _unpack_by_kernel(members: Members, flat: Tensor) -> None:
    from ..kernels.pack import unpack

    table, dtype = _point(members)
    unpack(table, dtype, host_array(flat), dtype_name(flat.dtype))


def _point(members: Members) -> tuple[PointerTable, str]:
    from ..kernels.table import PointerTable

    first = members[0][0]
    table = PointerTable(
        addresses=np.array([tensor.data_ptr() for tensor, _ in members], dtype=np.int64),
        counts=np.array([tensor.numel() for tensor, _ in members], dtype=np.int64),
        offsets=np.array([offset for _, offset in members], dtype=np.int64),
        itemsize=first.element_size(),
        owners=tuple(tensor for tensor, _ in members),
    )
    return table, dtype_name(first.dtype)


_BY_DEVICE: Mapping[str, tuple[Pack, Unpack]] = MappingProxyType(
    {
        "cpu": (_pack_by_kernel, _unpack_by_kernel),
        "cuda": (pack_on_device, unpack_on_device),
    }
)


def transfer_of(flat: Tensor) -> tuple[Pack, Unpack]:
    """Return what packs into and unpacks from a bucket.

    Raises: TypeError for a bucket on a device that gradients cannot be reduced on.
    """
    found = _BY_DEVICE.get(flat.device.type)
    if found is None:
        known = ", ".join(_BY_DEVICE)
        raise TypeError(f"gradients on device {flat.device}: expected one of: {known}")
    return found
