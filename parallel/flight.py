"""Carry one bucket over the ranks, with flags that tell which gradients this rank has.

A carrier starts a bucket and gives a flight: `advance` it until there is no more to wait for, then
`land` it. Two carriers: `DenseCarrier` sends elements and flags in one message, in the dtype of the
wire; `HookCarrier` leaves the elements to a wire hook and sends the flags beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..comm.work import Work
from .buckets import Bucket
from .flatten import Flattened, wire_of
from .hooks import GradientBucket, Rounds, Wire, WireHook, payload
from .replicas import real_view

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from ..comm.work import Receipt

__all__ = ["Carrier", "Flight", "Load", "carrier_of"]


@dataclass(frozen=True)
class Load:
    """What this rank puts into a bucket.

    names, parameters, gradients: of the bucket's members, a gradient None where there is none.
    share: this rank's part of a weighted mean, from 0 to 1; None for the reducer's own op.
    changed: whether requires_grad has changed here; None in a bucket that does not carry that.
    """

    names: tuple[str, ...]
    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor | None]
    share: float | None
    changed: bool | None

    @property
    def flags(self) -> list[bool]:
        """Return what travels beside the elements."""
        own = [gradient is not None for gradient in self.gradients]
        return own if self.changed is None else [*own, self.changed]


@dataclass(frozen=True)
class Flight:
    """One bucket under way.

    finite: whether what was packed here was finite.
    counts: by how many of `size` ranks each flag was set, once there is no more to wait for.
    """

    load: Load
    size: int
    flattened: Flattened
    flat: Tensor
    finite: bool
    rounds: Rounds
    counts: Callable[[], list[float]]

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """Return the receipts of the collectives started so far."""
        return tuple(self.rounds.receipts)

    @property
    def nbytes(self) -> int:
        """Return the bytes that this rank has put into them, flags included."""
        return sum(payload(receipt, self.size) for receipt in self.receipts)

    def land(self, counts: Sequence[float]) -> None:
        """Write the result into the gradients of the parameters that some rank has one of."""
        members = len(self.load.names)
        used = [count > 0 for count in counts[:members]]
        self.flattened.unpack(self.flat, used, self.load.parameters)


class Carrier(Protocol):
    """Start buckets. Collective: every rank starts equal buckets in equal order."""

    def start(self, bucket: Bucket, load: Load) -> Flight: ...

    def forget(self) -> None:
        """Give the memory of the buckets back, since others are to come."""


def carrier_of(wire: Wire, comm: Communicator, op: str) -> Carrier:
    """Return the carrier of a wire format; op: "mean" or "sum" over the ranks."""
    if wire.hook is None:
        return DenseCarrier(comm, op, wire.dtype)
    return HookCarrier(comm, op, wire.hook)


class DenseCarrier:
    """Send a bucket in one allreduce, its flags behind its elements."""

    def __init__(self, comm: Communicator, op: str, dtype: str | None) -> None:
        self._comm = comm
        self._op = op
        self._dtype = dtype
        self._flats: dict[tuple[Bucket, int], Tensor] = {}

    def start(self, bucket: Bucket, load: Load) -> Flight:
        flags = load.flags
        scale, op = (1.0, self._op) if load.share is None else (load.share, "sum")
        flat = _reused(
            self._flats,
            bucket,
            bucket.count + len(flags),
            getattr(torch, wire_of(bucket.dtype, self._dtype)),
            self._comm,
        )
        flattened, finite = _pack(load, bucket, flat, scale)
        flat[bucket.count :] = torch.tensor(flags, dtype=flat.dtype)
        work = self._comm.allreduce(flat, op=op, blocking=False)
        size = self._comm.size
        per_flag = size if op == "mean" else 1

        def counts() -> list[float]:
            return [per_flag * float(flag) for flag in flat[bucket.count :].tolist()]

        return Flight(load, size, flattened, flat, finite, Rounds(_one(work)), counts)

    def forget(self) -> None:
        self._flats.clear()


class HookCarrier:
    """Hand a bucket to a wire hook; its flags are added in a small message of their own."""

    def __init__(self, comm: Communicator, op: str, hook: WireHook) -> None:
        self._comm = comm
        self._hook = hook
        # A hook computes means; the mean of gradients times their number is the sum.
        self._plain = float(comm.size) if op == "sum" else 1.0
        self._flats: dict[tuple[Bucket, int], Tensor] = {}

    def start(self, bucket: Bucket, load: Load) -> Flight:
        scale = self._plain if load.share is None else load.share * self._comm.size
        flat = _reused(self._flats, bucket, bucket.count, getattr(torch, bucket.dtype), self._comm)
        flattened, finite = _pack(load, bucket, flat, scale)
        flags = np.array(load.flags, dtype=np.int32)
        handed = GradientBucket(
            names=load.names,
            shapes=tuple(tuple(real_view(p).shape) for p in load.parameters),
            offsets=bucket.offsets,
            flat=flat,
            present=tuple(g is not None and scale != 0.0 for g in load.gradients),
        )
        rounds = Rounds(self._run(flags, handed))
        size = self._comm.size
        return Flight(load, size, flattened, flat, finite, rounds, lambda: flags.tolist())

    def _run(self, flags: Any, bucket: GradientBucket) -> Generator[Work, Any, None]:
        counting = self._comm.allreduce(flags, op="sum", blocking=False)
        if bucket.names:  # a bucket of nothing carries the flag of a change
            work = self._hook(bucket, self._comm)
            if not isinstance(work, Rounds | Work):
                raise TypeError(
                    f"wire hook {Wire(hook=self._hook)}: expected it to return a Work or Rounds, "
                    f"got {type(work).__name__}: call collectives with blocking=False"
                )
            yield from (work if isinstance(work, Rounds) else Rounds(_one(work))).works()
        yield counting

    def forget(self) -> None:
        self._flats.clear()


def _one(work: Work) -> Generator[Work, Any, None]:
    yield work


def _reused(
    flats: dict[tuple[Bucket, int], Tensor],
    bucket: Bucket,
    length: int,
    dtype: torch.dtype,
    comm: Communicator,
) -> Tensor:
    flat = flats.get((bucket, length))
    if flat is None:
        flat = flats[bucket, length] = comm.empty(length, dtype)
    return flat


def _pack(load: Load, bucket: Bucket, flat: Tensor, scale: float) -> tuple[Flattened, bool]:
    """Write the gradients, times scale, into the bucket; zeros for those that are not there."""
    if scale == 0.0 or any(gradient is None for gradient in load.gradients):
        flat.zero_()
    flattened = Flattened(load.gradients, bucket.offsets)
    return flattened, scale == 0.0 or flattened.pack(flat, scale)
