"""Messages between GPUs of one node: contents stay on the devices, and notes travel by mail.

The sender copies what it sends into a room of its own, which other processes can open, on the
caller's stream; the note tells where that is, and behind which event. The receiver's device copies
it from there, and its reply tells behind which event the room is free again. The hosts wait for
nothing but the note. A receiver that has host memory, or cannot open the room, asks for the bytes,
which are then sent as those of any other message; so neither side has to know of the other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .boxes import NOTE_BYTES
from .device import HANDLE_BYTES, DeviceArray, Event, Peering, Stream
from .device_wait import following, passes, reached
from .errors import CommError
from .letters import Message
from .mailboxes import Mailboxes
from .windowed import Copier
from .work import Behind, Steps

Words: TypeAlias = npt.NDArray[np.int64]

WAY = "ipc"

_HANDLE_WORDS = HANDLE_BYTES // 8
_NUMBER, _TOKEN, _OFFSET = 0, 1, 2
_MEMORY = slice(8, 8 + _HANDLE_WORDS)
_READY = slice(16, 16 + _HANDLE_WORDS)
_REFUSED = 24
_TAKEN = slice(32, 32 + _HANDLE_WORDS)

_LEAST_ROOM = 2 << 20
"""What memory of its own takes of a GPU anyway."""


@dataclass
class Berth:
    """What a sender needs for one message; reused by later ones.

    taken: the event behind which the last receiver has read the room; None before the first.
    """

    note: Words
    room: int
    size: int
    owner: object
    ready: Event
    taken: Event | None = None


@dataclass(frozen=True)
class Landing:
    """A sender's berth, as a receiver sees it, and the event that tells that its room was read."""

    ready: Event
    taken: Event
    handle: bytes


class DeviceMail:
    """One rank's messages of one device, to and from ranks that it shares memory with."""

    def __init__(self, mail: Mailboxes, copier: Copier, peering: Peering, staged: str) -> None:
        """staged: the way of a message whose bytes were asked for."""
        self._mail, self._copier, self._peering, self._staged = mail, copier, peering, staged
        self._stream: Stream | None = None
        self._berths: dict[int, list[Berth]] = {}
        self._landings: dict[tuple[int, int], Landing] = {}
        self._opened: dict[tuple[int, int], int] = {}
        self._events: dict[bytes, Event] = {}
        self._made = 0
        self._lost: list[Berth] = []
        self.refused: dict[int, str] = {}

    def close(self) -> None:
        """Give back the others' rooms and events; after the last message has ended.

        From then on nothing of this rank waits for the others' events. What happens when an owner
        destroys an event that another's stream waits for is undefined, so keep this until all ranks
        have closed theirs.
        """
        device, stream = self._copier.device, self._copier.inward
        for berth in (berth for free in self._berths.values() for berth in free):
            if berth.taken is not None:
                device.follow(stream, berth.taken)
        for one in filter(None, (stream, self._stream)):
            passes(device.record(one))
        events, self._events = self._events, {}
        for event in events.values():
            self._peering.close_event(event)
        opened, self._opened = self._opened, {}
        for address in opened.values():
            self._peering.close(address)

    # -- sending -----------------------------------------------------------------------------

    def send(
        self, array: DeviceArray, dst: int, tag: int, staged: Callable[[int], Steps]
    ) -> Callable[[int], Steps]:
        """Return what sends an array, which may be changed by what is launched behind the call.

        staged: sends it where no room can be had that others can open.
        """

        def run(ours: int) -> Steps:
            try:
                berth = self._take(array.nbytes)
            except CommError as error:
                self.refused[dst] = str(error)
                yield from staged(ours)
                return Behind(array.owner, _nothing, self._staged)
            try:
                asked = yield from self._pass(array, berth, dst, tag)
            except BaseException:
                self._lost.append(berth)  # whose receiver may still read it
                raise
            return Behind(array.owner, _nothing, self._staged if asked else WAY)

        return run

    def _pass(self, array: DeviceArray, berth: Berth, dst: int, tag: int) -> Steps:
        """Send an array from a berth; return whether its bytes were asked for."""
        device, peering, caller = self._copier.device, self._peering, self._copier.caller(array)
        if berth.taken is not None:
            device.follow(caller, berth.taken)
        peering.copy(berth.room, array.address, array.nbytes, caller)
        peering.place(berth.ready, caller)
        copied = device.record(caller)
        berth.note[_REFUSED] = 0
        note = berth.note.view(np.uint8)
        asked = yield from self._mail.send_note(note, array.nbytes, dst, tag)
        if asked:
            if berth.note[_REFUSED]:
                self.refused[dst] = "its device refuses this one's memory"
            yield from self._answer(array, berth, copied, dst, asked)
            self._berths[berth.size].append(berth)
        else:
            self._taken(berth, dst)
        return bool(asked)

    def _taken(self, berth: Berth, dst: int) -> None:
        """Take a berth back whose room a receiver's device reads now or later."""
        try:
            berth.taken = self._event(berth.note[_TAKEN].tobytes())
        except CommError as error:  # nobody can tell when, so it is not used again
            self.refused[dst] = str(error)
            self._lost.append(berth)
        else:
            self._berths[berth.size].append(berth)

    def _answer(
        self, array: DeviceArray, berth: Berth, copied: Event, dst: int, asked: int
    ) -> Steps:
        place, fetched = self._copier.fetch(berth.room, array.nbytes, copied)
        yield from reached(fetched, self._mail.rank)
        yield from self._mail.answer(place[: array.nbytes], dst, asked)
        self._copier.staging.give(place, None)

    def _take(self, nbytes: int) -> Berth:
        """Return a berth that nobody uses.

        Raises: CommError where there is no memory for it, or none that others can open.
        """
        size = max(_LEAST_ROOM, 1 << max(nbytes - 1, 0).bit_length())
        free = self._berths.setdefault(size, [])
        return free.pop() if free else self._make(size)

    def _make(self, size: int) -> Berth:
        room, owner = self._copier.device.room(size)
        exported = self._peering.export(room, size)
        assert exported is not None
        ready, handle = self._peering.make_event()
        note = self._mail.note().view(np.int64)
        note[:] = 0
        self._made += 1
        note[_NUMBER], note[_TOKEN], note[_OFFSET] = self._made, exported.token, exported.offset
        note[_MEMORY], note[_READY] = _words(exported.handle), _words(handle)
        return Berth(note, room, size, owner, ready)

    # -- receiving ---------------------------------------------------------------------------

    def recv(self, array: DeviceArray, src: int, tag: int) -> Callable[[int], Steps]:
        """Return what receives into an array; the caller's stream follows."""
        copier, device = self._copier, self._copier.device

        def run(_: int) -> Steps:
            caller = copier.caller(array)
            ready = device.record(caller)
            message = yield from self._mail.hope(array.nbytes, src, tag)
            try:
                copied = self._copied(message, array, src, ready)
                if copied is not None:
                    return Behind(array.owner, following(device, array, caller, copied), WAY)
                place = copier.staging.take(array.nbytes)
                yield from self._mail.take(message, place[: array.nbytes], src)
            except CommError:
                raise
            except BaseException:
                self._mail.break_off(message, src, tag, message.ordinal)
                raise
            copied = copier.deliver(place, array, ready)
            return Behind(array.owner, following(device, array, caller, copied), self._staged)

        return run

    def _copied(self, message: Message, array: DeviceArray, src: int, ready: Event) -> Event | None:
        """Let the device copy what a note tells of; return the event behind that, if it can."""
        if not message.note:
            return None
        note, device, peering = _note_at(message.note), self._copier.device, self._peering
        try:
            room, landing = self._room(src, note), self._landing(src, note)
        except CommError:
            note[_REFUSED] = 1
            return None
        stream = self._receiving()
        device.follow(stream, ready)
        device.follow(stream, landing.ready)
        peering.copy(array.address, room, array.nbytes, stream)
        peering.place(landing.taken, stream)
        note[_TAKEN] = _words(landing.handle)
        message.settle(served=True)
        return device.record(stream)

    def _receiving(self) -> Stream:
        if self._stream is None:
            self._stream = self._copier.device.make_stream()
        return self._stream

    def _room(self, src: int, note: Words) -> int:
        key = src, int(note[_TOKEN])
        if key not in self._opened:
            self._opened[key] = self._peering.open(note[_MEMORY].tobytes())
        return self._opened[key] + int(note[_OFFSET])

    def _landing(self, src: int, note: Words) -> Landing:
        key = src, int(note[_NUMBER])
        if key not in self._landings:
            ready = self._event(note[_READY].tobytes())
            self._landings[key] = Landing(ready, *self._peering.make_event())
        return self._landings[key]

    def _event(self, handle: bytes) -> Event:
        if handle not in self._events:
            self._events[handle] = self._peering.open_event(handle)
        return self._events[handle]


def _nothing(_result: object) -> None:
    """Let the caller's stream follow nothing."""


def _words(handle: bytes) -> Words:
    return np.frombuffer(handle.ljust(HANDLE_BYTES, b"\0"), np.int64)


def _note_at(address: int) -> Words:
    memory: Any = (ctypes.c_int64 * (NOTE_BYTES // 8)).from_address(address)
    return np.frombuffer(memory, np.int64)
