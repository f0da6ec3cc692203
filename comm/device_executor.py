"""Run one rank's program over messages that lie in device memory, kernels adding what arrives.

The rounds, the messages and their order are those of `executor`, which could run at the other end.
The library that sends looks at no stream. So the host waits for an event before a message reads
what a kernel has written, and before one is written where a kernel still reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest

from .device import Device, Event, Stream
from .device_wait import reached
from .executor import Segment, segments
from .program import Op, Program
from .transport.base import Channel, DeviceMessages, Request
from .work import Steps

Add = Callable[[int, int, int], None]
"""(target address, incoming address, count): put an addition on the site's stream."""


@dataclass(frozen=True)
class Site:
    """Where a program runs.

    rank: this one.  segment_bytes, window: as of `executor.Route`, with the same meaning.
    abandoned: takes what the library may still write to after a run was given up.
    """

    messages: DeviceMessages
    tag: int
    rank: int
    device: Device
    stream: Stream
    segment_bytes: int
    window: int
    abandoned: list[object] = field(default_factory=list)


@dataclass(frozen=True)
class Memory:
    """What a program works on: addresses of elements of one size.

    landing: room for `window` segments that are to be added, or 0 where nothing is.
    """

    source: int
    target: int
    landing: int
    itemsize: int


def landing_bytes(program: Program, itemsize: int, segment_bytes: int, window: int) -> int:
    """Return the bytes of memory for what arrives to be added."""
    return window * min(max(1, segment_bytes // itemsize), program.most_added) * itemsize


def execute_on_device(program: Program, site: Site, memory: Memory, add: Add) -> Steps:
    """Run a program; what is at its addresses must be there when this begins.

    Ends with the last message; the additions behind it are on the site's stream.
    """
    flying: deque[_Flying] = deque()
    try:
        yield from _rounds(program, site, memory, add, flying)
    except BaseException:
        site.abandoned.append(list(flying))
        raise


@dataclass(frozen=True)
class _Flying:
    requests: list[Request]
    receive: Segment | None
    at: int
    slot: int


def _rounds(
    program: Program, site: Site, memory: Memory, add: Add, flying: deque[_Flying]
) -> Steps:
    item = memory.itemsize
    segment = max(1, site.segment_bytes // item)
    room = landing_bytes(program, item, site.segment_bytes, site.window) // site.window
    added: dict[int, Event] = {}  # by slot: behind the kernel that reads it
    channel = Channel.COLLECTIVE
    for rows in program.rounds():
        for event in added.values():  # this round may send what the ones before have added
            yield from reached(event, site.rank)
        added.clear()
        pairs = zip_longest(
            segments(rows, (Op.SEND,), segment),
            segments(rows, (Op.RECV, Op.RECV_REDUCE), segment),
        )
        for number, (send, receive) in enumerate(pairs):
            requests: list[Request] = []
            slot, at = number % site.window, 0
            if receive is not None:
                at = memory.target + receive.offset * item
                if receive.op == Op.RECV_REDUCE:
                    at = memory.landing + slot * room
                    if slot in added:
                        yield from reached(added.pop(slot), site.rank)
                nbytes = receive.count * item
                requests.append(
                    site.messages.irecv_device(at, nbytes, receive.peer, site.tag, channel)
                )
            if send is not None:
                start, nbytes = memory.source + send.offset * item, send.count * item
                requests.append(
                    site.messages.isend_device(start, nbytes, send.peer, site.tag, channel)
                )
            flying.append(_Flying(requests, receive, at, slot))
            if len(flying) == site.window:
                yield from _finish(flying, site, memory, add, added)
        while flying:
            yield from _finish(flying, site, memory, add, added)


def _finish(
    flying: deque[_Flying], site: Site, memory: Memory, add: Add, added: dict[int, Event]
) -> Steps:
    """Wait for both of the oldest pair of messages; only then add what has come."""
    entry = flying[0]
    waiting = entry.requests
    while waiting := [request for request in waiting if not request.done()]:
        yield waiting
    receive = entry.receive
    if receive is not None and receive.op == Op.RECV_REDUCE:
        add(memory.target + receive.offset * memory.itemsize, entry.at, receive.count)
        added[entry.slot] = site.device.record(site.stream)
    flying.popleft()
