"""Find out, when asked, whether replicas are still equal, and which ranks had which gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..comm.errors import MismatchError
from ..comm.texts import few, shown_ranks
from .demands import require_comm
from .objects import allgather_objects
from .tensors import flat_bytes

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["GradientReport", "check_replicas", "report_gradients"]


def check_replicas(comm: Communicator, named: Iterable[tuple[str, Tensor]]) -> str:
    """Compare the bits of all ranks' tensors by a hash; return it, in hexadecimal.

    Names, shapes and dtypes count as well. Collective. MismatchError on every rank, naming the
    first tensor that differs and which ranks hold which, and how many others do.
    """
    require_comm(comm)
    digests = {name: _digest(name, tensor) for name, tensor in named}
    whole = hashlib.sha256(b"".join(digests.values())).digest()
    rows = comm.allgather(np.frombuffer(whole, dtype=np.uint8))
    if (rows == rows[0]).all():
        return whole.hex()
    everyone: list[dict[str, bytes]] = allgather_objects(digests, comm)
    names = dict.fromkeys(name for found in everyone for name in found)
    differing = [n for n in names if len({found.get(n) for found in everyone}) > 1]
    first = differing[0]
    holders: dict[bytes | None, list[int]] = {}
    for rank, found in enumerate(everyone):
        holders.setdefault(found.get(first), []).append(rank)
    groups = few([shown_ranks(ranks) for ranks in holders.values()], " from ")
    raise MismatchError(
        f"replicas differ in {len(differing)} of {len(names)} tensors, first in {first}: {groups}"
    )


@dataclass(frozen=True)
class GradientReport:
    """Tell which ranks had which gradients in a step.

    partial: the ranks that had a gradient, for parameters that had one on some ranks only.
    unused: the parameters that had a gradient on no rank.
    """

    size: int
    partial: dict[str, tuple[int, ...]]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{name}: gradient on {shown_ranks(ranks)} of {self.size}, zeros for the others"
            for name, ranks in self.partial.items()
        ]
        lines += [f"{name}: gradient on no rank" for name in self.unused]
        return "\n".join(lines or ["every parameter had a gradient on every rank"])


def report_gradients(comm: Communicator, unused: Sequence[str]) -> GradientReport:
    """Join what the ranks say about a step; unused: names without a gradient on this rank.

    Collective.
    """
    missing: list[list[str]] = allgather_objects(list(unused), comm)
    lacking: dict[str, set[int]] = {}
    for rank, names in enumerate(missing):
        for name in names:
            lacking.setdefault(name, set()).add(rank)
    ranks = range(comm.size)
    return GradientReport(
        comm.size,
        {
            n: tuple(r for r in ranks if r not in w)
            for n, w in lacking.items()
            if len(w) < comm.size
        },
        tuple(n for n, w in lacking.items() if len(w) == comm.size),
    )


def _digest(name: str, tensor: Tensor) -> bytes:
    plain = flat_bytes(tensor.cpu())
    head = f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode()
    return hashlib.sha256(head + plain.numpy().tobytes()).digest()
