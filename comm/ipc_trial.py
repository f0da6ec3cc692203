"""Open a group's device memory to its ranks, and see it work before it is used.

If one rank's device refuses, or one trial sum is wrong, no rank uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .device import Device, DeviceArray, describe
from .errors import CommError
from .ipc import EVENTS, OFFER_WORDS, Ipc
from .trace import Signature
from .transport.base import Channel
from .work import Prepared, Receipt, Steps

if TYPE_CHECKING:
    from .communicator import Communicator

Made = TypeVar("Made")
_TRIAL = 1000
"""Elements of the sum."""


def open_ipc(comm: Communicator, device: Device) -> tuple[Ipc | None, str]:
    """Open a group's device memory to its ranks, and try it; collective.

    Returns: the group's side, which has given right sums, and ""; or None and why not. Where one
    rank gets None, all do.
    """
    peering = device.peering
    several = 1 < comm.size == comm.node.size
    if not several:
        return None, "its ranks are on several nodes" if comm.size > 1 else "it has one rank"
    if not _agree(comm, peering is not None):
        return None, "a device offers none"
    assert peering is not None
    mine, why = _attempt(
        lambda: ([peering.make_event() for _ in range(EVENTS)], peering.trial(_TRIAL))
    )
    if not _agree(comm, mine is not None):
        return None, why or "another rank's device refuses"
    assert mine is not None
    events, (x, right) = mine
    made, why = _attempt(lambda: Ipc(comm, device, peering, events))
    if not _agree(comm, made is not None):
        give_up(comm, made)
        return None, why or "another rank cannot open events"
    assert made is not None
    array = describe(x, writable=True)
    signature = Signature("allreduce", "sum", array.dtype.name, array.count)
    why = _open_others(made, signature, array)
    if not _agree(comm, not why):
        give_up(comm, made)
        return None, why or "another rank cannot open memory"
    caller = device.caller(array)
    missed: list[Exception] = []

    def run(tag: int) -> Steps:
        ready = device.record(caller)
        last = yield from made.run(signature, array, array.address, ready, tag, missed)
        if last is not None:
            device.follow(caller, last)
        return last is not None

    receipt = Receipt("allreduce", "pairwise, in place", "ipc", comm.size, array.nbytes, "trial")
    done = comm._start(Prepared(receipt, Channel.COLLECTIVE, run, signature), True)
    if missed:
        fine, why = None, f"a trial could not be launched: {_said(missed[0])}"
    else:
        fine, why = _attempt(lambda: bool(done) and right(comm.size))
    if not _agree(comm, bool(fine)):
        give_up(comm, made)
        return None, why or ("another rank's trial failed" if fine else "a trial gave wrong sums")
    return made, ""


def _attempt(make: Callable[[], Made]) -> tuple[Made | None, str]:
    """Return what a device makes, or why not: any error of its libraries is this rank's alone."""
    try:
        return make(), ""
    except Exception as error:
        return None, _said(error)


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no reason given"]
    return lines[0] if isinstance(error, CommError) else f"{type(error).__name__}: {lines[0]}"


def give_up(comm: Communicator, made: Ipc | None) -> None:
    """Close it, if it was made, and keep its events until nobody has them; collective."""
    if made is not None:
        _attempt(made.close)
    comm.barrier()


def _agree(comm: Communicator, fine: bool) -> bool:
    return bool(comm.allreduce(np.array([fine], np.uint8), "min")[0])


def _open_others(ipc: Ipc, signature: Signature, array: DeviceArray) -> str:
    """Exchange handles, and open the others'; return why not; collective, on every rank."""
    mine = np.zeros(OFFER_WORDS, np.int64)
    _, why = _attempt(lambda: ipc.offer(signature, array).write(mine))
    rows = ipc._comm.allgather(mine)
    if why or not rows[:, 0].all():
        return why or "memory cannot be shown"

    def open_all() -> None:
        for rank, row in enumerate(rows):
            if rank != ipc._comm.rank:
                ipc.opened_at(rank, row)

    _, why = _attempt(open_all)
    return why and f"memory cannot be opened: {why}"
