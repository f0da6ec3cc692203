"""What every collective on an array in device memory begins and ends with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .device import Device, DeviceArray, Event, describe, renewed
from .device_wait import following
from .work import Behind, Steps

Make = Callable[[Device], Any]
"""Returns what takes the result, on a device; None where nothing comes."""

Run = Callable[[int, Event, int], Steps]
"""(address of what takes the result, ready, tag) -> (last, way).

ready: an event behind which the array may be read, and the result written.  last: the event behind
all of it.  way: that was taken, where the receipt left it open; else "".
"""


def called(
    device: Device,
    array: DeviceArray,
    make: Make | None,
    run: Run,
    abandoned: list[object],
    tag: int,
) -> Steps:
    """Do a collective behind what its caller has put on the stream; end with what follows it.

    make: None where the array itself takes the result.  abandoned: takes what devices may still be
    at when the run is broken off.
    """
    caller = device.caller(renewed(array))
    result, into = array.owner, array.address
    if make is not None:
        # When the caller calls: memory comes from the pool of the stream that is current.
        result = make(device)
        into = 0 if result is None else describe(result, writable=True).address
    # Recorded behind that, too: the caller's stream may still be at the memory.
    ready = device.record(caller)
    try:
        last, way = yield from run(into, ready, tag)
    except BaseException:
        abandoned.append((array, result))
        raise
    return Behind(result, following(device, array, caller, last), way)
