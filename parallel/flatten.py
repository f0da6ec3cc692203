"""Gather gradients into a flat bucket and bring them back, in one call each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .gradient_dtype import new_gradient
from .sparse import as_dense
from .tensors import overlaps, real_view
from .transfer import Finite, are_few, pack_few, transfer_of

__all__ = ["WIRES", "Flattened", "Home", "in_place", "wire_of"]

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


class Home:
    """The flat memory of a bucket, and where its gradients live in it from pass to pass.

    flat: the bucket's memory.
    dtype: the gradients' own, of their real elements.
    offsets: where each gradient starts.
    places: a flat view for each gradient.
    addresses: of these views.
    elements: the part that holds gradients.
    rest: the part behind it, for flags.
    left: the values of `rest` after the last pass, None if unknown.
    own_uses: references to the memory, other than gradients', after the last pass.
    """

    def __init__(
        self, flat: Tensor, offsets: Sequence[int], counts: Sequence[int], dtype: torch.dtype
    ) -> None:
        self.flat = flat
        self.dtype = dtype
        self.offsets = offsets
        self.places = [flat[o : o + count] for o, count in zip(offsets, counts, strict=True)]
        self.elements, self.rest = flat[: sum(counts)], flat[sum(counts) :]
        self.left: list[float] | None = None
        self.own_uses: int | None = None
        start, itemsize = flat.data_ptr(), flat.element_size()
        self.addresses = [start + offset * itemsize for offset in offsets]
        self._views: list[tuple[torch.Size, Tensor] | None] = [None] * len(self.places)

    def view(self, i: int, parameter: Tensor) -> Tensor:
        """Return a place as the gradient of a parameter, as real pairs where that is complex."""
        known = self._views[i]
        if known is None or known[0] != parameter.shape:
            shape, strides = _plain_place(parameter)
            start = self.flat.storage_offset() + self.offsets[i]
            known = self._views[i] = parameter.shape, self.flat.as_strided(shape, strides, start)
        return known[1].detach()  # what an owner does to its gradient, such as setting flags, stays


class Flattened:
    """Tie gradients to their places in a flat bucket, where they live once they were reduced.

    `gradients[i]` may be None, sparse, complex or strided. One that lies at its place already is
    not copied, neither in nor out.
    """

    def __init__(self, gradients: Sequence[Tensor | None], home: Home) -> None:
        self._gradients = list(gradients)
        self.home = home
        self._flat = flat = home.flat
        self._dense = [None if g is None else _dense(g) for g in gradients]
        self._at_home = []
        start = flat.data_ptr()
        end = start + flat.nbytes
        for i, (dense, address) in enumerate(zip(self._dense, home.addresses, strict=True)):
            there = -1 if dense is None else dense.data_ptr()
            at_home = there == address and dense is not None and dense.dtype == flat.dtype
            self._at_home.append(at_home)
            if start <= there < end and not at_home:
                self._take_away(i)

    def _take_away(self, i: int) -> None:
        """Copy a gradient that lies at another one's place, as where the owner has swapped two."""
        gradient = self._gradients[i]
        assert gradient is not None
        if gradient.numel():  # one without elements may have any address
            self._gradients[i] = gradient.detach().clone()
            self._dense[i] = _dense(self._gradients[i])  # type: ignore[arg-type]

    @property
    def takes_from_others(self) -> bool:
        """Tell whether packing would overwrite gradients of an earlier pass that somebody keeps.

        False while a parameter's gradient lives here: its use of the memory cannot be told from
        somebody else's.
        """
        own_uses = self.home.own_uses
        if own_uses is None or any(self._at_home):
            return False
        return _uses(self._flat) > own_uses

    def pack(self, scale: float) -> Finite:
        """Write the gradients times `scale` into the bucket, zeros for those that are not there.

        With a scale of 0 the gradients are not read. Return whether all are finite, as a
        `transfer.Finite`; None where some lay there already and were not looked at.
        """
        if scale == 0.0:
            self.home.elements.zero_()
            return True
        looked_at, away = True, []
        for i, dense in enumerate(self._dense):
            if dense is None:
                self.home.places[i].zero_()
            elif not self._at_home[i]:
                away.append(i)
            elif dense.numel():
                looked_at = False
                if scale != 1.0:
                    self.home.places[i].mul_(scale)
        if not away:
            return True if looked_at else None
        finite = self._bring(away, scale)
        return finite if looked_at or finite is False else None

    def _bring(self, away: Sequence[int], scale: float) -> Finite:
        members = self._members(away)
        if are_few(members, self._flat):
            places = [self.home.places[i] for i in away]
            return pack_few(members, places, self.home.elements, scale)
        pack, _ = transfer_of(self._flat)
        return pack(members, self._flat, scale)

    def unpack(self, used: Sequence[bool], parameters: Sequence[Tensor]) -> None:
        """Make the bucket's values the gradients of the used parameters.

        Where the bucket has a gradient's dtype and layout, the gradient becomes a view of the
        bucket; else the values are written into the gradient that it has, or into a new one.
        """
        written = []
        alike = self.home.dtype == self._flat.dtype
        for i, parameter in enumerate(parameters):
            if not used[i]:
                continue
            if alike:
                self._settle(i, parameter)
            else:
                written.append(i)
                if self._gradients[i] is None:
                    self._gradients[i] = made = new_gradient(parameter)
                    # Where the parameter is not contiguous, this is a copy to write to first.
                    self._dense[i] = real_view(made).contiguous()
        self.home.own_uses = _uses(self._flat) - sum(self._at_home)
        members = self._members(written)
        if not members:
            return
        _, unpack = transfer_of(self._flat)
        unpack(members, self._flat)
        for i in written:
            _bring_back(self._gradients[i], self._dense[i], parameters[i])

    def _settle(self, i: int, parameter: Tensor) -> None:
        """Let a gradient that the bucket can hold live there."""
        if self._at_home[i]:
            return
        gradient, view = self._gradients[i], self.home.view(i, parameter)
        lives_here = not (parameter.is_complex() and view.storage_offset() % 2)
        if not lives_here:  # behind an odd number of real elements no complex one may begin
            view = view.clone()
        if gradient is None and not parameter.is_contiguous():
            gradient = new_gradient(parameter)
        if gradient is None or _can_move(gradient, parameter):
            parameter.grad = torch.view_as_complex(view) if parameter.is_complex() else view
            self._at_home[i] = lives_here
        else:
            _bring_back(gradient, view, parameter)

    def _members(self, chosen: Sequence[int]) -> list[tuple[Tensor, int]]:
        pairs = [(self._dense[i], self.home.offsets[i]) for i in chosen]
        return [(tensor, offset) for tensor, offset in pairs if tensor is not None]


def _plain_place(parameter: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """Return shape and strides of the parameter's real elements, end to end."""
    if not parameter.is_complex() and parameter.is_contiguous():
        return parameter.shape, parameter.stride()
    plain = torch.empty_like(parameter, device="meta", memory_format=torch.contiguous_format)
    real = real_view(plain.detach())
    return real.shape, real.stride()


def in_place(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Return a gradient's own memory as a flat tensor; None if it must not be written to.

    It must not if it is not contiguous, or if anything else refers to it.
    """
    if gradient is None or not _can_move(gradient, parameter) or not gradient.is_contiguous():
        return None
    if not _is_sole_owner(gradient):
        return None
    return real_view(gradient.detach()).view(-1)


def _is_sole_owner(gradient: Tensor) -> bool:
    """Tell whether no other tensor has the gradient's memory.

    Autograd may make a gradient of memory that the rest of backward still reads, or that is another
    parameter's gradient as well, and no `_base` tells so: only the count of references does. Memory
    that torch cannot resize is another library's, whose references it does not count.
    """
    return gradient.untyped_storage().resizable() and _uses(gradient) <= _USES_OF_ONE


def _uses(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


_USES_OF_ONE = _uses(torch.empty(1, device="cpu"))
"""The tensor's own use of its memory, and that of whoever counts."""


def _can_move(gradient: Tensor, parameter: Tensor) -> bool:
    """Tell whether nothing but values is lost when other memory becomes the gradient."""
    return (
        gradient.layout == torch.strided
        and parameter.is_contiguous()
        and not gradient.requires_grad
        and not gradient.is_conj()
    )


def _dense(gradient: Tensor) -> Tensor:
    plain = gradient.layout == torch.strided and gradient.is_contiguous()
    if plain and not (gradient.is_complex() or gradient.is_neg() or gradient.requires_grad):
        return gradient
    return real_view(as_dense(gradient.detach()).resolve_neg()).contiguous()


def _bring_back(gradient: Tensor | None, dense: Tensor | None, parameter: Tensor) -> None:
    """Make the reduced values the parameter's gradient, where they are not in its memory yet."""
    assert gradient is not None and dense is not None
    whole = torch.view_as_complex(dense) if gradient.is_complex() else dense
    if gradient.layout != torch.strided:
        # Rows that are zero on every rank are absent again, as an optimizer for sparse
        # gradients expects.
        parameter.grad = whole.to_sparse(gradient.sparse_dim())
        return
    if overlaps(gradient):
        gradient = new_gradient(parameter)
    if gradient.data_ptr() != dense.data_ptr() or gradient.is_conj():
        gradient.detach().copy_(whole)
    if parameter.grad is not gradient:
        parameter.grad = gradient
