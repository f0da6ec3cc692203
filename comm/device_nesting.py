"""Allreduce of GPU memory over several nodes: over ipc within them, by messages between them.

What `nesting.nest` does for the host, in place: of every piece of the buffer each rank of a node
folds a part, the ranks of equal place on their nodes - a lane - reduce their parts by whatever way
the lane has, and each rank copies the parts of the others of its node. So a rank's messages carry
one part of many, and nothing else passes through the host. Half widths travel as float32 and are
rounded once.

Only ranks of one node read each other's memory. What is not registered is copied to scratch memory
that is, on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import mean_scales
from .call_codes import code_of, describe_code
from .device import Device, DeviceArithmetic, DeviceArray, Exported, Stream, renewed
from .dtypes import DTYPES, DType
from .errors import MismatchError
from .fingerprint import fingerprint
from .fused_rows import part
from .ipc import Ipc, Launch, Offer, Words
from .ipc_trial import open_ipc
from .scratch import Piece, Scratch
from .trace import Signature
from .transport.base import Channel
from .turns import Line
from .waits import seen_from
from .work import Behind, Prepared, Receipt, Steps

if TYPE_CHECKING:
    from .communicator import Communicator
    from .device_ways import DeviceWays

NEST_BYTES = 256 << 10
"""From here on: below, the rounds within nodes take longer than what they save between them.

An estimate, of three meetings within a node with a launch behind each; not measured on a GPU.
"""

PIECE_BYTES = 64 << 20
"""Of the buffer at a time, so that scratch memory stays bounded."""


class Place:
    """A part of device memory as an array, whose work goes to one stream."""

    def __init__(self, address: int, count: int, dtype: DType, stream: Stream) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (count,),
            "typestr": dtype.storage.str,
            "data": (address, False),
            "strides": None,
            "stream": stream,
        }


@dataclass(frozen=True)
class _Call:
    """One allreduce.

    plain: what is computed in nodes and between them, a mean's sum.  number: of ranks in all.
    """

    op: str
    dtype: DType
    count: int
    number: int

    @property
    def plain(self) -> str:
        return "sum" if self.op == "mean" else self.op

    @property
    def scales(self) -> tuple[float, float]:
        """Return what half widths are divided by, before they are added and afterwards."""
        return mean_scales(self.op, self.number)


@dataclass(frozen=True)
class _Piece:
    """What one meeting of a node's ranks works on.

    index: of the piece in its buffer.  base: where it lies on this rank.  low, high: this rank's
    part of it, in elements.
    """

    index: int
    count: int
    base: int
    low: int
    high: int


_Launches = tuple[list[Launch], list[Launch]]
"""What puts a rank's fold on the stream, and its copies of the others' parts."""


class Nested:
    """Prepare allreduces of one group whose nodes hold equally many ranks, which open memory."""

    def __init__(
        self,
        group: Communicator,
        ipc: Ipc,
        lane: Communicator,
        ways: DeviceWays,
        device: Device,
        way: str,
    ) -> None:
        """ipc: of this rank's node.  ways: of the lane, where way is taken.  Collective."""
        assert device.peering is not None and device.arithmetic is not None
        self._group, self._ipc, self._lane, self._ways = group, ipc, lane, ways
        self._device, self._peering = device, device.peering
        self._arithmetic: DeviceArithmetic = device.arithmetic
        self._way = f"ipc in nodes, {way} between them"
        self._scratch = Scratch(device.arithmetic)
        self._line = Line(group.rank)
        place = np.array([group.rank])
        self._neighbours: list[int] = group.node.allgather(place).ravel().tolist()
        self._elsewhere: list[int] = lane.allgather(place).ravel().tolist()

    def close(self) -> None:
        """Give the lane back, and the others' memory; collective."""
        self._ipc.close()
        self._ways.close()
        self._lane.close()

    def takes(self, array: DeviceArray, op: str) -> bool:
        """Tell whether an allreduce goes this way; alike on all ranks."""
        plain, name = "sum" if op == "mean" else op, array.dtype.name
        if array.nbytes < NEST_BYTES:
            return False
        if array.dtype.wide:
            return self._arithmetic.knows(plain, "float32")
        return self._peering.folds(plain, name)

    def allreduce(self, array: DeviceArray, op: str) -> Prepared:
        """Reduce in place."""
        device, stream = self._device, self._ipc.stream
        call = _Call(op, array.dtype, array.count, self._group.size)
        signature = Signature("allreduce", op, array.dtype.name, array.count)

        def run(tag: int) -> Steps:
            caller = device.caller(renewed(array))
            ready = device.record(caller)
            with self._line.turn() as turn:
                while not turn.done():
                    yield [turn]
                device.follow(stream, ready)
                for index, (low, high) in enumerate(_pieces(array)):
                    at = array.address + low * array.dtype.itemsize
                    yield from self._piece(call, index, at, high - low, tag)
                last = device.record(stream)
            return Behind(array.owner, partial(device.follow, caller, last))

        places = self._group.node.size
        receipt = Receipt(
            "allreduce",
            "hierarchical",
            self._way,
            places * sum(1 for _ in _pieces(array)),
            array.nbytes,
            f"{NEST_BYTES >> 10} KiB or more over {self._lane.size} nodes of {places} ranks",
        )
        mark = fingerprint(signature, "nested")
        return Prepared(receipt, Channel.COLLECTIVE, run, signature, mark=mark)

    # -- one piece ---------------------------------------------------------------------------

    def _piece(self, call: _Call, index: int, at: int, count: int, tag: int) -> Steps:
        """Reduce a piece of an array in place; ends when all of it is on the stream."""
        stream, nbytes = self._ipc.stream, count * call.dtype.itemsize
        exported, room = self._peering.export(at, nbytes), None
        base = at
        if exported is None:
            room = self._scratch.take(nbytes)
            base = room[0]
            self._arithmetic.copy(base, at, nbytes, stream)
            exported = self._peering.export(base, nbytes)
        assert exported is not None
        bounds = part(count, call.dtype.itemsize, self._group.node.size, self._group.node.rank)
        piece = _Piece(index, count, base, *bounds)
        yield from self._reduce(call, piece, exported, tag)
        if room is not None:
            self._arithmetic.copy(at, base, nbytes, stream)
            self._give(room)

    def _reduce(self, call: _Call, piece: _Piece, exported: Exported, tag: int) -> Steps:
        code = code_of("allreduce", call.op, call.dtype.name)
        offer = Offer(exported.token, exported, (code, call.count, piece.index))
        rows = yield from seen_from(self._neighbours, self._ipc.meet(offer, tag))
        wide = self._wide(piece) if call.dtype.wide else []
        key = call, piece, tuple(room[0] for room in wide)
        make = partial(self._launches, call, piece, wide)
        launches = self._ipc.kept(key, rows, piece.base, make)
        if launches is None:
            raise MismatchError(self._mismatch(rows))
        fold, copies = launches
        self._ipc.begin()
        for launch in fold:
            launch()
        if piece.high > piece.low:
            yield from self._between(call, piece, wide, tag)
        for room in wide:
            self._give(room)
        yield from seen_from(self._neighbours, self._ipc.meet_again(tag))
        for launch in copies:
            launch()
        yield from seen_from(self._neighbours, self._ipc.end(tag))

    def _wide(self, piece: _Piece) -> list[Piece]:
        """Return room for this rank's part in float32, and for what is added to it."""
        nbytes = (piece.high - piece.low) * 4
        return [self._scratch.take(nbytes) for _ in range(2 if nbytes else 0)]

    def _launches(
        self, call: _Call, piece: _Piece, wide: list[Piece], bases: list[int]
    ) -> _Launches:
        item, stream = call.dtype.itemsize, self._ipc.stream
        node, count = self._group.node, piece.high - piece.low
        sources = [base + piece.low * item for base in bases]
        fold: list[Launch] = []
        if count and wide:
            fold = list(self._widening(call, sources, wide, count))
        elif count:
            target = piece.base + piece.low * item
            name = call.dtype.name
            fold = [self._peering.fold(call.plain, name, sources, [target], count, stream)]
        copies: list[Launch] = []
        for step in range(1, node.size):  # from the next on, so that not all turn to the same
            other = (node.rank + step) % node.size
            low, high = part(piece.count, item, node.size, other)
            if high > low:
                here, there = piece.base + low * item, bases[other] + low * item
                nbytes = (high - low) * item
                copies.append(partial(self._peering.copy, here, there, nbytes, stream))
        return fold, copies

    def _widening(
        self, call: _Call, sources: list[int], wide: list[Piece], count: int
    ) -> Iterator[Launch]:
        """Add half widths in float32, in the order of the node's ranks."""
        stream, before = self._ipc.stream, call.scales[0]
        total, landing = (room[0] for room in wide)
        for number, source in enumerate(sources):
            into = landing if number else total
            yield partial(
                self._arithmetic.convert,
                source,
                call.dtype.name,
                into,
                "float32",
                count,
                before,
                stream,
            )
            if number:
                yield partial(
                    self._arithmetic.combine, call.plain, "float32", total, landing, count, stream
                )

    def _between(self, call: _Call, piece: _Piece, wide: list[Piece], tag: int) -> Steps:
        """Reduce this rank's part over its lane, and write it to its place."""
        count, stream = piece.high - piece.low, self._ipc.stream
        at, name = piece.base + piece.low * call.dtype.itemsize, call.dtype.name
        dtype = DTYPES["float32"] if wide else call.dtype
        place = Place(wide[0][0] if wide else at, count, dtype, stream)
        prepared = self._ways.allreduce(place, call.plain)
        self._lane._runner.note(prepared)
        result = yield from seen_from(self._elsewhere, prepared.run(tag))
        result.settle()
        if wide:
            after = call.scales[1]
            self._arithmetic.convert(wide[0][0], "float32", at, name, count, after, stream)
        elif call.op == "mean":
            self._arithmetic.convert(at, name, at, name, count, float(call.number), stream)

    def _give(self, piece: Piece) -> None:
        self._scratch.give(piece, self._device.record(self._ipc.stream))

    def _mismatch(self, rows: Words) -> str:
        calls = (f"{describe_code(int(row[2]))} of {int(row[3])} elements" for row in rows)
        pairs = zip(self._neighbours, calls, strict=True)
        told = "; ".join(f"rank {rank}: {text}" for rank, text in pairs)
        return f"the ranks' calls differ: {told}"


def _pieces(array: DeviceArray) -> Iterator[tuple[int, int]]:
    step = max(1, PIECE_BYTES // array.dtype.itemsize)
    for low in range(0, array.count, step):
        yield low, min(low + step, array.count)


def open_nested(
    group: Communicator,
    array: DeviceArray,
    device: Device,
    alike: Callable[[Communicator], DeviceWays],
) -> Nested | None:
    """Open ipc in the nodes of a group, and lanes between them; collective over the group.

    alike: return the ways of another group's device memory.

    Returns: None where there is one node, where nodes hold one rank or unequally many, or where
    the ranks of a node cannot open each other's memory.
    """
    node = group.node
    if node.size == group.size:
        return None
    widths = group.allgather(np.array([node.size], np.int64))
    if widths.min() < 2 or widths.min() != widths.max():
        return None
    ipc = open_ipc(node, device)[0]
    able = np.array([ipc is not None and device.arithmetic is not None], np.uint8)
    if not group.allreduce(able, "min")[0]:
        if ipc is not None:
            ipc.close()
        return None
    assert ipc is not None
    lane = group.split(node.rank, group.rank)
    assert lane is not None
    ways = alike(lane)
    # Prepared, not run: it opens the lane's own way, which is collective, and tells what it is.
    way = ways.broadcast(array.owner).receipt.transport
    return Nested(group, ipc, lane, ways, device, way)
