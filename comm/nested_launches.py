"""What goes on a rank's stream for its part of a piece that the ranks of a node work on.

Addresses of others' memory come in as `bases`: where the piece lies on each rank of the node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from .arithmetic import mean_scales, plain
from .device import DeviceArithmetic, Peering, Stream
from .dtypes import DType
from .ipc import Launch
from .nested_pieces import Piece
from .scratch import DevicePlace
from .trace import Signature
from .work import Prepared


@dataclass(frozen=True)
class Call:
    """One collective on this rank.

    number: of ranks in all.  between: prepare the lane's collective on a part.
    shows: others of the node may read the array itself, and it may be written.
    brings: this rank's elements count.  takes: its array gets the result.
    source: the place of the rank of this node whose part is copied before the lane moves it; None
    for none.  gathers: ranks of the node copy others' parts when the lanes have moved them.
    """

    signature: Signature
    dtype: DType
    number: int
    between: Callable[[DevicePlace], Prepared]
    shows: bool = True
    brings: bool = True
    takes: bool = True
    gathers: bool = True
    source: int | None = None

    @property
    def plain(self) -> str:
        """Return the op that is computed in nodes and between them: a mean's sum; "" for none."""
        return plain(self.signature.op)

    @property
    def wide(self) -> bool:
        """Tell whether parts are added, and travel, as float32."""
        return self.dtype.wide and bool(self.signature.op)

    @property
    def scales(self) -> tuple[float, float]:
        """Return what half widths are divided by, before they are added and afterwards."""
        return mean_scales(self.signature.op, self.number)


@dataclass(frozen=True)
class RowsCall:
    """One collective on this rank that brings it rows of others.

    between: prepare the lane's collective.  order: of an alltoall, the ranks whose rows of the
    array are sent to the lane's, one after the other; () where the array is sent as it is.
    width: rows that a rank gets from each rank of its lane, for the ranks of its node.
    which: the number of this rank's row among them.  takes: this rank gets a result.
    """

    signature: Signature
    dtype: DType
    between: Callable[[DevicePlace], Prepared]
    order: Sequence[int] = ()
    width: int = 1
    which: int = 0
    takes: bool = True


@dataclass(frozen=True)
class Launches:
    """The kernels and copies of one rank of a node.  place: of this rank, by node rank."""

    peering: Peering
    arithmetic: DeviceArithmetic
    stream: Stream
    place: int

    def fill(
        self, call: Call, piece: Piece, base: int, bases: Sequence[int], rooms: Sequence[int]
    ) -> list[Launch]:
        """Return what makes this rank's part of a piece, before the lane moves it.

        rooms: of a part's elements in float32, the sum and what is added to it; () for none.
        """
        low, high = piece.parts[self.place]
        count, item = high - low, call.dtype.itemsize
        if not count:
            return []
        target = base + low * item
        sources = [at + low * item for at in bases]
        if call.wide:
            total, landing = rooms
            return list(self._widening(call, sources, total, landing, count))
        if call.plain:
            name = call.dtype.name
            return [self.peering.fold(call.plain, name, sources, [target], count, self.stream)]
        if call.source is not None:
            return [self._copy(target, sources[call.source], count * item)]
        return []

    def settle(self, call: Call, source: int, target: int, count: int) -> list[Launch]:
        """Return what writes count elements of a lane's result to where they go.

        source: where the lane left them, in float32 where parts are; it may be the target.
        """
        launches: list[Launch] = []
        name, convert = call.dtype.name, self.arithmetic.convert
        if not count:
            return launches
        if call.wide:
            after = call.scales[1]
            return [partial(convert, source, "float32", target, name, count, after, self.stream)]
        if source != target:
            launches.append(self._copy(target, source, count * call.dtype.itemsize))
        if call.signature.op == "mean":
            number = float(call.number)
            launches.append(
                partial(convert, target, name, target, name, count, number, self.stream)
            )
        return launches

    def gather(self, call: Call, piece: Piece, base: int, bases: Sequence[int]) -> list[Launch]:
        """Return what copies the others' parts of a piece, where this rank takes the result."""
        item = call.dtype.itemsize
        copies = []
        for other in self._others(len(bases)) if call.takes else ():
            low, high = piece.parts[other]
            if high > low:
                here, there = base + low * item, bases[other] + low * item
                copies.append(self._copy(here, there, (high - low) * item))
        return copies

    def rows(
        self,
        call: RowsCall,
        into: int,
        row_bytes: int,
        nbytes: int,
        lanes: Sequence[Sequence[int]],
        bases: Sequence[int],
    ) -> list[Launch]:
        """Return what copies nbytes of every rank's row, which each place has of its lane.

        into: where they begin in row 0; rows are row_bytes apart.
        """
        if not call.takes:
            return []
        return [
            self._copy(
                into + rank * row_bytes,
                bases[other] + (number * call.width + call.which) * nbytes,
                nbytes,
            )
            for other in (self.place, *self._others(len(bases)))
            for number, rank in enumerate(lanes[other])
        ]

    def _others(self, width: int) -> Iterator[int]:
        """Yield the other places, from the next on, so that not all turn to the same."""
        return ((self.place + step) % width for step in range(1, width))

    def _copy(self, target: int, source: int, nbytes: int) -> Launch:
        return partial(self.peering.copy, target, source, nbytes, self.stream)

    def _widening(
        self, call: Call, sources: Sequence[int], total: int, landing: int, count: int
    ) -> Iterator[Launch]:
        """Add half widths in float32, in the order of the node's ranks."""
        name, before, stream = call.dtype.name, call.scales[0], self.stream
        convert, combine = self.arithmetic.convert, self.arithmetic.combine
        for number, source in enumerate(sources):
            into = landing if number else total
            yield partial(convert, source, name, into, "float32", count, before, stream)
            if number:
                yield partial(combine, call.plain, "float32", total, landing, count, stream)
