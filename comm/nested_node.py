"""One rank's work on a piece: with the ranks of its node over ipc, and with those of its lane."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .call_codes import code_of, describe_code
from .device import Device, DeviceArithmetic, DeviceArray, Exported
from .dtypes import DTYPES
from .errors import MismatchError
from .ipc import Ipc, Launch, Offer, Words
from .nested_launches import Call, Launches, RowsCall
from .nested_pieces import Part, Piece
from .nested_seats import Seats
from .notices import DIFFER
from .scratch import DevicePlace, Room, Scratch
from .texts import table
from .trace import Signature
from .waits import seen_from
from .work import Prepared, Steps

if TYPE_CHECKING:
    from .communicator import Communicator

Made = TypeVar("Made")


class NestedNode:
    """One rank's side of its node and its lane.

    stream: where all of it runs.  seats: of the ranks of the whole group.
    """

    def __init__(
        self, group: Communicator, ipc: Ipc, lane: Communicator, device: Device, scratch: Scratch
    ) -> None:
        """ipc: of this rank's node.  scratch: what a lane's results come from.  Collective."""
        assert device.peering is not None and device.arithmetic is not None
        self._size, self._ipc, self._lane = group.size, ipc, lane
        self._device, self._peering = device, device.peering
        self._arithmetic: DeviceArithmetic = device.arithmetic
        self._scratch, self.stream, node = scratch, ipc.stream, group.node
        self._launches = Launches(self._peering, self._arithmetic, ipc.stream, node.rank)
        mine = np.array([group.rank])
        self._neighbours: list[int] = node.allgather(mine).ravel().tolist()
        lanes = node.allgather(lane.allgather(mine).ravel())
        node_of = group.allgather(np.array([self._neighbours[0]])).ravel()
        self.seats = Seats(node_of.tolist(), lanes.tolist(), node.rank)

    def close(self) -> None:
        """Give back the others' memory."""
        self._ipc.close()

    def piece(self, call: Call, array: DeviceArray, into: int, piece: Piece, tag: int) -> Steps:
        """Do one piece of an array; ends when all of it is on the stream.

        into: the address of a result that is not the array itself.
        """
        item = call.dtype.itemsize
        nbytes, at = piece.count * item, array.address + piece.start * item
        exported = self._peering.export(at, nbytes) if call.shows else None
        if exported is not None:
            yield from self._nest(call, piece, at, 0, exported, tag)
            return
        room = self._scratch.take(nbytes)
        for begin, start, count in piece.into if call.brings else ():
            source = array.address + start * item
            self._arithmetic.copy(room.address + begin * item, source, count * item, self.stream)
        exported = self._export(room.address, nbytes)
        yield from self._nest(call, piece, room.address, into + piece.start * item, exported, tag)
        if call.takes:
            self._arithmetic.copy(at, room.address, nbytes, self.stream)
        self._give(room)

    def rows(
        self, call: RowsCall, array: DeviceArray, into: int, index: int, part: Part, tag: int
    ) -> Steps:
        """Bring elements [low, high) of rows here: over the lanes, then in the node.

        into: the address of the rows that come.  index: of this part among all.
        """
        (low, high), item, stream = part, call.dtype.itemsize, self.stream
        nbytes, row = (high - low) * item, array.nbytes
        if call.order:
            row = array.nbytes // self._size
            place = self._sorted(call, array.address + low * item, row, high - low)
        else:
            place = DevicePlace(array.address + low * item, (high - low,), call.dtype, stream)
        found: DevicePlace | None = yield from self._over_lane(call.between(place), tag)
        if place.room is not None:
            self._give(place.room)
        if found is None:  # of a gather, on nodes without the root
            return
        assert found.room is not None
        exported = self._export(found.address, nbytes * len(self.seats.lane) * call.width)
        shown = yield from self._meet(call.signature, index, exported, tag)
        make = partial(self._launches.rows, call, into + low * item, row, nbytes, self.seats.lanes)
        key = call.signature, index, into, found.address
        copies = self._known(key, shown, found.address, make)
        self._ipc.begin()
        for launch in copies:
            launch()
        yield from seen_from(self._neighbours, self._ipc.end(tag))
        self._give(found.room)

    # -- parts of them -----------------------------------------------------------------------

    def _nest(
        self, call: Call, piece: Piece, base: int, into: int, exported: Exported, tag: int
    ) -> Steps:
        """Work on a piece at `base` of every rank of the node.

        into: where the lane's result goes, if that is not the part itself.
        """
        low, high = piece.parts[self.seats.place]
        rows = yield from self._meet(call.signature, piece.index, exported, tag)
        rooms = [self._scratch.take((high - low) * 4) for _ in range(2 if call.wide else 0)]
        places = [room.address for room in rooms]

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

    def _between(
        self, call: Call, at: int, count: int, into: int, rooms: list[Room], tag: int
    ) -> Steps:
        """Let the lane move this rank's part, and write what comes where it belongs."""
        dtype = DTYPES["float32"] if rooms else call.dtype
        place = DevicePlace(rooms[0].address if rooms else at, (count,), dtype, self.stream)
        found: DevicePlace = yield from self._over_lane(call.between(place), tag)
        if found is not place:
            at, count = into, found.shape[0]
        for launch in self._launches.settle(call, found.address, at, count):
            launch()
        if found.room is not None:
            self._give(found.room)

    def _sorted(self, call: RowsCall, at: int, row_bytes: int, count: int) -> DevicePlace:
        """Return a copy of elements of every row, in the order in which the lane sends them."""
        lanes, nbytes = len(self.seats.lane), count * call.dtype.itemsize
        place = self._scratch.array((lanes, call.width * count), call.dtype, self.stream)
        for number, rank in enumerate(call.order):
            target, source = place.address + number * nbytes, at + rank * row_bytes
            self._arithmetic.copy(target, source, nbytes, self.stream)
        return place

    def _over_lane(self, prepared: Prepared, tag: int) -> Steps:
        """Do a collective of the lane; return its result."""
        self._lane._runner.note(prepared)
        result = yield from seen_from(self.seats.lane, prepared.run(tag))
        return result.settle()

    def _meet(self, signature: Signature, index: int, exported: Exported, tag: int) -> Steps:
        """Show memory to the ranks of the node; return what all show."""
        what = code_of(signature.operation, signature.op, signature.dtype)
        which = index * (self._size + 1) + signature.peer + 1
        offer = Offer(exported.token, exported, (what, signature.elements, which))
        return (yield from seen_from(self._neighbours, self._ipc.meet(offer, tag)))

    def _known(
        self, key: object, rows: Words, base: int, make: Callable[[list[int]], Made]
    ) -> Made:
        """Return what follows from what all show; MismatchError where they call differently."""
        known = self._ipc.kept(key, rows, base, make)
        if known is None:
            raise MismatchError(self._mismatch(rows))
        return known

    def _export(self, address: int, nbytes: int) -> Exported:
        exported = self._peering.export(address, nbytes)
        assert exported is not None  # scratch memory is registered
        return exported

    def _give(self, room: Room) -> None:
        self._scratch.give(room, self._device.record(self.stream))

    def _mismatch(self, rows: Words) -> str:
        told = {}
        for rank, row in zip(self._neighbours, rows.tolist(), strict=True):
            root = row[4] % (self._size + 1) - 1
            text = f"{describe_code(row[2])} of {row[3]} elements"
            told[rank] = f"{text}{f', root {root}' if root >= 0 else ''}"
        return table(DIFFER, told)
