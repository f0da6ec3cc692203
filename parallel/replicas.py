"""Make replicas equal: check that they can be, then send one rank's tensors to all."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..comm.arguments import whole
from ..comm.dtypes import DTYPES
from ..comm.texts import few, gather_texts, shown_ranks
from .buckets import plan_buckets
from .gradient_dtype import gradient_dtype
from .tensors import dtype_name, member_of, real_view

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = [
    "broadcast_tensors",
    "check_equal",
    "check_root",
    "check_sendable",
    "describe",
]


def describe(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return one line per tensor: name, shape, dtype, whether it is a frozen parameter.

    The dtype of its gradients, too, if that is another. Of one that cannot be sent, why not.
    """
    lines = []
    for name, tensor in named:
        problem = _problem(tensor)
        lines.append(f"{name} {problem or _kind(tensor) + _trained(tensor)}")
    return lines


def check_sendable(named: Iterable[tuple[str, Tensor]], *, empty_only: bool = False) -> None:
    """Refuse a tensor that ranks cannot make equal; or only one without values, empty_only.

    ValueError by name, on every rank where `check_equal` has compared what `describe` returned.
    """
    for name, tensor in named:
        problem = _problem(tensor)
        if problem and (not empty_only or _is_lazy(tensor) or tensor.is_meta):
            raise ValueError(f"{name} {problem}")


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {dtype_name(tensor.dtype)}"


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, UninitializedParameter | UninitializedBuffer)


def _problem(tensor: Tensor) -> str | None:
    if _is_lazy(tensor):
        return "has no shape yet: run a forward of its lazy module first"
    if tensor.is_meta:
        return f"{_kind(tensor)} is on the meta device: give it values first, as by to_empty"
    if tensor.layout != torch.strided:
        return f"{_kind(tensor)} has the layout {tensor.layout}, expected a dense tensor"
    if any(stride == 0 < n - 1 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return f"{_kind(tensor)} is expanded and cannot be written: clone it"
    return None


def _trained(tensor: Tensor) -> str:
    if not isinstance(tensor, nn.Parameter):
        return ""
    dtype = gradient_dtype(tensor)
    other = "" if dtype == tensor.dtype else f" with gradients of {dtype_name(dtype)}"
    return other if tensor.requires_grad else other + " frozen"


def check_equal(
    comm: Communicator, lines: Sequence[str] | Callable[[], Sequence[str]], what: str
) -> None:
    """Refuse ranks that describe `what` differently.

    lines: of this rank's own, or what returns them, raising ValueError or TypeError where it holds
        what cannot be described: every rank is told then.

    Collective. ValueError on every rank, naming the first line that differs and which ranks hold
    which. One small message when all are equal.
    """
    try:
        text, error = "\n".join(lines() if callable(lines) else lines).encode(), None
    except (ValueError, TypeError) as raised:
        text, error = str(raised).encode(errors="backslashreplace"), raised
    if comm.size == 1:
        if error is not None:
            raise error
        return
    own = [error is not None, len(text), zlib.crc32(text), zlib.adler32(text)]
    table = comm.allgather(np.array(own, dtype=np.int64))
    failed, digests = table[:, 0].nonzero()[0].tolist(), table[:, 1:]
    if not failed and (digests == digests[0]).all():
        return
    texts = gather_texts(comm, text.decode())
    if failed:
        alike = [rank for rank in failed if texts[rank] == texts[failed[0]]]
        if error is not None and len(alike) == comm.size:
            raise error
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{what}, on {shown_ranks(alike)}: {texts[failed[0]]}") from error
    columns = zip_longest(*(text.split("\n") for text in texts), fillvalue="nothing")
    for position, column in enumerate(columns):
        if len(set(column)) > 1:
            holders = {line: [r for r, c in enumerate(column) if c == line] for line in column}
            shown = few(
                [f"{line or 'nothing'} on {shown_ranks(r)}" for line, r in holders.items()], "; "
            )
            raise ValueError(f"{what} differ between ranks, first at entry {position}: {shown}")


def broadcast_tensors(
    comm: Communicator, tensors: Iterable[Tensor], root: int, limit_bytes: int
) -> None:
    """Overwrite the tensors of every rank with those of root, in flat pieces of one dtype.

    Collective; the tensors must agree in shape and dtype. Any dtype and any strides.
    """
    wholes = [tensor.detach() for tensor in tensors]
    if comm.size == 1 or not wholes:
        return
    targets = [real_view(tensor) for tensor in wholes]
    members = {index: member_of("", tensor) for index, tensor in enumerate(targets)}
    for bucket in plan_buckets(members, limit_bytes):
        if bucket.count == 0:
            continue
        parts = [targets[index] for index in bucket.indices]
        flat = torch.cat([part.reshape(-1) for part in parts])
        # A dtype that communicators do not know, such as one of 8 bits, travels as bytes.
        comm.broadcast(flat if bucket.dtype in DTYPES else flat.view(torch.uint8), root=root)
        if comm.rank != root:
            for part, offset in zip(parts, bucket.offsets, strict=True):
                part.copy_(flat[offset : offset + part.numel()].view(part.shape))
            for index in bucket.indices:
                if wholes[index].is_conj():  # the target is a copy
                    wholes[index].copy_(torch.view_as_complex(targets[index]))


def check_root(comm: Communicator, root: int) -> None:
    """Refuse a root that is no rank of the communicator; the same on every rank."""
    if not 0 <= whole("root", root) < comm.size:
        raise ValueError(f"expected a root from 0 to {comm.size - 1}, got {root}")
