"""Gather gradients into a flat bucket and bring them back, in one compiled call each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .replicas import dtype_name, real_view

if TYPE_CHECKING:
    from ..kernels.table import PointerTable

__all__ = ["WIRES", "Flattened", "host_array", "wire_of"]

# The user's word for the wire to the element that a bucket of each dtype then has. A half is
# never narrowed to the other half: that would only lose bits.
WIRES: Mapping[str, Mapping[str, str]] = {
    "fp32": {
        "float64": "float32",
        "float32": "float32",
        "float16": "float32",
        "bfloat16": "float32",
    },
    "bf16": {"float64": "bfloat16", "float32": "bfloat16"},
    "fp16": {"float64": "float16", "float32": "float16"},
}


def wire_of(dtype: str, wire: str | None) -> str:
    """Return the dtype that gradients of `dtype` have on the wire; itself without a wire name."""
    if wire is None:
        return dtype
    if wire not in WIRES:
        known = ", ".join(WIRES)
        raise ValueError(f"unknown wire dtype {wire!r}, expected None or one of: {known}")
    return WIRES[wire].get(dtype, dtype)


def host_array(flat: Tensor) -> NDArray[Any]:
    """View a flat CPU tensor as NumPy; bfloat16 as its uint16 bits."""
    bits = flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat
    return bits.numpy()


class Flattened:
    """Tie gradients to their places in a flat bucket.

    `gradients[i]` may be None, sparse, complex or strided: what is packed, and unpacked into, is a
    dense contiguous real tensor, which is the gradient's own memory wherever that is possible.
    """

    def __init__(self, gradients: Sequence[Tensor | None], offsets: Sequence[int]) -> None:
        self._gradients = list(gradients)
        self._dense = [None if g is None else _dense(g) for g in gradients]
        self._offsets = list(offsets)
        self._table = self._point(range(len(gradients)))

    def pack(self, flat: Tensor, scale: float) -> bool:
        """Write the gradients times `scale` into the bucket; tell whether all are finite."""
        from ..kernels.pack import pack

        if self._table is None:
            return True
        table, dtype = self._table
        return bool(pack(table, dtype, host_array(flat), dtype_name(flat.dtype), scale).finite)

    def unpack(self, flat: Tensor, used: Sequence[bool], parameters: Sequence[Tensor]) -> None:
        """Write the bucket back into the gradients of the used parameters.

        A parameter without a gradient that is used elsewhere gets one; `parameters[i].grad` is
        assigned for those.
        """
        from ..kernels.pack import unpack

        chosen = [i for i, is_used in enumerate(used) if is_used]
        created = [i for i in chosen if self._gradients[i] is None]
        for i in created:
            self._gradients[i] = torch.empty_like(
                parameters[i], memory_format=torch.contiguous_format, requires_grad=False
            )
            self._dense[i] = real_view(self._gradients[i])  # type: ignore[arg-type]
        pointed = self._table
        if created or any(self._dense[i] is not None and not used[i] for i in range(len(used))):
            pointed = self._point(chosen)
        if pointed is None:
            return
        table, dtype = pointed
        unpack(table, dtype, host_array(flat), dtype_name(flat.dtype))
        for i in chosen:
            _bring_back(self._gradients[i], self._dense[i], parameters[i])

    def _point(self, chosen: Sequence[int]) -> tuple[PointerTable, str] | None:
        from ..kernels.table import PointerTable

        pairs = [(self._dense[i], self._offsets[i]) for i in chosen]
        present = [(tensor, offset) for tensor, offset in pairs if tensor is not None]
        if not present:
            return None
        first = present[0][0]
        table = PointerTable(
            addresses=np.array([tensor.data_ptr() for tensor, _ in present], dtype=np.int64),
            counts=np.array([tensor.numel() for tensor, _ in present], dtype=np.int64),
            offsets=np.array([offset for _, offset in present], dtype=np.int64),
            itemsize=first.element_size(),
            owners=tuple(tensor for tensor, _ in present),
        )
        return table, dtype_name(first.dtype)


def _dense(gradient: Tensor) -> Tensor:
    dense = gradient.detach()
    if dense.layout != torch.strided:
        dense = dense.to_dense()
    return real_view(dense).contiguous()


def _bring_back(gradient: Tensor | None, dense: Tensor | None, parameter: Tensor) -> None:
    """Make the reduced values the parameter's gradient, where they are not in its memory yet."""
    assert gradient is not None and dense is not None
    whole = torch.view_as_complex(dense) if gradient.is_complex() else dense
    if gradient.layout != torch.strided:
        # Rows that are zero on every rank are absent again, as an optimizer for sparse
        # gradients expects.
        parameter.grad = whole.to_sparse(gradient.sparse_dim())
        return
    if gradient.data_ptr() != dense.data_ptr() or gradient.is_conj():
        gradient.detach().copy_(whole)
    if parameter.grad is not gradient:
        parameter.grad = gradient
