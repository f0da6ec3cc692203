"""Cut buckets of parameters into equal parts, one per rank, without regard to where one ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..comm.dtypes import DTYPES
from .buckets import Bucket, plan_buckets
from .gradient_dtype import gradient_dtype
from .sparse import as_dense
from .tensors import dtype_name, member_of

__all__ = ["Piece", "Shard", "shards_of"]


@dataclass(frozen=True)
class Piece:
    """The part [first, end) of one flattened parameter that this rank updates.

    parameter: its elements, in the memory of the shard.
    at: where they lie in the shard's `flat`.
    """

    name: str
    whole: nn.Parameter
    first: int
    end: int
    parameter: nn.Parameter
    at: slice


class Shard:
    """One rank's part of one bucket.

    members: the bucket's (name, parameter) pairs, the same on every rank.
    flat: `length` elements, the same number on every rank; the last may belong to no parameter.
    pieces: the parts of members that lie in it.
    """

    def __init__(
        self, members: Sequence[tuple[str, nn.Parameter]], bucket: Bucket, rank: int, size: int
    ) -> None:
        self.members = list(members)
        self.bucket = bucket
        self.length = -(-bucket.count // size)
        device = self.members[0][1].device
        self.flat = torch.zeros(self.length, dtype=getattr(torch, bucket.dtype), device=device)
        self.pieces: list[Piece] = []
        self._size = size
        start, stop = rank * self.length, (rank + 1) * self.length
        for name, whole, place in self.columns():
            low, high = max(start, place.start), min(stop, place.stop)
            if low < high:
                at = slice(low - start, high - start)
                view = nn.Parameter(self.flat[at], requires_grad=False)
                first, end = low - place.start, high - place.start
                self.pieces.append(Piece(name, whole, first, end, view, at))

    def columns(self) -> Iterator[tuple[str, nn.Parameter, slice]]:
        """Yield name and parameter of every member, and where it lies in the bucket."""
        offsets, counts = self.bucket.offsets, self.bucket.counts
        for (name, parameter), offset, count in zip(self.members, offsets, counts, strict=True):
            yield name, parameter, slice(offset, offset + count)

    def load_parameters(self) -> None:
        """Copy this rank's part out of the parameters."""
        for piece in self.pieces:
            piece.parameter.copy_(piece.whole.detach().reshape(-1)[piece.first : piece.end])

    def store_parameters(self, rows: Tensor) -> None:
        """Copy all ranks' parts, a row each, into the parameters."""
        whole = rows.reshape(-1)
        for _, parameter, place in self.columns():
            parameter.copy_(whole[place].view(parameter.shape))

    def gradients(self) -> Tensor:
        """Return the gradients of all members, end to end, in equal parts for all ranks."""
        length = self.length * self._size
        whole = torch.zeros(length, dtype=self.flat.dtype, device=self.flat.device)
        for _, parameter, place in self.columns():
            if parameter.grad is not None:
                whole[place] = _flat(parameter.grad)
        return whole

    def hand_gradients(self, own: Tensor | None, present: set[str]) -> None:
        """Give the pieces of the present parameters their gradients.

        own: of this shard; None to take them from the parameters.
        """
        for piece in self.pieces:
            if piece.name not in present:
                piece.parameter.grad = None
            elif own is not None:
                piece.parameter.grad = own[piece.at]
            else:
                assert piece.whole.grad is not None
                piece.parameter.grad = _flat(piece.whole.grad)[piece.first : piece.end].clone()


def shards_of(
    members: Sequence[tuple[str, nn.Parameter]], rank: int, size: int, bucket_bytes: int
) -> list[Shard]:
    """Return this rank's shards of the members, bucket by bucket.

    TypeError for a complex parameter, one of a dtype that communicators do not know, or one whose
    gradients have another dtype.
    """
    for name, parameter in members:
        if dtype_name(parameter.dtype) not in DTYPES:
            raise TypeError(f"{name}: a parameter of {parameter.dtype} cannot be sharded")
        if parameter.is_complex():
            raise TypeError(f"{name}: a complex parameter cannot be sharded, view it as real")
        if gradient_dtype(parameter) != parameter.dtype:
            raise TypeError(
                f"{name}: a parameter of {parameter.dtype} with gradients of "
                f"{gradient_dtype(parameter)} (grad_dtype) cannot be sharded"
            )
    described = {index: member_of(*member) for index, member in enumerate(members)}
    buckets = plan_buckets(described, bucket_bytes, range(len(members)))
    return [
        Shard([members[index] for index in bucket.indices], bucket, rank, size)
        for bucket in buckets
    ]


def _flat(gradient: Tensor) -> Tensor:
    dense = as_dense(gradient)
    return dense.detach().reshape(-1)
