"""Collectives on GPU memory over several nodes: over ipc within them, by messages between them.

Each rank of a node has one part of every piece of a buffer. It folds that part of all its node's
ranks, or copies the root's for a broadcast. Then the ranks of equal place on their nodes - a lane -
move their parts, by whatever way the lane has. Where a result is wanted, each rank copies the other
parts from the ranks of its node. What brings rows of others begins with the lanes: in an alltoall a
rank sends to each rank of its lane the rows for all ranks of that one's node. So a rank's messages
carry one part of many, and nothing else passes through the host. Half widths travel as float32 and
are rounded once.

It does in place what `nesting.nest` does for the host. Only ranks of one node read each other's
memory; an array that is not registered is copied to scratch memory on the device, which is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from .arithmetic import plain
from .chunks import bounds
from .device import Device, DeviceArray, Event, like
from .device_calls import Make, called
from .fingerprint import fingerprint
from .nested_launches import Call, RowsCall
from .nested_node import NestedNode
from .nested_pieces import Piece, elementwise, scattered, steps
from .trace import Signature
from .transport.base import Channel
from .turns import Line
from .work import Prepared, Receipt, Steps

if TYPE_CHECKING:
    from .communicator import Communicator
    from .device_ways import DeviceWays
    from .schedule import Algorithm

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
        node: NestedNode,
        lane: Communicator,
        ways: DeviceWays,
        device: Device,
        way: str,
    ) -> None:
        """node: this rank's side.  ways: of the lane, where `way` is taken."""
        self._rank, self._size = group.rank, group.size
        self._node, self._lane, self._ways, self._device = node, lane, ways, device
        self._way = f"ipc in nodes, {way} between them"
        self._line = Line(group.rank)
        self._abandoned: list[object] = []

    def close(self) -> None:
        """Give the lane back, and the others' memory; collective."""
        self._node.close()
        self._ways.close()
        self._lane.close()

    def takes(self, nbytes: int) -> bool:
        """Tell whether a collective on so much goes this way; alike on all ranks."""
        return nbytes >= NEST_BYTES

    # -- reductions, and a broadcast; who names an algorithm goes another way -----------------

    def allreduce(self, array: DeviceArray, op: str, algorithm: Algorithm) -> Prepared:
        """Reduce in place."""
        call = Call(
            Signature("allreduce", op, array.dtype.name, array.count),
            array.dtype,
            self._size,
            partial(self._ways.allreduce, op=plain(op)),
        )
        return self._elementwise(call, array)

    def reduce(self, array: DeviceArray, root: int, op: str, algorithm: Algorithm) -> Prepared:
        """Reduce in place at root; elsewhere in a copy."""
        at_root = self._rank == root
        call = Call(
            Signature("reduce", op, array.dtype.name, array.count, root),
            array.dtype,
            self._size,
            partial(self._ways.reduce, root=self._in_lane(root), op=plain(op)),
            shows=at_root,
            takes=at_root,
        )
        return self._elementwise(call, array)

    def broadcast(self, array: DeviceArray, root: int, algorithm: Algorithm) -> Prepared:
        """Copy root's over the others'."""
        at_root, seats = self._rank == root, self._node.seats
        beside = seats.node_of[root] == seats.node_of[self._rank] and not at_root
        call = Call(
            Signature("broadcast", "", array.dtype.name, array.count, root),
            array.dtype,
            self._size,
            partial(self._ways.broadcast, root=self._in_lane(root)),
            brings=at_root,
            takes=not at_root,
            source=seats.place_of(root) if beside else None,
        )
        return self._elementwise(call, array)

    def reduce_scatter(self, array: DeviceArray, op: str, algorithm: Algorithm) -> Prepared:
        """Reduce a copy, where the chunks of a lane's ranks lie together; return this rank's."""
        call = Call(
            Signature("reduce_scatter", op, array.dtype.name, array.count),
            array.dtype,
            self._size,
            partial(self._ways.reduce_scatter, op=plain(op)),
            shows=False,
            takes=False,
            gathers=False,
        )
        lanes, most = self._node.seats.lanes, PIECE_BYTES // array.dtype.itemsize
        low, high = bounds(array.count, self._size, self._rank)
        return self._pieces(call, array, list(scattered(array.count, lanes, most)), (high - low,))

    def _elementwise(self, call: Call, array: DeviceArray) -> Prepared:
        item, width = array.dtype.itemsize, self._node.seats.width
        pieces = elementwise(array.count, item, width, PIECE_BYTES // item)
        return self._pieces(call, array, list(pieces))

    def _pieces(
        self,
        call: Call,
        array: DeviceArray,
        pieces: list[Piece],
        shape: tuple[int, ...] | None = None,
    ) -> Prepared:
        """Prepare it piece by piece; shape: of a new result, None for the array itself."""

        def run(into: int, tag: int) -> Iterator[Steps]:
            return (self._node.piece(call, array, into, piece, tag) for piece in pieces)

        make = None if shape is None else partial(like, array=array, shape=shape)
        return self._prepared(call.signature, array, array.nbytes, len(pieces), run, make)

    # -- rows of others ----------------------------------------------------------------------

    def allgather(self, array: DeviceArray, algorithm: Algorithm) -> Prepared:
        """Return a row from every rank."""
        signature = Signature("allgather", "", array.dtype.name, array.count)
        return self._gathered(RowsCall(signature, array.dtype, self._ways.allgather), array)

    def gather(self, array: DeviceArray, root: int, algorithm: Algorithm) -> Prepared:
        """Return a row from every rank at root."""
        signature = Signature("gather", "", array.dtype.name, array.count, root)
        between = partial(self._ways.gather, root=self._in_lane(root))
        call = RowsCall(signature, array.dtype, between, takes=self._rank == root)
        return self._gathered(call, array)

    def alltoall(self, array: DeviceArray, algorithm: Algorithm) -> Prepared:
        """Return row r from rank r."""
        seats = self._node.seats
        call = RowsCall(
            Signature("alltoall", "", array.dtype.name, array.count),
            array.dtype,
            self._ways.alltoall,
            seats.by_lane(),
            seats.width,
            seats.place,
        )
        most = PIECE_BYTES // (array.dtype.itemsize * self._size)
        return self._rows(call, array, array.nbytes, array.count // self._size, most, array.shape)

    def _gathered(self, call: RowsCall, array: DeviceArray) -> Prepared:
        most = PIECE_BYTES // (array.dtype.itemsize * len(self._node.seats.lane))
        shape = (self._size, *array.shape)
        return self._rows(call, array, array.nbytes * self._size, array.count, most, shape)

    def _rows(
        self,
        call: RowsCall,
        array: DeviceArray,
        nbytes: int,
        row: int,
        most: int,
        shape: tuple[int, ...],
    ) -> Prepared:
        """Prepare it by `most` elements of every row at a time.

        nbytes: of all rows.  row: elements of one.  shape: of the result.
        """
        parts = list(steps(row, most))

        def run(into: int, tag: int) -> Iterator[Steps]:
            return (
                self._node.rows(call, array, into, index, part, tag)
                for index, part in enumerate(parts)
            )

        def make(device: Device) -> Any:
            return device.like(array, shape) if call.takes else None

        return self._prepared(call.signature, array, nbytes, len(parts), run, make)

    # -- all of them -------------------------------------------------------------------------

    def _prepared(
        self,
        signature: Signature,
        array: DeviceArray,
        nbytes: int,
        number: int,
        run: Callable[[int, int], Iterator[Steps]],
        make: Make | None,
    ) -> Prepared:
        """Prepare what works on one piece after the other.

        number: of pieces.  run: given what takes the result, and a tag, return the steps of each.
        """
        device, stream = self._device, self._node.stream

        def in_turn(into: int, ready: Event, tag: int) -> Steps:
            with self._line.turn() as turn:
                while not turn.done():
                    yield [turn]
                device.follow(stream, ready)
                for piece in run(into, tag):
                    yield from piece
                return device.record(stream), ""

        begin = partial(called, device, array, make, in_turn, self._abandoned)
        width, nodes = self._node.seats.width, len(self._node.seats.lane)
        receipt = Receipt(
            signature.operation,
            "hierarchical",
            self._way,
            width * number,
            nbytes,
            f"{NEST_BYTES >> 10} KiB or more over {nodes} nodes of {width} ranks",
        )
        mark = fingerprint(signature, "nested")
        return Prepared(receipt, Channel.COLLECTIVE, begin, signature, way="nested", mark=mark)

    def _in_lane(self, root: int) -> int:
        """Return which rank of this rank's lane is on the root's node."""
        return self._node.seats.in_lane(root, self._node.seats.place)
