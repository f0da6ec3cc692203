"""Open a group's device memory to its ranks, and see it work before it is used.

What one rank's device refuses, or a wrong sum, and no rank uses it.
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

    Returns: the group's side, or None and why not. It was seen to give right sums where it is not
    None; what a device refuses is refused on all ranks.
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
        return None, why or "another rank cannot open events"
    assert made is not None
    array = describe(x, writable=True)
    signature = Signature("allreduce", "sum", array.dtype.name, array.count)
    if not _agree(comm, _can_open(made, signature, array)):
        made.close()
        return None, "memory cannot be opened"
    caller = device.caller(array)

    def run(tag: int) -> Steps:
        ready = device.record(caller)
        last = yield from made.run(signature, array, array.address, ready, tag)
        if last is not None:
            device.follow(caller, last)
        return last is not None

    receipt = Receipt("allreduce", "pairwise, in place", "ipc", comm.size, array.nbytes, "trial")
    done = comm._start(Prepared(receipt, Channel.COLLECTIVE, run, signature), True)
    if not _agree(comm, done and right(comm.size)):
        made.close()
        return None, "a trial gave wrong sums"
    return made, ""


def _attempt(make: Callable[[], Made]) -> tuple[Made | None, str]:
    try:
        return make(), ""
    except CommError as error:
        return None, str(error)


def _agree(comm: Communicator, fine: bool) -> bool:
    return bool(comm.allreduce(np.array([fine], np.uint8), "min")[0])


def _can_open(ipc: Ipc, signature: Signature, array: DeviceArray) -> bool:
    """Exchange handles, and open the others'; collective, and never an error on one rank only."""
    rows = ipc._comm.allgather(ipc.offer(signature, array).write(np.zeros(OFFER_WORDS, np.int64)))
    try:
        for rank, row in enumerate(rows):
            if rank != ipc._comm.rank:
                ipc.opened_at(rank, row)
    except CommError:
        return False
    return bool(rows[:, 0].all())
