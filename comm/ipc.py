"""Collectives on GPU memory in place: kernels of a node's ranks work on each other's memory.

The programs are those of host memory that all ranks map (the form "shared" of `fused`): everybody
comes, each rank folds or copies its part (of ranks that share a card, one folds for all), everybody
is done.
Events of each rank are known to all others: behind one its buffer may be read, behind another its
part of the work is done. (A third is for work in two steps, see `device_nesting`.) The hosts
exchange only words, which say that every rank has put its event on its stream. No host waits for a
device.

Every operation puts the same events on the streams anew. By then no rank may still have to follow
an event's last place; and none has, since all follow the first event before they enter the last
exchange, and the last event before they enter the next operation's first exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from ..kernels.records import ALL, Row, Where
from . import fused
from .call_codes import code_of
from .device import HANDLE_BYTES, Device, DeviceArray, Event, Exported, Peering
from .device_wait import passes
from .fused_pulls import own_bytes
from .fused_rows import Shape
from .texts import gather_texts
from .trace import Signature
from .work import Steps

if TYPE_CHECKING:
    from .communicator import Communicator

Made = TypeVar("Made")
Launch = Callable[[], Any]
"""Puts one kernel or copy on the stream."""

Words = npt.NDArray[np.int64]

EVENTS = 3
_READY, _AGAIN, _DONE = range(EVENTS)
OFFER_WORDS = 5 + HANDLE_BYTES // 8
_KEPT = 256
_NOT_REGISTERED, _NOTHING_SHOWN = 0, -1


@dataclass(frozen=True)
class Offer:
    """What one rank brings to an operation.

    token: of the memory that it shows; 0 where that is not registered, -1 where it shows none.
    call: what all ranks must have asked for: operation, op and type as a number, count, root.
    """

    token: int
    exported: Exported | None
    call: tuple[int, int, int]

    @property
    def fits(self) -> bool:
        """Tell whether this rank can take part."""
        return self.token != _NOT_REGISTERED

    def write(self, row: Words) -> Words:
        """Write it as int64: token, offset, call, handle."""
        row[:] = 0
        row[0], row[2:5] = self.token, self.call
        if self.exported is not None:
            row[1] = self.exported.offset
            row[5:] = np.frombuffer(self.exported.handle.ljust(HANDLE_BYTES, b"\0"), np.int64)
        return row


class _Exchange:
    """An allgather of a few words, prepared once; operations take turns, so none runs twice."""

    def __init__(self, comm: Communicator, count: int) -> None:
        self.words = np.zeros(count, np.int64)
        self._prepared = comm.host_operations.keeping().allgather(self.words)
        comm._runner.note(self._prepared)

    def run(self, tag: int) -> Steps:
        """Return a row of words from every rank, until the next run."""
        return self._prepared.run(tag)


class Ipc:
    """One rank's side of a group whose ranks open each other's device memory.

    stream: where this rank's part of an operation runs.
    """

    def __init__(
        self, comm: Communicator, device: Device, peering: Peering, mine: list[tuple[Event, bytes]]
    ) -> None:
        """Exchange the events; collective over a group on one node.

        mine: events of this rank, with their handles.

        Raises: CommError where this rank's device refuses another's, once all are exchanged.
        """
        self._comm, self._device, self._peering = comm, device, peering
        self._opened: dict[tuple[int, int], int] = {}
        self._mine = [event for event, _ in mine]
        self._all = range(comm.size)
        self._told, self._plain = _Exchange(comm, OFFER_WORDS), _Exchange(comm, 1)
        self._kept: dict[object, tuple[bytes, Any]] = {}
        cards = gather_texts(comm, peering.card)
        self._folders = sorted({cards.index(card) for card in cards})
        handles = np.zeros((EVENTS, HANDLE_BYTES), np.uint8)
        for line, (_, handle) in zip(handles, mine, strict=True):
            line[: len(handle)] = np.frombuffer(handle, np.uint8)
        everyone = comm.allgather(handles)
        self._theirs: list[Event] = []
        try:
            self._events = [
                [
                    own if rank == comm.rank else self._open_event(everyone[rank, which])
                    for rank in range(comm.size)
                ]
                for which, own in enumerate(self._mine)
            ]
            self.stream = device.make_stream()
        except BaseException:
            self._close_events()
            raise

    def offer(self, signature: Signature, array: DeviceArray) -> Offer:
        """Return what this rank brings to a collective on an array."""
        operation, op, dtype, count, root = signature
        call = code_of(operation, op, dtype), count, root
        if not count or (op and not array.dtype.on_devices):
            return Offer(_NOT_REGISTERED, None, call)
        if not own_bytes(operation, self._shape(signature, array)):
            return Offer(_NOTHING_SHOWN, None, call)
        exported = self._peering.export(array.address, array.nbytes)
        return Offer(_NOT_REGISTERED if exported is None else exported.token, exported, call)

    def run(
        self,
        signature: Signature,
        array: DeviceArray,
        into: int,
        ready: Event,
        tag: int,
        missed: list[Exception] | None = None,
    ) -> Steps:
        """Run on this rank; return the event behind all ranks' work.

        None, on all ranks, where they cannot do it this way.

        into: the address of the result.  ready: behind which this rank's memory may be used.
        missed: takes the error that kept this rank from launching, and the rank goes on with the
        others; without it, that error is raised.
        """
        self._device.follow(self.stream, ready)
        rows = yield from self.meet(self.offer(signature, array), tag)
        try:
            launches = self.kept(
                (signature, array.address, into),
                rows,
                array.address,
                lambda bases: self._launches(signature, array, into, bases),
            )
            if launches is None:
                return None
            if launches:
                self.begin()
            for launch in launches:
                launch()
        except Exception as error:
            if missed is None:
                raise
            missed.append(error)
        yield from self._pass(_DONE, tag, self._workers(signature))
        return self._device.record(self.stream)

    # -- its parts ---------------------------------------------------------------------------

    def meet(self, offer: Offer, tag: int) -> Steps:
        """Tell all ranks what this one brings; return what all bring, a row each.

        Others may use this rank's memory behind what is on its stream by now.
        """
        offer.write(self._told.words)
        self._peering.place(self._mine[_READY], self.stream)
        return (yield from self._told.run(tag))

    def begin(self) -> None:
        """Let this rank's stream run behind all that was on the others' when they met."""
        self._follow(_READY, self._all)

    def meet_again(self, tag: int) -> Steps:
        """Let it run behind all that is on every rank's by now; at most once in an operation."""
        yield from self._pass(_AGAIN, tag, self._all)

    def end(self, tag: int) -> Steps:
        """Let it run behind all ranks' work."""
        yield from self._pass(_DONE, tag, self._all)

    def _pass(self, which: int, tag: int, of: Sequence[int]) -> Steps:
        """Meet, and let this rank's stream run behind what is on those of the ranks `of`."""
        if self._comm.rank in of:
            self._peering.place(self._mine[which], self.stream)
        yield from self._plain.run(tag)
        self._follow(which, of)

    def _follow(self, which: int, of: Sequence[int]) -> None:
        for rank in of:
            self._device.follow(self.stream, self._events[which][rank])

    def _workers(self, signature: Signature) -> Sequence[int]:
        return self._folders if signature.operation in _FOLDING else self._all

    def close(self) -> None:
        """Give back the others' memory and events; after the last operation has ended.

        From then on nothing of this rank waits for the others' events. Their owners must not
        destroy them before that, so keep this until all ranks have closed theirs.
        """
        passes(self._device.record(self.stream))
        self._close_events()
        opened, self._opened = self._opened, {}
        for address in opened.values():
            self._peering.close(address)

    def _open_event(self, handle: npt.NDArray[np.uint8]) -> Event:
        self._theirs.append(self._peering.open_event(handle.tobytes()))
        return self._theirs[-1]

    def _close_events(self) -> None:
        theirs, self._theirs = self._theirs, []
        for event in theirs:
            self._peering.close_event(event)

    def _shape(self, signature: Signature, array: DeviceArray) -> Shape:
        size = self._comm.size
        whole = signature.elements * (size if signature.operation in _GATHERING else 1)
        root = max(signature.peer, 0)
        return Shape(self._comm.rank, size, whole, array.dtype.itemsize, root)

    def kept(
        self, key: object, rows: Words, address: int, make: Callable[[list[int]], Made]
    ) -> Made | None:
        """Return what `make` makes of what the ranks bring; again only when they bring another.

        None where a rank cannot take part, or where their calls differ: then all of them go another
        way, which tells how they differ.

        address: of this rank's array.  make: given the address here of every rank's array; 0 for
        one that shows none.
        """
        shown = rows.tobytes()
        known = self._kept.get(key)
        if known is not None and known[0] == shown:
            return cast(Made, known[1])
        if not rows[:, 0].all() or (rows[:, 2:5] != rows[0, 2:5]).any():
            return None
        made = make([self._base(rank, row, address) for rank, row in enumerate(rows)])
        if len(self._kept) >= _KEPT:
            self._kept.clear()
        self._kept[key] = shown, made
        return made

    def _launches(
        self, signature: Signature, array: DeviceArray, into: int, bases: Sequence[int]
    ) -> list[Launch]:
        """Return what puts this rank's part on its stream."""
        shape = self._shape(signature, array)
        workers = self._workers(signature)
        if self._comm.rank not in workers:
            return []
        if len(workers) < self._comm.size:
            place = workers.index(self._comm.rank)
            shape = replace(shape, rank=place, size=len(workers))
        program = fused.lower("shared", signature.operation, shape)
        found = [self._launch(line, signature, bases, into) for line in program.tolist()]
        return [launch for launch in found if launch is not None]

    def _launch(
        self, line: Sequence[int], signature: Signature, bases: Sequence[int], into: int
    ) -> Launch | None:
        """Return what puts one row of a program on this rank's stream.

        None for meetings, which are the events around all.
        """
        kind, target, entry, offset, _, origin, start, length = line
        places = [into] if target == Where.OWN else bases if entry == ALL else [bases[entry]]
        targets = [place + offset for place in places]
        if kind == Row.FOLD:
            sources = [base + start for base in bases]
            return self._peering.fold(
                signature.op, signature.dtype, sources, targets, length, self.stream
            )
        if kind == Row.COPY:
            return partial(
                self._peering.copy, targets[0], bases[origin] + start, length, self.stream
            )
        return None

    def _base(self, rank: int, row: Words, address: int) -> int:
        """Return where a rank's array lies for this one; 0 where it shows none."""
        if rank == self._comm.rank:
            return address
        if row[0] == _NOTHING_SHOWN:
            return 0
        return self.opened_at(rank, row) + int(row[1])

    def opened_at(self, rank: int, row: Words) -> int:
        """Return where the memory lies that a rank shows; CommError where it cannot be opened."""
        key = rank, int(row[0])
        if key not in self._opened:
            self._opened[key] = self._peering.open(row[5:].tobytes())
        return self._opened[key]


_FOLDING = ("allreduce", "reduce")
"""Collectives that write where any rank can, so that one rank of each card does the work there.

Ranks on one card take turns, each for a time slice of the card's, unless NVIDIA's MPS serves them;
and one kernel takes all of a card's bandwidth.
"""

_GATHERING = ("allgather", "gather")
"""Collectives whose flat buffer is that of all ranks together."""
