"""Collectives on GPU memory over several nodes: over ipc within them, by messages between them.

Of every piece of a buffer each rank of a node has a part. It folds that part of its node's ranks
(of a broadcast it copies the root's), the ranks of equal place on their nodes - a lane - move their
parts by whatever way the lane has, and where a result is wanted each rank copies the other parts
from its node's. An allgather begins with the lanes. So a rank's messages carry one part of many,
and nothing else passes through the host. Half widths travel as float32 and are rounded once.

It is what `nesting.nest` does for the host, in place. Only ranks of one node read each other's
memory. What is not registered is copied to scratch memory that is, on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .call_codes import code_of, describe_code
from .chunks import bounds
from .device import Device, DeviceArithmetic, DeviceArray, Exported, describe, renewed
from .dtypes import DTYPES
from .errors import MismatchError
from .fingerprint import fingerprint
from .ipc import Ipc, Launch, Offer, Words
from .nested_launches import Call, Launches, plain
from .nested_pieces import Piece, elementwise, scattered, steps
from .scratch import Piece as Room
from .scratch import Place, Scratch
from .trace import Signature
from .transport.base import Channel
from .turns import Line
from .waits import seen_from
from .work import Behind, Prepared, Receipt, Steps

if TYPE_CHECKING:
    from .communicator import Communicator
    from .device_operations import Algorithm
    from .device_ways import DeviceWays

Made = TypeVar("Made")

NEST_BYTES = 256 << 10
"""From here on: below, the rounds within nodes take longer than what they save between them.

An estimate, of three meetings within a node with a launch behind each; not measured on a GPU.
"""

PIECE_BYTES = 64 << 20
"""Of the buffer at a time, so that scratch memory stays bounded."""


class Nested:
    """Prepare collectives of one group whose nodes hold equally many ranks, which open memory."""

    def __init__(
        self,
        group: Communicator,
        ipc: Ipc,
        lane: Communicator,
        ways: DeviceWays,
        device: Device,
        scratch: Scratch,
        way: str,
    ) -> None:
        """ipc: of this rank's node.  ways: of the lane, where way is taken.  Collective.

        scratch: what the results of the lane's ways come from.
        """
        assert device.peering is not None and device.arithmetic is not None
        self._group, self._ipc, self._lane, self._ways = group, ipc, lane, ways
        self._device, self._peering = device, device.peering
        self._arithmetic: DeviceArithmetic = device.arithmetic
        self._scratch, self._way = scratch, f"ipc in nodes, {way} between them"
        self._line = Line(group.rank)
        self._launches = Launches(self._peering, self._arithmetic, ipc.stream, group.node.rank)
        place, node = np.array([group.rank]), group.node
        self._neighbours: list[int] = node.allgather(place).ravel().tolist()
        self._elsewhere: list[int] = lane.allgather(place).ravel().tolist()
        self._lanes: list[list[int]] = node.allgather(np.array(self._elsewhere)).tolist()
        # Of every rank: the first rank of its node, and its place there.
        seats = group.allgather(np.array([self._neighbours[0], node.rank]))
        self._seats: list[list[int]] = seats.tolist()

    def close(self) -> None:
        """Give the lane back, and the others' memory; collective."""
        self._ipc.close()
        self._ways.close()
        self._lane.close()

    def reduces(self, array: DeviceArray, op: str) -> bool:
        """Tell whether a reduction goes this way; alike on all ranks."""
        if not self.moves(array.nbytes):
            return False
        if array.dtype.wide:
            return self._arithmetic.knows(plain(op), "float32")
        return self._peering.folds(plain(op), array.dtype.name)

    def moves(self, nbytes: int) -> bool:
        """Tell whether what moves so much goes this way; alike on all ranks."""
        return nbytes >= NEST_BYTES

    # -- collectives; who names an algorithm goes another way ---------------------------------

    def allreduce(self, array: DeviceArray, op: str, algorithm: Algorithm) -> Prepared:
        """Reduce in place."""
        call = Call(
            Signature("allreduce", op, array.dtype.name, array.count),
            array.dtype,
            self._group.size,
            partial(self._ways.allreduce, op=plain(op)),
        )
        return self._elementwise(call, array)

    def reduce(self, array: DeviceArray, root: int, op: str, algorithm: Algorithm) -> Prepared:
        """Reduce in place at root; elsewhere in a copy."""
        at_root = self._group.rank == root
        call = Call(
            Signature("reduce", op, array.dtype.name, array.count, root),
            array.dtype,
            self._group.size,
            partial(self._ways.reduce, root=self._in_lane(root), op=plain(op)),
            shows=at_root,
            takes=at_root,
        )
        return self._elementwise(call, array)

    def broadcast(self, array: DeviceArray, root: int, algorithm: Algorithm) -> Prepared:
        """Copy root's over the others'."""
        at_root = self._group.rank == root
        first, place = self._seats[root]
        call = Call(
            Signature("broadcast", "", array.dtype.name, array.count, root),
            array.dtype,
            self._group.size,
            partial(self._ways.broadcast, root=self._in_lane(root)),
            brings=at_root,
            takes=not at_root,
            source=place if first == self._neighbours[0] and not at_root else None,
        )
        return self._elementwise(call, array)

    def reduce_scatter(self, array: DeviceArray, op: str, algorithm: Algorithm) -> Prepared:
        """Reduce a copy, in which the chunks of a lane's ranks lie together; return one's own."""
        call = Call(
            Signature("reduce_scatter", op, array.dtype.name, array.count),
            array.dtype,
            self._group.size,
            partial(self._ways.reduce_scatter, op=plain(op)),
            shows=False,
            takes=False,
            gathers=False,
        )
        pieces = list(scattered(array.count, self._lanes, PIECE_BYTES // array.dtype.itemsize))
        low, high = bounds(array.count, self._group.size, self._group.rank)

        def run(into: int, tag: int) -> Iterator[Steps]:
            return (self._piece(call, array, into, piece, tag) for piece in pieces)

        return self._prepared(call.signature, array, array.nbytes, len(pieces), run, (high - low,))

    def allgather(self, array: DeviceArray, algorithm: Algorithm) -> Prepared:
        """Return a row from every rank."""
        signature = Signature("allgather", "", array.dtype.name, array.count)
        size, item = self._group.size, array.dtype.itemsize
        pieces = list(steps(array.count, PIECE_BYTES // (item * self._lane.size)))

        def run(into: int, tag: int) -> Iterator[Steps]:
            return (
                self._rows(signature, array, into, index, low, high, tag)
                for index, (low, high) in enumerate(pieces)
            )

        nbytes = array.nbytes * size
        return self._prepared(signature, array, nbytes, len(pieces), run, (size, *array.shape))

    def _elementwise(self, call: Call, array: DeviceArray) -> Prepared:
        item, width = array.dtype.itemsize, self._group.node.size
        pieces = list(elementwise(array.count, item, width, PIECE_BYTES // item))

        def run(into: int, tag: int) -> Iterator[Steps]:
            return (self._piece(call, array, into, piece, tag) for piece in pieces)

        return self._prepared(call.signature, array, array.nbytes, len(pieces), run)

    def _prepared(
        self,
        signature: Signature,
        array: DeviceArray,
        nbytes: int,
        number: int,
        run: Callable[[int, int], Iterator[Steps]],
        shape: tuple[int, ...] | None = None,
    ) -> Prepared:
        """Prepare what works on one piece after the other.

        number: of pieces.  run: (address of the result, tag) -> the steps of every piece.
        shape: of a new result; None where it is the array itself.
        """
        device, stream = self._device, self._ipc.stream

        def begin(tag: int) -> Steps:
            caller = device.caller(renewed(array))
            result, into = array.owner, array.address
            if shape is not None:
                result = device.like(array, shape)
                into = describe(result, writable=True).address
            # Recorded now, when the caller calls, and behind the making of its result.
            ready = device.record(caller)
            with self._line.turn() as turn:
                while not turn.done():
                    yield [turn]
                device.follow(stream, ready)
                for piece in run(into, tag):
                    yield from piece
                last = device.record(stream)
            return Behind(result, partial(device.follow, caller, last))

        places = self._group.node.size
        receipt = Receipt(
            signature.operation,
            "hierarchical",
            self._way,
            places * number,
            nbytes,
            f"{NEST_BYTES >> 10} KiB or more over {self._lane.size} nodes of {places} ranks",
        )
        mark = fingerprint(signature, "nested")
        return Prepared(receipt, Channel.COLLECTIVE, begin, signature, mark=mark)

    # -- one piece ---------------------------------------------------------------------------

    def _piece(self, call: Call, array: DeviceArray, into: int, piece: Piece, tag: int) -> Steps:
        """Do one piece; ends when all of it is on the stream."""
        item, stream = call.dtype.itemsize, self._ipc.stream
        nbytes = piece.count * item
        base, room = array.address + piece.start * item, None
        exported = self._peering.export(base, nbytes) if call.shows else None
        if exported is None:
            room = self._scratch.take(nbytes)
            base = room[0]
            for at, start, count in piece.into if call.brings else ():
                source = array.address + start * item
                self._arithmetic.copy(base + at * item, source, count * item, stream)
            exported = self._peering.export(base, nbytes)
        assert exported is not None
        yield from self._nest(call, piece, base, into + piece.start * item, exported, tag)
        if room is not None:
            if call.takes:
                self._arithmetic.copy(array.address + piece.start * item, base, nbytes, stream)
            self._give(room)

    def _nest(
        self, call: Call, piece: Piece, base: int, into: int, exported: Exported, tag: int
    ) -> Steps:
        """Work on a piece at `base` of every rank of the node.

        into: where the result of a lane goes that is not the part itself.
        """
        low, high = piece.parts[self._group.node.rank]
        rows = yield from self._meet(call.signature, piece.index, exported, tag)
        rooms = self._wide(high - low) if call.wide else []
        places = [room[0] for room in rooms]

        def launches(bases: list[int]) -> tuple[list[Launch], list[Launch]]:
            fill = self._launches.fill(call, piece, base, bases, places)
            return fill, self._launches.gather(call, piece, base, bases)

        key = call.signature, piece.index, base, *places
        fill, copies = self._known(key, rows, base, launches)
        self._ipc.begin()
        for launch in fill:
            launch()
        if high > low:
            at = base + low * call.dtype.itemsize
            yield from self._between(call, at, high - low, into, rooms, tag)
        for room in rooms:
            self._give(room)
        if call.gathers:
            yield from seen_from(self._neighbours, self._ipc.meet_again(tag))
        for launch in copies:
            launch()
        yield from seen_from(self._neighbours, self._ipc.end(tag))

    def _meet(self, signature: Signature, index: int, exported: Exported, tag: int) -> Steps:
        """Show a piece to the ranks of the node; return what all show."""
        what = code_of(signature.operation, signature.op, signature.dtype)
        which = index * (self._group.size + 1) + signature.peer + 1
        offer = Offer(exported.token, exported, (what, signature.elements, which))
        return (yield from seen_from(self._neighbours, self._ipc.meet(offer, tag)))

    def _known(
        self, key: object, rows: Words, base: int, make: Callable[[list[int]], Made]
    ) -> Made:
        known = self._ipc.kept(key, rows, base, make)
        if known is None:
            raise MismatchError(self._mismatch(rows))
        return known

    def _wide(self, count: int) -> list[Room]:
        """Return room for this rank's part in float32, and for what is added to it."""
        return [self._scratch.take(count * 4) for _ in range(2)]

    def _between(
        self, call: Call, at: int, count: int, into: int, rooms: list[Room], tag: int
    ) -> Steps:
        """Let the lane move this rank's part, and write what comes to its place."""
        dtype = DTYPES["float32"] if rooms else call.dtype
        place = Place(rooms[0][0] if rooms else at, (count,), dtype, self._ipc.stream)
        found: Place = yield from self._over_lane(call.between(place), tag)
        if found is not place:
            at, count = into, found.shape[0]
        for launch in self._launches.settle(call, found.address, at, count):
            launch()
        if found.piece is not None:
            self._give(found.piece)

    def _rows(
        self,
        signature: Signature,
        array: DeviceArray,
        into: int,
        index: int,
        low: int,
        high: int,
        tag: int,
    ) -> Steps:
        """Gather elements [low, high) of every rank's row: over the lanes, then in the node."""
        item, stream = array.dtype.itemsize, self._ipc.stream
        place = Place(array.address + low * item, (high - low,), array.dtype, stream)
        found: Place = yield from self._over_lane(self._ways.allgather(place), tag)
        assert found.piece is not None
        nbytes = (high - low) * item
        exported = self._peering.export(found.address, nbytes * self._lane.size)
        assert exported is not None
        rows = yield from self._meet(signature, index, exported, tag)
        target = into + low * item
        make = partial(self._launches.rows, target, array.nbytes, nbytes, self._lanes)
        key = signature, index, into, found.address
        copies = self._known(key, rows, found.address, make)
        self._ipc.begin()
        for launch in copies:
            launch()
        yield from seen_from(self._neighbours, self._ipc.end(tag))
        self._give(found.piece)

    def _over_lane(self, prepared: Prepared, tag: int) -> Steps:
        """Do a collective of the lane; return its result."""
        self._lane._runner.note(prepared)
        result = yield from seen_from(self._elsewhere, prepared.run(tag))
        return result.settle()

    def _in_lane(self, root: int) -> int:
        """Return the number in this rank's lane of the rank on the root's node."""
        first = self._seats[root][0]
        return next(i for i, rank in enumerate(self._elsewhere) if self._seats[rank][0] == first)

    def _give(self, room: Room) -> None:
        self._scratch.give(room, self._device.record(self._ipc.stream))

    def _mismatch(self, rows: Words) -> str:
        told = []
        for rank, row in zip(self._neighbours, rows.tolist(), strict=True):
            root = row[4] % (self._group.size + 1) - 1
            text = f"{describe_code(row[2])} of {row[3]} elements"
            told.append(f"rank {rank}: {text}{f', root {root}' if root >= 0 else ''}")
        return f"the ranks' calls differ: {'; '.join(told)}"
