"""Run one rank's program over messages: the reference interpreter, for any transport.

A round's pieces travel in segments, a few in flight at a time, and a segment is added while the
next ones are on their way. Segment k is added only when segment k has been both received and sent:
a rank may be sending the very memory that it adds to. `verify` refuses a round for which that is
not enough, as one of the segments behind would be added to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from .program import Op, Program
from .transport.base import Channel, Request, Transport
from .work import Steps

WINDOW = 4
"""Segments of one direction in flight."""

NETWORK_WINDOW = 8
"""The same between nodes: with fewer, a link with traffic both ways is idle while ranks answer."""

NETWORK_MOVING = 32
"""The same where nothing is added, so that more of them take no memory."""

Array = npt.NDArray[Any]
Combine = Callable[[Array, Array], None]
"""target, incoming: target[:] = target op incoming."""


@dataclass(frozen=True)
class Native:
    """The same arithmetic as addresses of C functions, `kernels.pieces`, with their divisors.

    before: of what is added and widened.  after: of what is narrowed.
    """

    add: int = 0
    widen: int = 0
    narrow: int = 0
    before: float = 1.0
    after: float = 1.0


@dataclass(frozen=True)
class Arithmetic:
    """How what arrives is added.

    add: into `target`, or into `accumulator` where there is one.
    widen: accumulator piece <- target piece.  narrow: target piece <- accumulator piece.
    native: compiles the same for compiled executors; where None, they cannot run it.
    """

    add: Combine
    accumulator: Array | None = None
    widen: Combine | None = None
    narrow: Combine | None = None
    native: Callable[[], Native] | None = None


def nothing(target: Array, incoming: Array) -> None:
    """Add nothing: for programs that only move, and barriers."""


MOVE = Arithmetic(nothing)


@dataclass(frozen=True)
class Route:
    """Where a program's messages travel.

    segment_bytes: the largest single message; both ends must use the same.
    window: segments of one direction in flight; each end may use its own.
    moving: the same in a round that adds nothing, if that is more.
    abandoned: takes what MPI may still write to after a run was given up.
    """

    transport: Transport
    channel: Channel
    tag: int
    segment_bytes: int
    window: int = WINDOW
    moving: int = 0
    abandoned: list[object] = field(default_factory=list)


def execute(
    program: Program,
    route: Route,
    source: Array,
    target: Array,
    arithmetic: Arithmetic = MOVE,
) -> Steps:
    """Run a program from flat `source` to flat `target`, which may be one array.

    Yields the requests that it waits for, whenever it has to wait.
    """
    flying: list[tuple[list[Request], Segment | None, Array]] = []
    try:
        yield from _rounds(program, route, source, target, arithmetic, flying)
    except BaseException:
        route.abandoned.append((flying, source))
        raise


def _rounds(
    program: Program,
    route: Route,
    source: Array,
    target: Array,
    arithmetic: Arithmetic,
    flying: list[tuple[list[Request], Segment | None, Array]],
) -> Steps:
    segment = max(1, route.segment_bytes // source.itemsize)
    scratch = _scratch(program, segment, target, route.window)
    total = target if arithmetic.accumulator is None else arithmetic.accumulator
    for rows in program.rounds():
        _local(rows, target, arithmetic)
        sends = segments(rows, (Op.SEND,), segment)
        receives = segments(rows, (Op.RECV, Op.RECV_REDUCE), segment)
        adds = any(op == Op.RECV_REDUCE for op, *_ in rows)
        limit = route.window if adds else max(route.window, route.moving)
        for slot, (send, receive) in enumerate(zip_longest(sends, receives)):
            requests: list[Request] = []
            arrived = scratch
            if receive is not None:
                arrived = _landing(receive, target, scratch, slot, route.window)
            flying.append((requests, receive, arrived))  # first: it keeps what arrives
            if receive is not None:
                requests.append(
                    route.transport.irecv(
                        arrived.view(np.uint8), receive.peer, route.tag, route.channel
                    )
                )
            if send is not None:
                data = source[send.offset : send.offset + send.count].view(np.uint8)
                requests.append(route.transport.isend(data, send.peer, route.tag, route.channel))
            if len(flying) == limit:
                yield from _finish(flying[0], total, arithmetic)
                del flying[0]
        while flying:
            yield from _finish(flying[0], total, arithmetic)
            del flying[0]
    return None


@dataclass(frozen=True, slots=True)
class Segment:
    """One message of a round, in elements."""

    op: Op
    peer: int
    offset: int
    count: int


def segments(
    rows: list[tuple[Op, int, int, int]], ops: tuple[Op, ...], segment: int
) -> Iterator[Segment]:
    """Cut a round's rows of these ops into messages of at most `segment` elements."""
    for op, peer, offset, count in rows:
        if op in ops:
            for low in range(0, count, segment):
                yield Segment(op, peer, offset + low, min(segment, count - low))


def _scratch(program: Program, segment: int, target: Array, window: int) -> Array:
    """Return memory for what arrives to be added: a segment for each one in flight."""
    return np.empty(window * min(segment, program.most_added), target.dtype)


def _landing(receive: Segment, target: Array, scratch: Array, slot: int, window: int) -> Array:
    if receive.op == Op.RECV:
        return target[receive.offset : receive.offset + receive.count]
    start = slot % window * (scratch.size // window)
    return scratch[start : start + receive.count]


def _local(rows: list[tuple[Op, int, int, int]], target: Array, arithmetic: Arithmetic) -> None:
    for op, _, offset, count in rows:
        if op in (Op.WIDEN, Op.NARROW):
            assert arithmetic.accumulator is not None and arithmetic.widen and arithmetic.narrow
            wide = arithmetic.accumulator[offset : offset + count]
            piece = target[offset : offset + count]
            if op == Op.WIDEN:
                arithmetic.widen(wide, piece)
            else:
                arithmetic.narrow(piece, wide)


def _finish(
    entry: tuple[list[Request], Segment | None, Array], total: Array, arithmetic: Arithmetic
) -> Iterator[list[Request]]:
    requests, receive, arrived = entry
    while True:
        requests = [request for request in requests if not request.done()]
        if not requests:
            break
        yield requests
    if receive is not None and receive.op == Op.RECV_REDUCE:
        arithmetic.add(total[receive.offset : receive.offset + receive.count], arrived)
