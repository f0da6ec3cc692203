"""Run a collective on device memory window by window, through pinned host memory.

While one window is exchanged on the host, the next is copied in and the one before is copied out,
on streams of their own. What the caller has put on its stream before the call runs before the
copies; what it puts there after the operation has ended runs behind them: nobody has to
synchronise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .device import Bytes, Device, DeviceArray, Event, Stream, renewed
from .device_wait import passes, reached
from .dtypes import Typed
from .pool import Pool
from .windows import Window
from .work import Steps

_LEAST = 1 << 12

Exchange = Callable[[Typed], Steps]
"""A window's collective on the host; returns what its operation returns."""


@dataclass(frozen=True)
class Copier:
    """Copies between one device and pinned host memory of one rank, on a stream for each way."""

    device: Device
    inward: Stream
    outward: Stream
    staging: Pool[Bytes]

    def caller(self, array: DeviceArray) -> Stream:
        """Return the caller's stream as it is now: a plan may have been made under another."""
        return self.device.caller(renewed(array))

    def ends(self) -> bool:
        """Wait for all copies, and tell whether they have ended: none does after an error."""
        try:
            behind = [self.device.record(stream) for stream in (self.inward, self.outward)]
        except Exception:  # a device that has failed refuses that, too, in words of its library
            return False
        return all(map(passes, behind))

    def fetch(self, address: int, nbytes: int, ready: Event) -> tuple[Bytes, Event]:
        """Start to copy device memory into a place; it is the host's when the event has ended.

        ready: behind which the memory may be read.
        """
        place = self.staging.take(nbytes)
        self.device.follow(self.inward, ready)
        if nbytes:
            self.device.to_host(place[:nbytes], address, self.inward)
        return place, self.device.record(self.inward)

    def deliver(self, place: Bytes, array: DeviceArray, ready: Event) -> Event:
        """Start to copy a place into an array, and take it back; return the event behind that.

        ready: behind which the array may be written.
        """
        self.device.follow(self.outward, ready)
        if array.nbytes:
            self.device.to_device(array.address, place[: array.nbytes], self.outward)
        copied = self.device.record(self.outward)
        self.staging.give(place, copied)
        return copied


def pinned(device: Device, allocate: Callable[[int], Bytes]) -> Pool[Bytes]:
    """Return host memory for copies.

    allocate: return so many bytes of it; best where the node's ranks map it.
    """

    def make(nbytes: int) -> Bytes:
        memory = allocate(nbytes)
        device.pin(memory)
        return memory

    return Pool(_LEAST, make)


def run_windows(
    copier: Copier,
    rank: int,
    array: DeviceArray,
    into: int,
    windows: Sequence[Window],
    exchange: Exchange,
    ready: Event,
) -> Steps:
    """Run the windows from an array to the address `into`; return the event behind all of it.

    ready: behind which the array may be read, and written to `into`.
    """
    device, item = copier.device, array.dtype.itemsize
    patient: bool | None = False
    device.follow(copier.inward, ready)
    device.follow(copier.outward, ready)
    slots = [_Slot(copier, windows, item) for _ in range(min(2, len(windows)))]
    fetched = deque([slots[0].fetch(windows[0], array.address)])
    for index, window in enumerate(windows):
        if index + 1 < len(windows):
            ahead = slots[(index + 1) % 2]
            fetched.append(ahead.fetch(windows[index + 1], array.address))
        patient = yield from reached(fetched.popleft(), rank, patient)
        slot = slots[index % 2]
        result = yield from exchange(typed(slot.passed(window), array, window.shape))
        slot.deliver(window, result, into)
    # Also where there was nothing to copy out: what comes next may change what was read.
    device.follow(copier.outward, device.record(copier.inward))
    last = device.record(copier.outward)
    for slot in slots:
        copier.staging.give(slot.place, last)
    return last


class _Slot:
    """One of an operation's two places: what is passed, and behind it what comes out."""

    def __init__(self, copier: Copier, windows: Sequence[Window], item: int) -> None:
        self._copier, self._item = copier, item
        self._second = max(window.count for window in windows) * item
        results = max(window.result for window in windows) * item
        self.place = copier.staging.take(self._second + results)
        self._emptied: Event | None = None

    def fetch(self, window: Window, address: int) -> Event:
        """Start to copy a window in; the place is the host's when the event has ended."""
        device, inward, item = self._copier.device, self._copier.inward, self._item
        if self._emptied is not None:
            device.follow(inward, self._emptied)
        for start, at, count in window.into:
            target = self.place[start * item : (start + count) * item]
            device.to_host(target, address + at * item, inward)
        return device.record(inward)

    def passed(self, window: Window) -> Bytes:
        """Return the bytes that the host passes."""
        return self.place[: window.count * self._item]

    def deliver(self, window: Window, result: Any, address: int) -> None:
        """Start to copy a window's result out."""
        device, outward, item = self._copier.device, self._copier.outward, self._item
        begin = 0
        if isinstance(result, np.ndarray) and window.out:
            begin = self._second
            source = result.reshape(-1).view(np.uint8)
            self.place[begin : begin + source.size] = source
        for start, at, count in window.out:
            low = begin + start * item
            source = self.place[low : low + count * item]
            device.to_device(address + at * item, source, outward)
        self._emptied = device.record(outward)


def typed(part: np.ndarray[Any, Any], array: DeviceArray, shape: tuple[int, ...]) -> Typed:
    """Return pinned bytes as elements of an array's type."""
    return Typed(part.view(array.dtype.storage).reshape(shape), array.dtype)
