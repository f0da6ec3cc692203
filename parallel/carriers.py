"""Carry buckets over the ranks: the ways to do it, and which one fits a wire format.

`DenseCarrier` sends elements and flags in one message, in the dtype of the wire; `LargeCarrier`
reduces one large gradient where it lies, and `HookCarrier` leaves the elements to a wire hook; both
send the flags beside them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..comm.work import Work
from .bucket_memory import Counters, Homes
from .buckets import Bucket
from .flatten import Home, in_place, wire_of
from .flight import Carrier, Flight, Load
from .hooks import Ended, GradientBucket, Rounds, Wire, WireHook
from .tensors import real_view

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["LARGE_BYTES", "carrier_of"]

LARGE_BYTES = 1 << 20
"""From here on a gradient in a bucket of its own is not packed."""

_ROWS = 64
"""How many patterns of flags a carrier remembers."""


def carrier_of(wire: Wire, comm: Communicator) -> Carrier:
    """Return the carrier of a wire format."""
    if wire.hook is None:
        return PlainCarrier(comm, wire.dtype)
    return HookCarrier(comm, wire.hook)


class PlainCarrier:
    """Carry each bucket in the way that fits its contents, which all ranks see alike."""

    def __init__(self, comm: Communicator, dtype: str | None) -> None:
        self._dtype = dtype
        self._dense = DenseCarrier(comm, dtype)
        self._large = LargeCarrier(comm)

    def start(self, bucket: Bucket, load: Load, *, last: bool) -> Flight:
        large = (
            len(bucket.indices) == 1
            and bucket.count * getattr(torch, bucket.dtype).itemsize >= LARGE_BYTES
            and wire_of(bucket.dtype, self._dtype) == bucket.dtype
        )
        return (self._large if large else self._dense).start(bucket, load, last=last)

    def forget(self) -> None:
        self._dense.forget()
        self._large.forget()


class DenseCarrier:
    """Send a bucket in one allreduce, its flags behind its elements."""

    def __init__(self, comm: Communicator, dtype: str | None) -> None:
        self._comm = comm
        self._homes = Homes(comm, dtype)
        self._rows: dict[tuple[tuple[bool, ...], torch.dtype, torch.device], Tensor] = {}
        # By their memory, as long as that is a bucket's.
        self._plans: WeakKeyDictionary[Home, dict[str, tuple[Callable[[], object], Ended]]]
        self._plans = WeakKeyDictionary()

    def start(self, bucket: Bucket, load: Load, *, last: bool) -> Flight:
        flags = load.flags
        scale, op = (1.0, "mean") if load.share is None else (load.share, "sum")
        flattened = self._homes.flatten(bucket, load, len(flags))
        home, finite = flattened.home, flattened.pack(scale)
        if home.left != flags:
            home.rest.copy_(self._row_of(flags, home.flat))
        home.left = None
        rounds = self._reduce(home, op, last)
        size = self._comm.size
        per_flag = size if op == "mean" else 1

        def counts() -> list[float]:
            home.left = home.rest.tolist()
            return [per_flag * flag for flag in home.left]

        return Flight(load, size, flattened, finite, rounds, counts)

    def _reduce(self, home: Home, op: str, last: bool) -> Rounds | Ended:
        """Start to reduce a bucket; a last one on the host ends here, once it has a plan."""
        if not last or home.flat.device.type != "cpu":
            return Rounds(_one(self._comm.allreduce(home.flat, op=op, blocking=False)))
        plans = self._plans.setdefault(home, {})
        known = plans.get(op)
        if known is None:
            work = self._comm.allreduce(home.flat, op=op, blocking=False)
            plan = self._comm.plan("allreduce", home.flat, op=op)
            plans[op] = plan, Ended([work.receipt])
            return Rounds(_one(work))
        plan, ended = known
        plan()
        return ended

    def _row_of(self, flags: list[bool], flat: Tensor) -> Tensor:
        """Return flags as elements of the bucket; most steps have those of the step before."""
        key = (tuple(flags), flat.dtype, flat.device)
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) == _ROWS:
                self._rows.clear()
            row = self._rows[key] = torch.tensor(flags, dtype=flat.dtype, device=flat.device)
        return row

    def forget(self) -> None:
        self._homes.forget()
        self._rows.clear()
        self._plans.clear()


class LargeCarrier:
    """Reduce one gradient where it lies, its flags beside it.

    A gradient that autograd has just made is reduced in its own memory, since packing it would
    cost more than shared memory saves; unless another tensor has that memory, too. One that its
    owner keeps from pass to pass moves to registered memory, as any does that is on a GPU: what is
    not registered there goes by way of the host's memory.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._homes = Homes(comm)
        self._counters = Counters()
        self._reduced: dict[Bucket, weakref.ref[Tensor]] = {}

    def start(self, bucket: Bucket, load: Load, *, last: bool) -> Flight:
        flags = self._counters.fill(bucket, load)
        (gradient,), (parameter,) = load.gradients, load.parameters
        scale, op = (1.0, "mean") if load.share is None else (load.share, "sum")
        known = self._reduced.get(bucket)
        kept = gradient is not None and known is not None and known() is gradient
        away = kept or scale != 1.0 or load.device.type != "cpu"
        flat = None if away else in_place(gradient, parameter)
        flattened, finite = None, None
        if flat is None:
            flattened = self._homes.flatten(bucket, load)
            flat, finite = flattened.home.flat, flattened.pack(scale)
        elif gradient is not None:
            self._reduced[bucket] = weakref.ref(gradient)
        counting = self._comm.allreduce(flags, op="sum", blocking=False)
        work = self._comm.allreduce(flat, op=op, blocking=False)
        rounds = Rounds(_two(work, counting))
        return Flight(load, self._comm.size, flattened, finite, rounds, flags.tolist)

    def forget(self) -> None:
        self._homes.forget()
        self._counters.forget()
        self._reduced.clear()


class HookCarrier:
    """Hand a bucket to a wire hook; its flags are added in a small message of their own."""

    def __init__(self, comm: Communicator, hook: WireHook) -> None:
        self._comm = comm
        self._hook = hook
        self._counters = Counters()
        self._homes = Homes(comm)

    def start(self, bucket: Bucket, load: Load, *, last: bool) -> Flight:
        scale = 1.0 if load.share is None else load.share * self._comm.size
        flattened = self._homes.flatten(bucket, load)
        finite = flattened.pack(scale)
        flags = self._counters.fill(bucket, load)
        handed = GradientBucket(
            names=load.names,
            shapes=tuple(tuple(real_view(p).shape) for p in load.parameters),
            offsets=bucket.offsets,
            flat=flattened.home.flat,
            present=tuple(g is not None and scale != 0.0 for g in load.gradients),
            loss_scale=load.loss_scale,
        )
        rounds = Rounds(self._run(flags, handed))
        size = self._comm.size
        return Flight(load, size, flattened, finite, rounds, flags.tolist)

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
        self._homes.forget()
        self._counters.forget()


def _one(work: Work) -> Generator[Work, Any, None]:
    yield work


def _two(first: Work, second: Work) -> Generator[Work, Any, None]:
    yield first
    yield second
