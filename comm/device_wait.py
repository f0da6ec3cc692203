"""Wait for an event of this rank's own device: the host, or the streams of who has called."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from .device import Device, DeviceArray, Event, Stream, bare
from .dtypes import DType
from .errors import CommError
from .transport.base import Request

_LOOKS, _GLANCES = 200, 12
"""How often a rank looks at an event at a time, if somebody waits for the operation and if not."""


@dataclass(frozen=True)
class Reached:
    """The request of an operation that waits for its own device: `peer` is this rank itself."""

    peer: int
    event: Event

    def done(self) -> bool:
        """Look whether it has ended."""
        return self.event.ended()


def reached(
    event: Event, rank: int, patient: bool | None = False
) -> Generator[list[Request], bool | None, bool | None]:
    """Wait until an event has ended; return whether somebody waits for the operation by then.

    patient: whether somebody does as this begins.
    """
    while True:
        for _ in range(_LOOKS if patient else _GLANCES):
            if event.ended():
                return patient
            os.sched_yield()
        patient = yield [Reached(rank, event)]


@dataclass(frozen=True)
class Following:
    """Lets the caller's streams run behind an event: that of the call, and that of the wait.

    They differ where a program waits under another stream than it called under. Autograd does: it
    accumulates a gradient on the stream on which the parameter was first seen, and ends a backward
    on the one that has called it.

    dtype, named: of the array that the operation was called with, and whether that named a stream.
    """

    device: Device
    event: Event
    stream: Stream
    dtype: DType
    named: bool

    def __call__(self, result: Any) -> None:
        """result: of the operation, where its caller waits; None where nobody does."""
        self.device.follow(self.stream, self.event)
        if result is None:
            return
        now = bare(result).__cuda_array_interface__.get("stream") if self.named else None
        if now is None:
            now = self.device.caller(DeviceArray(result, 0, (), self.dtype, None))
        if now != self.stream:
            self.device.follow(now, self.event)


def following(device: Device, array: DeviceArray, caller: Stream, event: Event) -> Following:
    """Return what lets the caller of an operation on an array run behind an event."""
    return Following(device, event, caller, array.dtype, array.stream is not None)


def passes(event: Event, seconds: float = 30.0) -> bool:
    """Wait for an event up to `seconds`; tell whether it has ended: after an error none does."""
    end = time.monotonic() + seconds
    try:
        while not event.ended():
            if time.monotonic() > end:
                return False
            os.sched_yield()
    except CommError:
        return False
    return True


def wait_here(event: Event) -> None:
    """Wait for an event without letting other operations go on."""
    while not event.ended():
        os.sched_yield()
