"""Gather gradients into a flat bucket and bring them back, in one compiled call each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .replicas import real_view
from .sparse import as_dense
from .transfer import Finite, transfer_of

__all__ = ["WIRES", "Flattened", "in_place", "wire_of"]

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


class Flattened:
    """Tie gradients to their places in a flat bucket, where they live once they were reduced.

    `gradients[i]` may be None, sparse, complex or strided. One that lies at its place already is
    not copied, neither in nor out.
    """

    def __init__(
        self, gradients: Sequence[Tensor | None], offsets: Sequence[int], flat: Tensor
    ) -> None:
        self._gradients = list(gradients)
        self._offsets = list(offsets)
        self._flat = flat
        self._dense = [None if g is None else _dense(g) for g in gradients]
        start, itemsize = flat.data_ptr(), flat.element_size()
        self._at_home = [
            d is not None and d.dtype == flat.dtype and d.data_ptr() == start + offset * itemsize
            for d, offset in zip(self._dense, offsets, strict=True)
        ]

    def pack(self, parameters: Sequence[Tensor], scale: float) -> Finite:
        """Write the gradients times `scale` into the bucket, zeros for those that are not there.

        A scale of 0 takes no gradient in. Tell whether all are finite, as `transfer.Finite` has
        it; None where some lay there already and were not looked at.
        """
        if scale == 0.0:
            self._flat.zero_()
            return True
        looked_at = True
        for i, dense in enumerate(self._dense):
            if dense is None:
                self._place(i, real_view(parameters[i]).numel()).zero_()
            elif self._at_home[i] and dense.numel():
                looked_at = False
                if scale != 1.0:
                    self._place(i, dense.numel()).mul_(scale)
        members = self._members([i for i, at_home in enumerate(self._at_home) if not at_home])
        if not members:
            return True if looked_at else None
        pack, _ = transfer_of(self._flat)
        finite = pack(members, self._flat, scale)
        return finite if looked_at or finite is False else None

    def unpack(self, used: Sequence[bool], parameters: Sequence[Tensor]) -> None:
        """Make the bucket's values the gradients of the used parameters.

        Where the bucket has a parameter's dtype and layout, its gradient becomes a view of the
        bucket; else the values are written into the gradient that it has, or into a new one.
        """
        written = []
        for i, parameter in enumerate(parameters):
            if not used[i]:
                continue
            if _real_dtype(parameter) == self._flat.dtype:
                self._settle(i, parameter)
            else:
                written.append(i)
                if self._gradients[i] is None:
                    self._gradients[i] = torch.empty_like(
                        parameter, memory_format=torch.contiguous_format, requires_grad=False
                    )
                    self._dense[i] = real_view(self._gradients[i])  # type: ignore[arg-type]
        members = self._members(written)
        if not members:
            return
        _, unpack = transfer_of(self._flat)
        unpack(members, self._flat)
        for i in written:
            _bring_back(self._gradients[i], self._dense[i], parameters[i])

    def _place(self, i: int, count: int) -> Tensor:
        return self._flat[self._offsets[i] : self._offsets[i] + count]

    def _settle(self, i: int, parameter: Tensor) -> None:
        """Let a gradient that the bucket can hold live there."""
        if self._at_home[i]:
            return
        gradient = self._gradients[i]
        shape, strides = _plain_place(parameter)
        start = self._flat.storage_offset() + self._offsets[i]
        view = self._flat.as_strided(shape, strides, start)
        if gradient is None or _can_move(gradient, parameter):
            parameter.grad = torch.view_as_complex(view) if parameter.is_complex() else view
        else:
            _bring_back(gradient, view, parameter)

    def _members(self, chosen: Sequence[int]) -> list[tuple[Tensor, int]]:
        pairs = [(self._dense[i], self._offsets[i]) for i in chosen]
        return [(tensor, offset) for tensor, offset in pairs if tensor is not None]


def _real_dtype(parameter: Tensor) -> torch.dtype:
    return parameter.dtype.to_real() if parameter.is_complex() else parameter.dtype


def _plain_place(parameter: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """Return shape and strides of the parameter's real elements, end to end."""
    if not parameter.is_complex() and parameter.is_contiguous():
        return parameter.shape, parameter.stride()
    plain = torch.empty_like(parameter, device="meta", memory_format=torch.contiguous_format)
    real = real_view(plain.detach())
    return real.shape, real.stride()


def in_place(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Return a gradient's own memory as a flat tensor, None where it is no contiguous real one."""
    if gradient is None or not _can_move(gradient, parameter) or not gradient.is_contiguous():
        return None
    return real_view(gradient.detach()).view(-1)


def _can_move(gradient: Tensor, parameter: Tensor) -> bool:
    """Tell whether nothing but values is lost when other memory becomes the gradient."""
    return (
        gradient.layout == torch.strided
        and parameter.is_contiguous()
        and not gradient.requires_grad
        and not gradient.is_conj()
    )


def _dense(gradient: Tensor) -> Tensor:
    return real_view(as_dense(gradient.detach())).contiguous()


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
